"""A training run in plain PyTorch, to read from top to bottom: what src/sft.py computes, without a
trainer.

python examples/plain_loop.py recipes/quickstart.yaml
python examples/plain_loop.py recipes/quickstart.yaml training.max_steps=40

The same recipe gives the same loss at every step as src/sft.py, to 1e-5 (a test holds it). What
src/sft.py does beside it: packed batches, many GPUs, LoRA, half precision, checkpoints, evaluation,
answers. The letters in the comments: B sequences in a batch, T tokens in the longest of them, V
tokens in the vocabulary.
"""

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import get_scheduler, set_seed

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))  # finetuning need not be installed

from finetuning.data.cache import prepare
from finetuning.data.examples import Example
from finetuning.data.named_templates import set_chat_template
from finetuning.data.prepare import training_texts
from finetuning.launch.step_size import step_size
from finetuning.model.loading import load_model
from finetuning.model.tokenizer import load_tokenizer
from finetuning.recipe.recipe import load_recipe
from finetuning.script import run

IGNORED = -100  # the label of a token that is not trained; F.cross_entropy leaves it out


def main(arguments: list[str]) -> None:
    path, *overrides = arguments
    recipe = load_recipe(path, overrides)
    settings = recipe.training

    # Rows become examples: token ids, and the same ids as labels where the response stands.
    tokenizer = load_tokenizer(recipe.model, training_texts(recipe.data))
    set_chat_template(recipe.data, tokenizer)
    examples = list(prepare(recipe.data, tokenizer).train)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(recipe.model, tokenizer, settings.seed).to(device)
    model.train()

    examples_of_step = step_size(recipe, processes=1).total
    steps_in_epoch = math.ceil(len(examples) / examples_of_step)
    steps = settings.max_steps
    if steps < 0:
        steps = math.ceil(settings.num_train_epochs * steps_in_epoch)

    optimizer = make_optimizer(model, settings)
    schedule = make_schedule(optimizer, settings, steps)
    batches = padded_batches(examples, examples_of_step, settings.data_seed or settings.seed)
    set_seed(settings.seed)  # of dropout

    for step in range(1, steps + 1):
        input_ids, labels = (part.to(device) for part in next(batches))
        loss = response_loss(model, input_ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        print(f"step {step} of {steps}  loss {loss.item():.6f}")

    folder = Path(settings.output_dir)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"model: {folder}")


def padded_batches(
    examples: list[Example], size: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(input_ids, labels), each (B, T), without end: every epoch all examples once, in a new
    order."""
    epoch = 0
    while True:
        order = np.random.default_rng((seed, epoch)).permutation(len(examples))
        for start in range(0, len(order), size):
            numbers = order[start : start + size]
            yield pad([examples[number] for number in numbers])
        epoch += 1


def pad(batch: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """On the right, where causal attention never looks: a token sees only those before it."""
    longest = max(len(example["input_ids"]) for example in batch)
    input_ids = torch.zeros(len(batch), longest, dtype=torch.long)
    labels = torch.full((len(batch), longest), IGNORED)
    for row, example in enumerate(batch):
        length = len(example["input_ids"])
        input_ids[row, :length] = torch.from_numpy(example["input_ids"].astype(np.int64))
        labels[row, :length] = torch.from_numpy(example["labels"].astype(np.int64))
    return input_ids, labels


def response_loss(
    model: torch.nn.Module, input_ids: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """() mean cross-entropy of the response tokens: every one weighs the same, in whatever row."""
    logits = model(input_ids=input_ids).logits  # (B, T, V)
    predictions, targets = logits[:, :-1], labels[:, 1:]  # position t predicts token t + 1
    return F.cross_entropy(predictions.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


def make_optimizer(model: torch.nn.Module, settings) -> torch.optim.Optimizer:
    """AdamW, which decays matrices, but neither biases nor the weights of norms."""
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    vectors = [weight for weight in model.parameters() if weight.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    betas = (settings.adam_beta1, settings.adam_beta2)
    return torch.optim.AdamW(
        groups, lr=settings.learning_rate, betas=betas, eps=settings.adam_epsilon
    )


def make_schedule(optimizer: torch.optim.Optimizer, settings, steps: int):
    """The learning rate of every step; warmup_steps below 1 is a share of all steps."""
    warmup = settings.warmup_steps
    warmup = int(warmup) if warmup >= 1 else math.ceil(steps * warmup)
    return get_scheduler(
        settings.lr_scheduler_type,
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=steps,
        scheduler_specific_kwargs=settings.lr_scheduler_kwargs,
    )


if __name__ == "__main__":
    run(main, __doc__)
