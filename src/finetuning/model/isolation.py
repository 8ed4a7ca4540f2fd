"""Whether packed examples get the logits that they get alone, tried with the model itself."""

from typing import TYPE_CHECKING

import torch

from finetuning.errors import UserError
from finetuning.model.packing import Packing, pack, packed_as

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Fields of a config by which a token attends to the nearest tokens only.
WINDOW_FIELDS = ("sliding_window", "attention_chunk_size")
# Logits of an example that are compared, its last ones: with a large vocabulary those of all tokens
# would not fit.
COMPARED = 8


@torch.no_grad()
def require_isolation(
    model: "PreTrainedModel",
    longest: int = 0,
    is_half: bool = False,
    device: torch.device | None = None,
    *,
    are_pairs: bool = False,
) -> None:
    """Raises UserError if packed examples do not get the logits that they get alone.

    Computes two examples with this very model, packed and alone. The first is longer than the
    model's window if the data's `longest` example is. Of pairs the second begins as the first does,
    and is packed without that beginning. `is_half`: the model computes in half
    precision, by autocast or its own number format. `device`: what it computes on, where its
    weights are kept elsewhere in between (FSDP2 with offload).
    """
    config = model.config.get_text_config()
    window = min(getattr(config, name, None) or longest for name in WINDOW_FIELDS)
    lengths = (min(longest, window + COMPARED) if longest > window else 5, COMPARED)
    random = torch.Generator().manual_seed(0)
    device = device or model.device
    tokens = torch.randint(5, 13, (1, sum(lengths)), generator=random).to(device)
    first, second = tokens.split_with_sizes(lengths, dim=1)
    begin = lengths[0] - 2 if are_pairs else 0
    packing = pack(lengths, device, (0, begin))
    was_training = model.training
    model.train(False)
    try:
        whole = first, torch.cat([first[:, :begin], second], dim=1)
        alone = [last_logits(model, one, pack(one.shape[1:], device)) for one in whole]
        with packed_as(packing):
            packed = last_logits(model, tokens, packing)
    finally:
        model.train(was_training)
    expected = torch.cat(alone, dim=1)
    difference, norm = (expected - packed).norm(), expected.norm()
    if not difference <= tolerance(model, is_half) * norm:
        raise UserError(
            f"data.layout: packed, but in this {model.config.model_type} model packed examples do "
            f"not get the logits that they get alone (they differ by {difference / norm:.1%}); "
            "use data.layout=padded"
        )


def tolerance(model: "PreTrainedModel", is_half: bool) -> float:
    """How far the logits may be apart, as a share of their norm.

    Measured, with up to 24 layers: rounding makes 1e-6, in half precision 0.01, and in 8 bits,
    where it depends on what else is in the batch, 0.07. A leak makes 0.08 in a BLOOM with random
    weights, 0.5 and more with larger ones.
    """
    if getattr(model, "is_quantized", False):
        return 0.2
    return 0.05 if is_half or model.dtype != torch.float32 else 1e-3


def last_logits(
    model: "PreTrainedModel", input_ids: torch.Tensor, packing: Packing
) -> torch.Tensor:
    """(1, at most COMPARED for each of the examples in the row, V)"""
    kept = COMPARED * len(packing.lengths)
    output = model(
        input_ids=input_ids,
        position_ids=packing.position_ids,
        use_cache=False,
        logits_to_keep=kept,
    )
    logits: torch.Tensor = output.logits
    return logits[:, -kept:].float()
