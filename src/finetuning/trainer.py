"""Recipe, model and examples -> a trl.SFTTrainer that takes our batches as they are."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from finetuning.batching import Collator, require_isolation
from finetuning.data import Prepared
from finetuning.errors import UserError
from finetuning.model import load_model, lora_config, precision
from finetuning.recipe import Recipe
from finetuning.run_folder import append_metrics
from finetuning.tokenization import IGNORE_INDEX, Examples

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


class ResponseTrainer(SFTTrainer):
    """trl's trainer, with an evaluation loss that counts every response token once.

    Trainer averages the losses of batches, so that a short answer's tokens weigh more than a long one's.
    """

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self.eval_sums = torch.zeros(2, dtype=torch.float64)  # loss summed over response tokens, their number
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        loss, tokens = self.accelerator.reduce(self.eval_sums.to(self.args.device, torch.float32)).tolist()
        output.metrics[f"{prefix}_loss"] = loss / max(1.0, tokens)
        output.metrics[f"{prefix}_perplexity"] = math.exp(min(loss / max(1.0, tokens), 700.0))
        return output

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        result = super().prediction_step(model, inputs, *args, **kwargs)
        tokens = (inputs["labels"][:, 1:] != IGNORE_INDEX).sum().item()
        self.eval_sums += torch.tensor([result[0].item() * tokens, tokens], dtype=torch.float64)
        return result

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """trl writes one with every checkpoint, with loading code that does not fit a subfolder; not wanted."""


class MetricsFile(TrainerCallback):
    """Appends what is logged to metrics.jsonl."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if state.is_world_process_zero:
            append_metrics(self.folder, {"step": state.global_step, **logs})


def make_trainer(
    recipe: Recipe, tokenizer: "PreTrainedTokenizerFast", prepared: Prepared, folder: Path
) -> ResponseTrainer:
    """A trainer ready to train. Raises UserError where model, data and machine do not go together."""
    args = make_arguments(recipe, has_eval=prepared.eval is not None)
    model = load_model(recipe.model, tokenizer, args.seed)
    require_positions(model, prepared)
    if recipe.data.layout == "packed":
        require_isolation(model)
    try:
        return ResponseTrainer(
            model=model,
            args=args,
            data_collator=Collator(recipe.data.layout, tokenizer.pad_token_id or 0),
            train_dataset=as_dataset(prepared.train),
            eval_dataset=as_dataset(prepared.eval) if prepared.eval else None,
            processing_class=tokenizer,
            peft_config=lora_config(recipe),
            callbacks=[MetricsFile(folder)],
        )
    except ValueError as error:
        if recipe.lora and "target" in str(error).lower():
            raise UserError(f"lora.target_modules: {str(error).splitlines()[0]}") from None
        raise


def make_arguments(recipe: Recipe, has_eval: bool) -> SFTConfig:
    """The training section as SFTConfig, with what other sections decide."""
    has_gpu = torch.cuda.is_available()
    capability = torch.cuda.get_device_capability() if has_gpu else None
    settings = recipe.training.model_dump(exclude_unset=True)
    settings |= precision(recipe, torch.device("cuda" if has_gpu else "cpu"), capability)
    settings |= {
        # Examples come tokenized and masked; trl would tokenize, cut and pack them again.
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "max_length": None,
        "packing": False,
        "padding_free": False,
    }
    settings.setdefault("use_cpu", not has_gpu)  # two gloo processes find each other only with this flag
    settings.setdefault("dataloader_pin_memory", has_gpu)
    # trl's default of recomputing every activation costs a third of the speed; a recipe asks for it where it must.
    settings.setdefault("gradient_checkpointing", False)
    if has_eval:
        settings.setdefault("eval_on_start", True)  # the loss before training, to compare with
        settings.setdefault("per_device_eval_batch_size", recipe.training.per_device_train_batch_size)
    elif settings.get("eval_strategy", "no") != "no":
        raise UserError("training.eval_strategy is set, but data.eval is null: nothing is held out to evaluate on")
    try:
        return SFTConfig(**settings)
    except (TypeError, ValueError, ImportError, KeyError) as error:
        raise UserError(f"training: {' '.join(str(error).split())}") from None


def as_dataset(examples: Examples) -> Dataset:
    """The examples as a datasets.Dataset (trl takes no other), without copying their tokens."""
    import pyarrow

    offsets = pyarrow.array([0, *examples.ends.tolist()], pyarrow.int64())
    columns = {
        name: pyarrow.LargeListArray.from_arrays(offsets, pyarrow.array(getattr(examples, name)))
        for name in ("input_ids", "labels")
    }
    return Dataset(pyarrow.table(columns)).with_format("numpy")


def require_positions(model: "PreTrainedModel", prepared: Prepared) -> None:
    longest = prepared.report["tokens"]["max"]
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions and longest > positions:
        raise UserError(
            f"data.max_length: the longest example has {longest} tokens, the model reads at most {positions}; "
            f"use data.max_length={positions}"
        )


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end, to continue from."""
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    whole = [path for path in checkpoints if (path / "trainer_state.json").exists()]  # trainer writes it last
    return str(whole[-1]) if whole else None


def launch_of(trainer: SFTTrainer) -> dict[str, Any]:
    """How the processes really run, for environment.json."""
    state = trainer.accelerator.state
    return {
        "processes": state.num_processes,
        "distributed_type": state.distributed_type.value,
        "device": str(trainer.args.device),
        "bf16": trainer.args.bf16,
        "fp16": trainer.args.fp16,
    }


def loss_before_and_after(trainer: ResponseTrainer) -> str:
    """Evaluates, unless the last step has just been, and says how far the held-out loss fell."""
    if trainer.eval_dataset is None:
        return "no evaluation: data.eval is null"
    history = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    if not history or history[-1]["step"] != trainer.state.global_step:
        trainer.evaluate()
        history = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    first, last = history[0], history[-1]
    return (
        f"held-out response loss {first['eval_loss']:.3f} -> {last['eval_loss']:.3f}, perplexity "
        f"{first['eval_perplexity']:.1f} -> {last['eval_perplexity']:.1f} ({len(trainer.eval_dataset):,} examples)"
    )
