"""Short trainings of small models with our trainer, for tests that look at their losses."""

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from finetuning.data.cache import prepare
from finetuning.launch.strategy import requested_strategy
from finetuning.model.tokenizer import load_tokenizer
from finetuning.recipe.recipe import Recipe, load_recipe
from finetuning.training.callbacks import MetricsFile
from finetuning.training.prepared_run import PreparedRun
from finetuning.training.start_checks import check_logits, check_packing, check_reference
from finetuning.training.train import make_trainer
from finetuning.training.trainer import ResponseTrainer

STEPS, GLOBAL_BATCH, RATE = 5, 8, 3e-3
# Softmax does not see the bias of a key, so its gradient is rounding noise, which AdamW would blow
# up to whole steps.
EPSILON = 1e-4
LORA_TARGETS = {"gpt2": "[c_attn, c_fc]", "llama": "[q_proj, v_proj]", "bloom": "[query_key_value]"}


def write_rows(folder: Path) -> Path:
    """The file of rows of very different lengths."""
    file = folder / "rows.jsonl"
    lines = [
        {
            "prompt": f"What is {n} + {n}?" * (1 + n % 3),
            "response": f"It is {2 * n}. " * (1 + (n * 7) % 11),
        }
        for n in range(60)
    ]
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return file


def write_pairs(folder: Path, count: int = 60) -> Path:
    """The file of pairs of responses, of which now the chosen is longer and now the rejected."""
    file = folder / "pairs.jsonl"
    lines = [
        {
            "prompt": f"What is {n} + {n}?" * (1 + n % 3),
            "chosen": f"It is {2 * n}. " * (1 + (n * 7) % 5),
            "rejected": f"I think {n}! " * (1 + (n * 5) % 6),
        }
        for n in range(count)
    ]
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return file


def lines_of_rows(count: int) -> str:
    """A file of rows of different lengths."""
    rows = [
        {"prompt": f"What is {n} + {n}?", "response": f"It is {2 * n}. " * (1 + n % 5)}
        for n in range(count)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


def recipe_of(base: tuple[str, Path], rows: Path, output: Path, *overrides: str) -> Recipe:
    """A recipe of STEPS steps on a (kind, folder) base; its run folder is `output`."""
    text = f"""
model: {{name: {base[1]}}}
data:
  path: {rows}
  reader: prompt_response
  template: question_answer
  max_length: 200
  eval: {{every: 6}}
training:
  output_dir: {output}
  max_steps: {STEPS}
  per_device_train_batch_size: {GLOBAL_BATCH}
  learning_rate: {RATE}
  lr_scheduler_type: constant
  optim: adamw_torch
  adam_epsilon: {EPSILON}
  logging_steps: 1
  save_strategy: "no"
"""
    file = output.with_suffix(".yaml")
    file.write_text(text, encoding="utf-8")
    return load_recipe(file, overrides)


def prepared_run(recipe: Recipe) -> PreparedRun:
    """The recipe with its tokenizer and examples, without the cache."""
    tokenizer = load_tokenizer(recipe.model, [])
    examples = prepare(recipe.data, tokenizer)
    return PreparedRun(recipe, requested_strategy(), tokenizer, examples)


class Checks(TrainerCallback):
    """Of those that a run starts with, the ones about the prepared model."""

    def __init__(self, trainer: ResponseTrainer, run: PreparedRun) -> None:
        self.trainer, self.run = trainer, run

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        check_logits(self.trainer, self.run)
        check_packing(self.trainer, self.run)
        check_reference(self.trainer, self.run)


def trained(recipe: Recipe) -> ResponseTrainer:
    """The trainer of this recipe when it has trained."""
    folder = Path(recipe.training.output_dir)
    folder.mkdir(exist_ok=True)
    trainer = make_trainer(run := prepared_run(recipe))
    trainer.add_callback(Checks(trainer, run))
    trainer.add_callback(MetricsFile(folder))
    trainer.train()
    return trainer


def losses_of(trainer: ResponseTrainer) -> list[float]:
    """The loss of every logged step."""
    return figures_of(trainer)["loss"]


def figures_of(trainer: ResponseTrainer) -> dict[str, list[float]]:
    """Loss, norm of the gradient, and of preference tuning the rewards, of every logged step.

    The first has no accuracy: rewards are 0 there, and rounding decides which is higher.
    """
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    names = [name for name in steps[0] if name in ("loss", "grad_norm") or "rewards/" in name]
    first = {"rewards/accuracies": 1}
    return {name: [entry[name] for entry in steps[first.get(name, 0) :]] for name in names}
