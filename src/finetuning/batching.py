"""Examples -> batches: the same examples in either layout, padded or packed.

padded   [[1, 2, 3, 0],        packed   [[1, 2, 3, 4, 5]]         no padding, no attention mask;
          [4, 5, 0, 0]]                  position_ids [[0, 1, 2, 0, 1]] tell the examples apart
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from finetuning.errors import UserError
from finetuning.tokenization import IGNORE_INDEX, Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Collator:
    """A list of examples -> the tensors a model takes."""

    layout: str
    pad_token_id: int
    """fills padded rows; never attended to, never trained, so any id will do"""

    def __call__(self, examples: list[Example]) -> Batch:
        return pack(examples) if self.layout == "packed" else pad(examples, self.pad_token_id)


def pack(examples: list[Example]) -> Batch:
    """{input_ids, labels, position_ids}, each (1, T) with T the tokens of all examples together.

    There is no attention_mask: transformers tells packed examples apart by position_ids only where there is none.
    """
    return {
        "input_ids": row(np.concatenate([example["input_ids"] for example in examples])),
        "labels": row(np.concatenate([example["labels"] for example in examples])),
        "position_ids": row(np.concatenate([np.arange(len(example["input_ids"])) for example in examples])),
    }


def pad(examples: list[Example], pad_token_id: int) -> Batch:
    """{input_ids, labels, attention_mask}, each (B, T), T the tokens of the longest example; padded on the right."""
    longest = max(len(example["input_ids"]) for example in examples)
    batch = {
        "input_ids": torch.full((len(examples), longest), pad_token_id),
        "labels": torch.full((len(examples), longest), IGNORE_INDEX),
        "attention_mask": torch.zeros((len(examples), longest), dtype=torch.long),
    }
    for number, example in enumerate(examples):
        length = len(example["input_ids"])
        batch["input_ids"][number, :length] = torch.as_tensor(example["input_ids"])
        batch["labels"][number, :length] = torch.as_tensor(example["labels"])
        batch["attention_mask"][number, :length] = 1
    return batch


def row(values: np.ndarray) -> torch.Tensor:
    return torch.as_tensor(values.astype(np.int64))[None]


@torch.no_grad()
def require_isolation(model: "PreTrainedModel", tolerance: float = 1e-3) -> None:
    """Raises UserError if packed examples see each other in this very model.

    Asks it: two short examples, packed and alone, must give the same logits. Architectures differ: BLOOM ignores
    position_ids and trains across examples without a word.
    """
    examples = [{"input_ids": ids, "labels": ids} for ids in (np.arange(5, 10), np.arange(12, 4, -1))]
    was_training = model.training
    model.eval()
    try:
        apart = torch.cat([logits(model, pack([example])) for example in examples], dim=1)
        together = logits(model, pack(examples))
    finally:
        model.train(was_training)
    difference = (apart - together).abs().max().item()
    if not difference <= tolerance * max(1.0, apart.abs().max().item()):
        kind = model.config.model_type
        raise UserError(
            f"data.layout: packed, but in this {kind} model packed examples see each other (logits differ by "
            f"{difference:.1g}); use data.layout=padded"
        )


def logits(model: "PreTrainedModel", batch: Batch) -> torch.Tensor:
    inputs = {name: batch[name].to(model.device) for name in ("input_ids", "position_ids")}
    return model(**inputs, use_cache=False).logits.float()
