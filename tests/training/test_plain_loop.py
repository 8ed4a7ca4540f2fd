"""examples/plain_loop.py, a training run to read, computes what src/sft.py computes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from safetensors.torch import load_file

pytestmark = pytest.mark.usefixtures("warm_python")

STEPS = 20  # losses drift apart by rounding, by 1e-5 after some 20 steps


def losses_of_sft(run_script, folder: Path, *overrides: str) -> list[float]:
    settings = ["training.logging_steps=1", "training.eval_strategy=no", "training.report_to=none"]
    done = run_script("sft.py", "recipes/quickstart.yaml", *overrides, *settings, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def losses_of_plain_loop(*overrides: str) -> list[float]:
    command = [sys.executable, "examples/plain_loop.py", "recipes/quickstart.yaml", *overrides]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [float(loss) for loss in re.findall(r"^step \d+ .* loss (\S+)$", done.stdout, re.M)]


@pytest.mark.parametrize(
    "overrides",
    [[], ["training.global_batch_size=32", "data.layout=padded", "training.seed=7"]],
    ids=["as it is", "accumulated"],
)
def test_every_step_has_the_loss_of_sft(run_script, tmp_path, overrides):
    steps = f"training.max_steps={STEPS}"
    sft, plain = tmp_path / "sft", tmp_path / "plain"
    ours = losses_of_sft(run_script, sft, steps, f"training.output_dir={sft}", *overrides)
    theirs = losses_of_plain_loop(steps, f"training.output_dir={plain}", *overrides)
    assert len(ours) == len(theirs) == STEPS
    assert theirs == pytest.approx(ours, rel=1e-5)
    assert ours[-1] < ours[0] / 1.5
    weights, same = load_file(sft / "model.safetensors"), load_file(plain / "model.safetensors")
    assert weights.keys() == same.keys()


def test_it_is_short_enough_to_be_read():
    lines = (ROOT / "examples" / "plain_loop.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150 and max(map(len, lines)) <= 120
