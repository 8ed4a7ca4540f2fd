"""Small finished runs of every kind, trained once in a session."""

import importlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import ROOT
from hub_server import REPO, HubServer, speak_to
from tiny import write_base
from transformers import AutoModelForCausalLM

import dpo
import publish
import sft
from finetuning.recipe.recipe import load_recipe

# Before sft.main, which hides it from what peft imports for a run without quantization.
importlib.import_module("bitsandbytes")

FAST = (
    "training.max_steps=2",
    "generation.max_new_tokens=4",
    "training.save_strategy=no",
    "training.eval_strategy=no",
)
QUICKSTART = ROOT / "recipes/quickstart.yaml"
BASE, S = "elith/tiny-base", "chapter05/sft_model"
ROWS = [{"prompt": f"What is {n} + 1?", "response": f"It is {n + 1}."} for n in range(40)]
LORA = "lora={r: 4, lora_alpha: 32, target_modules: [q_proj, v_proj]}"
SETTINGS = [
    "training.max_steps=30",
    "training.learning_rate=1e-2",
    "training.logging_steps=10",
    "training.save_strategy=steps",
    "training.save_steps=15",
    "training.report_to=none",
    "training.eval_strategy=no",
    "generation.max_new_tokens=12",
    "generation.prompts=[What is 3 + 1?, 日本の首都はどこですか？]",
    "publish={repo: elith/llm-book-models, subfolder: chapter05/sft_model}",
]


def train(folder: Path, base: Path | str, *overrides: str) -> Path:
    """The run folder of a short run on the base, started as a user starts it."""
    rows = folder.parent / "rows.jsonl"
    rows.parent.mkdir(parents=True, exist_ok=True)
    rows.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    model = ["model.from_scratch=null", f"model.name={base}"]
    sft.main(
        [
            str(QUICKSTART),
            f"training.output_dir={folder}",
            f"data.path={rows}",
            *model,
            *SETTINGS,
            *overrides,
        ]
    )
    return folder


def run_folder(tmp_path, *overrides: str, recipe: str | Path = QUICKSTART) -> Path:
    """The run folder tmp_path/run of a recipe, two steps short unless told."""
    script = dpo if load_recipe(recipe).data.is_preference else sft
    script.main(
        [
            str(recipe),
            f"training.output_dir={tmp_path / 'run'}",
            "training.report_to=none",
            *FAST,
            *overrides,
        ]
    )
    return tmp_path / "run"


def losses_of(folder: Path, name: str = "loss") -> list[tuple[int, float]]:
    """(step, loss) as logged."""
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(entry["step"], entry[name]) for entry in logged if name in entry]


def interrupted(folder: Path, *lost: str) -> None:
    """A finished run becomes one that was stopped before it had written these files or folders."""
    for name in lost:
        subprocess.run(["rm", "-rf", str(folder / name)], check=True)
    environment = json.loads((folder / "environment.json").read_text())
    (folder / "environment.json").write_text(json.dumps({**environment, "finished": None}))


def make_runs(root: Path) -> dict[str, Path]:
    """{kind: run folder}: full (tied weights, GPT-2), sharded (untied, Llama) and lora (Llama)."""
    gpt2, llama = write_base(root / "gpt2", "gpt2"), write_base(root / "llama", "llama")
    runs = {
        "full": train(root / "full" / "run", gpt2),
        "sharded": train(root / "sharded" / "run", llama),
        "lora": train(root / "lora" / "run", llama, LORA),
    }
    model = AutoModelForCausalLM.from_pretrained(runs["sharded"])
    os.remove(runs["sharded"] / "model.safetensors")
    os.remove(runs["sharded"] / "sealed.json")  # as before run folders were sealed
    model.save_pretrained(runs["sharded"], max_shard_size="60KB")
    return runs


def copied(run: Path, target: Path) -> Path:
    """A run folder that a test may spoil."""
    return Path(shutil.copytree(run, target))


def files_below(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def retrained(run: Path, **changes: str) -> Path:
    """The run folder with other settings in its recipe, as if it had been trained with them."""
    overrides = [f"{name.replace('__', '.')}={value}" for name, value in changes.items()]
    (run / "recipe.yaml").write_text(
        load_recipe(run / "recipe.yaml", overrides).as_yaml(), encoding="utf-8"
    )
    return run


class Crowd(NamedTuple):
    hub: Path
    """folder of a HubServer with a checkpoint of a run in S and another in chapter06/other"""
    run: Path
    """the same run, with one evaluation more"""
    tree: dict[str, str]
    """HubServer.tree when that is published"""


def make_crowd(runs: dict[str, Path], root: Path) -> Crowd:
    old, new = (copied(runs["full"], root / name / "run") for name in ("old", "new"))
    with (new / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 30, "eval_loss": 2.5}\n')
    with HubServer(root / "hub") as server, pytest.MonkeyPatch.context() as patch:
        server.create(REPO)
        speak_to(server, root / "home", patch)
        publish.main([str(old), "--unasked"])
        publish.main([str(old), "--unasked", "publish.subfolder=chapter06/other"])
        shutil.copytree(root / "hub", root / "before")
        publish.main([str(new), "--unasked"])
        return Crowd(root / "before", new, server.tree(REPO))


def error_of(done: Any) -> str:
    """The one line that a failed command of the fixture `call` ends with."""
    assert done.code in (1, 2), done
    assert "Traceback" not in done.err + done.out
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and done.err.splitlines()[-1] == errors[0]
    return errors[0]
