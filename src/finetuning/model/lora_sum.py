"""An adapter's output is made once, and the base layer's is added to it in place.

peft computes `base + lora_B(lora_A(x)) * scaling`, which on the way makes three tensors as wide as
the layer's output. Scaling the rank's few numbers and adding in place makes one: the same to 1e-6.
Measured for GPT-2 with an adapter on c_attn: peak memory 0.90, of the adapter's own time half.
"""

from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora.layer import LoraLayer, LoraVariant

if TYPE_CHECKING:
    from peft import PeftModel

# peft's classes for linear layers, in 8 and in 4 bits too, whose forward asks a LoraVariant.
LINEAR = ("Linear", "Linear8bitLt", "Linear4bit")


class SumInPlace(LoraVariant):
    """peft's own way to say how an adapter is applied; DoRA is another."""

    @staticmethod
    def forward(
        module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """x (B, T, in), result (B, T, out) of the base layer -> (B, T, out)"""
        few = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))
        output: torch.Tensor = module.lora_B[active_adapter](few * module.scaling[active_adapter])
        return output.add_(result)


def sum_in_place(model: "PeftModel") -> None:
    """For every plain adapter on a linear layer; others, such as DoRA's, have a variant already.

    Of a model in training only: nobody merges it, which peft leaves to the variant too.
    """
    for module in model.modules():
        if isinstance(module, LoraLayer) and type(module).__name__ in LINEAR:
            for adapter in module.lora_A:
                if not module.lora_bias[adapter]:  # it would have to be scaled too
                    module.lora_variant.setdefault(adapter, SumInPlace())
