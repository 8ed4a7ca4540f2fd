"""Packed batches of tokens, and what models make of them."""

import torch
from accelerate.utils import convert_outputs_to_fp32

from finetuning.model.packing import Packing, pack, packed_as

LENGTHS = (7, 1, 12, 5)
# A window of 8 tokens, in every layer or in some.
WINDOWED = {
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
    "phi3": {"sliding_window": 8},
    "gemma3_text": {
        "sliding_window": 8,
        "head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}


def flat(lengths=LENGTHS, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids and position_ids of a packed batch, (1, T) each."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 500, (1, sum(lengths)), generator=generator)
    return ids, torch.cat([torch.arange(length) for length in lengths])[None]


def packing_of(lengths, device, way: type[Packing] = Packing) -> Packing:
    return way(**vars(pack(lengths, device)))


def logits_of(model, ids, positions, lengths) -> torch.Tensor:
    with torch.no_grad(), packed_as(packing_of(lengths, model.device)):
        ids, positions = ids.to(model.device), positions.to(model.device)
        return model(input_ids=ids, position_ids=positions, use_cache=False).logits.float().cpu()


def computing_in(model, dtype):
    """The model as accelerate prepares it for bf16 or fp16: autocast, and logits in float32."""
    if dtype is not None:
        model.forward = convert_outputs_to_fp32(
            torch.autocast(model.device.type, dtype)(model.forward)
        )
    return model
