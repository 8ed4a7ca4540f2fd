"""What the libraries say to a recipe's settings, asked before a model is loaded."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
)
from trl import SFTConfig

from finetuning.errors import UserError
from finetuning.hub.allowed_files import MAX_LAYERS
from finetuning.model.loading import load_config
from finetuning.model.lora import lora_config
from finetuning.model.response_head import require_plain_head
from finetuning.recipe.recipe import Recipe
from finetuning.recipe.sections import Generation
from finetuning.training.argument_checks import (
    require_activation_checkpointing,
    require_metric,
    require_optimizer,
    require_schedule,
)
from finetuning.training.library_errors import trying
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
# Initial weights of an adapter that are computed from the model's own.
FROM_WEIGHTS = ("pissa", "olora", "loftq", "corda", "eva", "lora_ga")
TOKENS = ("token_id", "suppress_tokens")
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


def model_without_weights(
    recipe: Recipe, tokenizer: "PreTrainedTokenizerFast"
) -> "PreTrainedModel":
    config = load_config(recipe.model, tokenizer)
    place = "model.from_scratch.config" if recipe.model.from_scratch else "model.name"
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{place}: {config.model_type} models are not causal language models")
    if getattr(config.get_text_config(), "num_hidden_layers", 1) < 1:
        raise UserError(f"{place}: a model has at least one layer")
    with trying(place), torch.device("meta"):
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
    with trying("generation"), torch.random.fork_rng(devices=[]), torch.no_grad():
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

    with trying("lora"):
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
    with trying("lora"), torch.device("meta"):
        if str(config.init_lora_weights).startswith(FROM_WEIGHTS):  # there are none here
            config = replace(config, init_lora_weights=True, loftq_config={})
        get_peft_model(model, config)
