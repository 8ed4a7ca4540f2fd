"""What is asked of a run's model before its first step."""

from types import SimpleNamespace

import pytest

from finetuning.training import start_checks


@pytest.mark.parametrize(("bf16", "fp16"), [(False, False), (True, False), (False, True)])
def test_packing_is_checked_in_the_run_s_precision_and_for_its_longest_example(
    bf16, fp16, monkeypatch
):
    asked = []

    def require_isolation(model, longest, is_half, device, are_pairs):
        asked.append((model, longest, is_half, device, are_pairs))

    monkeypatch.setattr(start_checks, "require_isolation", require_isolation)
    args = SimpleNamespace(bf16=bf16, fp16=fp16, device="the GPU")
    trainer = SimpleNamespace(model="the model", args=args)
    examples = SimpleNamespace(train=SimpleNamespace(longest=9))
    recipe = SimpleNamespace(data=SimpleNamespace(layout="packed", is_preference=True))
    start_checks.check_packing(trainer, SimpleNamespace(recipe=recipe, examples=examples))
    assert asked == [("the model", 9, bf16 or fp16, "the GPU", True)]


def test_padded_examples_are_not_asked_whether_they_see_each_other(monkeypatch):
    monkeypatch.setattr(start_checks, "require_isolation", None)
    recipe = SimpleNamespace(data=SimpleNamespace(layout="padded"))
    start_checks.check_packing(None, SimpleNamespace(recipe=recipe))
