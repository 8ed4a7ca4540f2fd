"""Two processes (gloo, on the CPU) train what one process trains."""

import json
import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file
from test_trainer import GLOBAL_BATCH, LORA_TARGETS, base, losses_of, recipe_of, rows, trained  # noqa: F401

pytestmark = pytest.mark.cluster

CASES = [(method, layout) for method in ("full", "lora") for layout in ("packed", "padded")]


@pytest.fixture(scope="module")
def two_processes(base, rows, tmp_path_factory):  # noqa: F811
    """{case: {losses, eval, processes, wrapper, weights}} of all cases, trained by two processes."""
    folder = tmp_path_factory.mktemp("two")
    cases = {}
    for method, layout in CASES:
        name = f"{method}_{layout}"
        overrides = overrides_of(base[0], method, layout, GLOBAL_BATCH // 2)
        recipe_of(base, rows, folder / name)
        cases[name] = (str(folder / f"{name}.yaml"), overrides)
    (folder / "cases.json").write_text(json.dumps(cases))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*torchrun, "tests/processes.py", str(folder / "cases.json"), str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {
        name: {
            **json.loads((folder / f"{name}.json").read_text()),
            "weights": load_file(folder / f"{name}.safetensors"),
        }
        for name in cases
    }


def overrides_of(kind: str, method: str, layout: str, batch_size: int) -> list[str]:
    lora = [f"lora={{r: 4, lora_alpha: 8, target_modules: {LORA_TARGETS[kind]}}}"] if method == "lora" else []
    return [f"data.layout={layout}", f"training.per_device_train_batch_size={batch_size}", *lora]


@pytest.mark.parametrize(("method", "layout"), CASES)
def test_two_processes_train_what_one_trains(two_processes, base, rows, tmp_path, method, layout):  # noqa: F811
    found = two_processes[f"{method}_{layout}"]
    assert (found["processes"], found["wrapper"]) == (2, "DistributedDataParallel")
    alone = trained(recipe_of(base, rows, tmp_path / "run", *overrides_of(base[0], method, layout, GLOBAL_BATCH)))
    assert found["losses"] == pytest.approx(losses_of(alone), rel=1e-5)
    evaluated = [entry["eval_loss"] for entry in alone.state.log_history if "eval_loss" in entry]
    assert found["eval"] == pytest.approx(evaluated, rel=1e-5)
    weights = {name: weight for name, weight in alone.model.named_parameters() if weight.requires_grad}
    assert found["weights"].keys() == weights.keys()
    for name, weight in weights.items():
        assert (found["weights"][name] - weight.detach()).abs().max() <= 1e-5, name


def test_accelerate_starts_two_processes_that_know_of_each_other(tmp_path):
    accelerate = [os.path.join(os.path.dirname(sys.executable), "accelerate"), "launch"]
    config = ["--config_file", "accelerate_configs/cpu_ddp.yaml", "--main_process_port", "0"]
    overrides = [f"training.output_dir={tmp_path / 'run'}", "training.max_steps=2"]
    command = [*accelerate, *config, "src/sft.py", "recipes/quickstart.yaml", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["launch"]["processes"] == 2
    assert environment["finished"]
    assert done.stdout.count("held-out response loss") == 1
