"""What the opening asks of a run's model."""

from types import SimpleNamespace

import numpy as np
import pytest

from finetuning.training import start_checks as opening


class Asked(Exception):
    """Ends the opening at its question."""


@pytest.mark.parametrize(("bf16", "fp16"), [(False, False), (True, False), (False, True)])
def test_isolation_is_asked_in_the_runs_precision_and_for_its_longest_example(
    bf16, fp16, monkeypatch
):
    def ask(model, longest, is_half):
        assert (model, longest, is_half) == ("the model", 9, bf16 or fp16)
        raise Asked

    monkeypatch.setattr(opening, "require_strategy", lambda *args: None)
    monkeypatch.setattr(opening, "require_same_software", lambda *args: None)
    monkeypatch.setattr(opening, "gather_object", lambda facts: facts)
    monkeypatch.setattr(opening, "require_isolation", ask)
    asked = []
    head = SimpleNamespace(require_unmodified_logits=asked.append)
    trainer = SimpleNamespace(
        train_examples=SimpleNamespace(lengths=np.array([4, 9, 2])), head=head
    )
    recipe = SimpleNamespace(data=SimpleNamespace(layout="packed"))
    question = opening.StartChecks(trainer, recipe, None, "", list, None)
    with pytest.raises(Asked):
        question.on_train_begin(
            SimpleNamespace(bf16=bf16, fp16=fp16), None, None, model="the model"
        )
    assert asked == ["the model"]
