"""What the libraries say to a recipe's settings, asked before a model is loaded."""

import inspect
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
)
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, get_scheduler
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames
from trl import SFTConfig

from finetuning.errors import UserError, did_you_mean, one_line
from finetuning.evaluation.scores import BETTER_IF_HIGHER
from finetuning.hub.allowed_files import MAX_LAYERS
from finetuning.model.loading import load_config
from finetuning.model.lora import lora_config
from finetuning.model.response_head import require_plain_head
from finetuning.recipe.recipe import Recipe
from finetuning.recipe.sections import NOT_OF_SFT_CONFIG, Generation
from finetuning.training.prepared_run import PreparedRun

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

# Settings of `generation` that bounds alone can judge: they are not tried on a model.
BOUNDED = {
    "prompts",
    "seed",
    "max_new_tokens",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "repetition_penalty",
    "no_repeat_ngram_size",
}
# How peft says that it does without a setting.
IGNORES = "(?s).*(did not match any|no parameter was matched|will be ignored)"
# Initial weights of an adapter that are computed from the model's own.
FROM_WEIGHTS = ("pissa", "olora", "loftq", "corda", "eva", "lora_ga")
TOKENS = ("token_id", "suppress_tokens")
BY_LOSS = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)
METRICS = ("loss", "perplexity", "mean_token_accuracy")  # of an evaluation: model/throughput.py
METRICS_OF_PAIRS = ("loss", "rewards/accuracies", "rewards/margins")


def require_library_settings(run: PreparedRun, args: SFTConfig) -> "PreTrainedModel":
    """The base model without its weights, on the meta device, after every setting was tried on it
    or on its class.

    Raises UserError for a setting that a library refuses, or that would silently have no effect.
    """
    recipe, tokenizer = run.recipe, run.tokenizer
    model = model_without_weights(recipe, tokenizer)
    require_positions(model, run.examples.report["tokens"]["max"])
    require_optimizer(args, model)
    require_schedule(args)
    metrics = METRICS_OF_PAIRS if recipe.data.is_preference else METRICS
    require_metric(args, metrics, recipe.evaluation.questions if run.examples.eval else 0)
    require_activation_checkpointing(args)
    require_generation(recipe.generation, tokenizer)
    require_plain_head(model, recipe.lora)
    require_adapter(recipe, model)
    return model


@contextmanager
def asking(section: str) -> Iterator[None]:
    """Whatever a library raises at settings, of any type, is what is wrong with the section.

    So is a warning that it ignores one of them; other warnings come again when it is trained.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", message=IGNORES)
            yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{section}: {one_line(error) or type(error).__name__}") from None


def model_without_weights(
    recipe: Recipe, tokenizer: "PreTrainedTokenizerFast"
) -> "PreTrainedModel":
    config = load_config(recipe.model, tokenizer)
    place = "model.from_scratch.config" if recipe.model.from_scratch else "model.name"
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{place}: {config.model_type} models are not causal language models")
    if getattr(config.get_text_config(), "num_hidden_layers", 1) < 1:
        raise UserError(f"{place}: a model has at least one layer")
    with asking(place), torch.device("meta"):
        made: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        model: PreTrainedModel = made(config)
    return model


def require_positions(model: "PreTrainedModel", longest: int) -> None:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions and longest > positions:
        raise UserError(
            f"data.max_length: the longest example has {longest} tokens, the model reads at most "
            f"{positions}; use data.max_length={positions}"
        )


def trial_arguments(recipe: Recipe) -> SFTConfig:
    """The training section as the library reads it, for no device in particular.

    For --check alone: the library begins to speak to devices and other processes when it is made.
    """
    launch = ("WORLD_SIZE", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")
    for name in launch:  # there are no other processes here
        os.environ.pop(name, None)
    device = {"bf16", "fp16", "bf16_full_eval", "fp16_full_eval", "tf32", "use_cpu", "ddp_backend"}
    settings = recipe.training.model_dump(exclude_unset=True, exclude=NOT_OF_SFT_CONFIG | device)
    settings["activation_checkpointing"] = bool(recipe.training.activation_checkpointing)
    with asking("training"):
        return SFTConfig(**settings, use_cpu=True, bf16=False)


def require_optimizer(args: SFTConfig, model: "PreTrainedModel") -> None:
    name = OptimizerNames(args.optim).value
    with asking(f"training.optim: {name}"):
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(args, model)
        if args.optim_args:
            plain = replace_argument(args, "optim_args", None)
            if Trainer.get_optimizer_cls_and_kwargs(plain, model)[1] == settings:
                raise UserError(
                    f"training.optim_args: {args.optim_args} changes nothing about {name}; leave "
                    "it out"
                )
        if not kind.__module__.startswith("bitsandbytes"):  # theirs may need a GPU to be made
            groups = settings.pop("params", None)
            for key in ("optimizer_dict", "model"):  # of layers, made one by one
                if key in settings:
                    return
            kind(groups or torch.nn.Linear(2, 2).parameters(), **settings)


def replace_argument(args: SFTConfig, name: str, value: Any) -> SFTConfig:
    """A copy with another value, without the library's checks, which have been made."""
    import copy

    changed = copy.copy(args)
    object.__setattr__(changed, name, value)
    return changed


def require_schedule(args: SFTConfig) -> None:
    kind = SchedulerType(args.lr_scheduler_type)
    schedule_of: Any = TYPE_TO_SCHEDULER_FUNCTION[kind]
    known = set(inspect.signature(schedule_of).parameters)
    given: Any = args.lr_scheduler_kwargs or {}
    if kind in (SchedulerType.CONSTANT, SchedulerType.CONSTANT_WITH_WARMUP):
        known &= {"optimizer", "num_warmup_steps"}  # it is given no others
    for name in given:
        if name not in known - {"optimizer", "num_warmup_steps", "num_training_steps"}:
            hint = did_you_mean(name, known)
            raise UserError(
                f"training.lr_scheduler_kwargs: the schedule {kind.value} has no {name}{hint}"
            )
    if args.warmup_steps and "num_warmup_steps" not in known:
        raise UserError(
            f"training.warmup_steps has no effect with lr_scheduler_type: {kind.value}; use "
            "constant_with_warmup, or leave it out"
        )
    weights = torch.nn.Linear(2, 2).parameters()
    with asking(f"training.lr_scheduler_type: {kind.value}"):
        schedule = get_scheduler(kind, torch.optim.SGD(weights, lr=1.0), 0, 10, given)
        schedule.step(*[1.0] if kind in BY_LOSS else [])


def require_metric(args: SFTConfig, metrics: tuple[str, ...], questions: int | str) -> None:
    metric = (args.metric_for_best_model or "loss").removeprefix("eval_")
    if metric not in (*metrics, *BETTER_IF_HIGHER):
        raise UserError(
            f"training.metric_for_best_model is {metric}; an evaluation has {', '.join(metrics)}, "
            f"or scores of answers: {', '.join(BETTER_IF_HIGHER)}"
            f"{did_you_mean(metric, (*metrics, *BETTER_IF_HIGHER))}"
        )
    if metric in BETTER_IF_HIGHER and not questions:
        raise UserError(
            f"training.metric_for_best_model is {metric}, a score of answers, but "
            "evaluation.questions is 0"
        )


def require_activation_checkpointing(args: SFTConfig) -> None:
    settings: Any = args.activation_checkpointing_kwargs
    if not settings:
        return
    weight = torch.ones(1, requires_grad=True)
    with asking("training.activation_checkpointing_kwargs"):
        torch.utils.checkpoint.checkpoint(
            torch.square, weight, **{"use_reentrant": False, **settings}
        ).backward()


def require_generation(generation: Generation, tokenizer: "PreTrainedTokenizerFast") -> None:
    """Tries the settings on a tiny model with this vocabulary, unless bounds say all about them."""
    settings = generation.model_dump(exclude_unset=True, exclude={"prompts", "seed"})
    if settings.keys() <= BOUNDED:
        return
    vocabulary = len(tokenizer)
    for name, value in settings.items():
        ids = value if isinstance(value, list) else [value]
        if (
            name.endswith(TOKENS)
            and value is not None
            and not all(is_below(number, vocabulary) for number in ids)
        ):
            raise UserError(
                f"generation.{name} is {value}; expected numbers of tokens, below {vocabulary}"
            )
    size: Any = {"n_layer": 1, "n_head": 1, "n_embd": 8, "n_positions": 16}
    plain = {"pad_token_id": 0, "eos_token_id": vocabulary - 1}
    with asking("generation"), torch.random.fork_rng(devices=[]), torch.no_grad():
        model = GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, **size)).eval()
        few = {"max_new_tokens": 2, "min_new_tokens": None, "min_length": None}
        config = GenerationConfig(**{**plain, **settings, **few})
        model.generate(torch.tensor([[1, 2, 3]]), generation_config=config)


def is_below(number: object, end: int) -> bool:
    return type(number) is int and 0 <= number < end


def require_adapter(recipe: Recipe, model: "PreTrainedModel") -> None:
    """Puts the adapter on the model without weights.

    Raises UserError for what peft refuses, or would leave out silently.
    """
    if recipe.lora is None:
        return
    from peft import get_peft_model

    with asking("lora"):
        config: Any = lora_config(recipe)
        copies = sum(end - begin for begin, end in config.layer_replication or [])
    if copies > MAX_LAYERS:
        raise UserError(f"lora.layer_replication makes {copies:,} layers; at most {MAX_LAYERS:,}")
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    chosen: Any = config.layers_to_transform
    wanted = chosen if isinstance(chosen, list) else [] if chosen is None else [chosen]
    if layers and (beyond := [number for number in wanted if not is_below(number, layers)]):
        raise UserError(
            f"lora.layers_to_transform: there is no layer {beyond[0]}; the model has {layers}, "
            "from 0"
        )
    with asking("lora"), torch.device("meta"):
        if str(config.init_lora_weights).startswith(FROM_WEIGHTS):  # there are none here
            config = replace(config, init_lora_weights=True, loftq_config={})
        get_peft_model(model, config)
