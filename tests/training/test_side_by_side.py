"""benchmarks/train.py and benchmarks/dpo.py, very small: the modes compute the same losses."""

import json
import math
import runpy
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import tiny
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def measured(tmp_path, monkeypatch, capsys):
    """A function: what a script's worker measures of each mode, on the small model made smaller."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import side_by_side

    fields = {"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2, "vocab_size": 400}
    monkeypatch.setitem(side_by_side.MODELS, "small", fields)
    monkeypatch.setattr(side_by_side, "use_one_thread", lambda: None)
    rows = [
        {"instruction": f"Count to {n}", "context": "", "response": "one " * n, "category": "qa"}
        for n in range(1, 25)
    ]
    dolly = tmp_path / "dolly.jsonl"
    dolly.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    tiny.byte_level().save_pretrained(tmp_path / "tokenizer")

    def measure(script: str, *modes: str) -> dict[str, dict]:
        found = {}
        for mode in modes:
            command = [script, "--data", str(dolly), "--tokenizer", str(tmp_path / "tokenizer")]
            monkeypatch.setattr(sys, "argv", [*command, "--model", "small", "--worker", mode])
            runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
            found[mode] = json.loads(capsys.readouterr().out.splitlines()[-1])
        options = Namespace(model="small", method="full", device="cpu")
        lines = side_by_side.table(found, {mode: mode for mode in modes}, options).splitlines()
        assert [line.split()[1] for line in lines[4:]] == list(modes)
        return found

    return measure


def losses(found: dict[str, dict]) -> torch.Tensor:
    """(modes, steps)"""
    return torch.tensor([run["losses"] for run in found.values()])


def test_modes_of_supervised_fine_tuning_have_the_same_losses(measured):
    found = losses(measured("train.py", "trl_padded", "ours_packed"))
    assert found.shape == (2, 2)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=0)


def test_modes_of_preference_tuning_have_the_same_losses(measured):
    found = losses(measured("dpo.py", "trl", "trl_precomputed", "ours_packed"))
    assert found[:, 0].tolist() == pytest.approx([math.log(2)] * 3, abs=1e-6)
    assert found[0, 1] != pytest.approx(math.log(2), abs=1e-4)
    torch.testing.assert_close(found[1:], found[[0, 0]], rtol=1e-4, atol=0)
