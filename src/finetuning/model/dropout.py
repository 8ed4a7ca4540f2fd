"""Dropout switched off."""

import torch


def disable_dropout(model: torch.nn.Module) -> None:
    """Nothing is dropped any more, in training either: neither by a module nor in attention, whose
    share is a number of the module that attends (Llama's attention_dropout).
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
