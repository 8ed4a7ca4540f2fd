"""What a model does to the logits that its head returns: a cap and a factor are part of the loss.

Gemma 2 has the cap, Cohere the factor, Granite the divisor; models that change their logits in
other ways are refused, see response_head.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Fields of a config that say it.
CAP, FACTOR, DIVISOR = "final_logit_softcapping", "logit_scale", "logits_scaling"
NEUTRAL = {CAP: None, FACTOR: 1.0, DIVISOR: 1.0}


class LogitChange(NamedTuple):
    """What a model does to the logits of its head: x -> cap * tanh(factor * x / cap)."""

    factor: float
    cap: float | None

    @classmethod
    def of(cls, model: "PreTrainedModel") -> "LogitChange":
        config = model.config.get_text_config()
        factor = getattr(config, FACTOR, None) or 1
        divisor = getattr(config, DIVISOR, None) or 1
        return cls(factor / divisor, getattr(config, CAP, None))


Setting = tuple[Any, str, Any]  # (config or module, name, value)


def settings_of_change(model: "PreTrainedModel") -> list[Setting]:
    """Where the model, or its config, says how it changes its logits."""
    owners = [model.config.get_text_config(), *model.modules()]
    return [
        (owner, name, vars(owner)[name])
        for owner in owners
        for name in NEUTRAL
        if vars(owner).get(name) is not None
    ]


@contextmanager
def unchanged(settings: list[Setting]) -> Iterator[None]:
    """Within, the model returns what its head returns: the head does the rest, see LogitChange."""
    for owner, name, _ in settings:
        setattr(owner, name, NEUTRAL[name])
    try:
        yield
    finally:
        for owner, name, value in settings:
            setattr(owner, name, value)
