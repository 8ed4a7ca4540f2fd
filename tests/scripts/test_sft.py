"""The whole way, as a user goes it: recipe, run folder, answers."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from conftest import ROOT
from pages import listed_recipes
from run_folders import FAST, interrupted, losses_of, run_folder
from safetensors.torch import load_file
from torch.utils.data import DataLoader

import generate
import preview
import sft
from finetuning.errors import Stopped, UserError
from finetuning.inference.trained_model import load_asker
from finetuning.recipe.recipe import load_recipe
from finetuning.runs.samples import read_samples
from finetuning.training.signals import SIGNALS
from finetuning.training.trainer import ResponseTrainer

RECIPES = [ROOT / "recipes" / name for name in listed_recipes()]
# Rows of every format, for recipes whose data is not at hand.
ROWS = {
    "dolly": [
        {"instruction": f"What is {n}?", "context": "", "response": f"It is {n}."}
        for n in range(40)
    ],
    "alpaca": [
        {"instruction": f"{n} は何？", "input": "数\n字", "output": f"{n} です。"}
        for n in range(40)
    ],
    "sharegpt": [
        {
            "conversations": [
                {"from": who, "value": f"{who} {n}\n{turn}"}
                for turn in "ab"
                for who in ("human", "gpt")
            ]
        }
        for n in range(40)
    ],
    "text": [{"id": n, "title": f"{n}", "text": f"{n} は数である。\n" * n} for n in range(1, 40)],
    "preference": [
        {
            "prompt": f"What is {n}?",
            **{
                name: [
                    {"role": "user", "content": f"What is {n}?"},
                    {"role": "assistant", "content": f"{name} {n}"},
                ]
                for name in ("chosen", "rejected")
            },
        }
        for n in range(40)
    ],
    "hh_rlhf": [
        {
            name: f"\n\nHuman: What is {n}?\n\nAssistant: {name} {n}"
            for name in ("chosen", "rejected")
        }
        for n in range(40)
    ],
    "harry_potter": {
        f"Session-{n}": {
            "scene": f"Scene\n{n}.",
            "dialogue": [f"Mira: Is it {n}?", f"Harry: It is: {n}."],
        }
        for n in range(20)
    },
}


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def stand_in(recipe, folder: Path) -> list[str]:
    """Overrides: a tiny model and a few rows in the place of what the recipe takes from the Hub."""
    if recipe.model.from_scratch:
        return []
    kinds = {"bloom": "bloom", "llm-jp-3": "llama", "zephyr": "mistral"}
    kind = next((kind for name, kind in kinds.items() if name in recipe.model.name), "gpt2")
    tokenizer = tiny.byte_level()
    if recipe.data.template == "chat":
        tokenizer = tiny.chat_tokenizer("byte_level", "chatml")
    width = 64 if recipe.model.quantization else 32  # bitsandbytes rounds in blocks of 64
    tiny.model_of(kind, vocab_size=len(tokenizer), width=width).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = ROWS[recipe.data.reader]
    lines = [json.dumps(rows)] if isinstance(rows, dict) else [*map(json.dumps, rows)]
    suffix = "json" if isinstance(rows, dict) else "jsonl"
    held = recipe.data.eval.split if recipe.data.eval else None
    names = ["rows"] if held is None else [f"rows/{recipe.data.split}", f"rows/{held}"]
    (folder / "rows").mkdir()
    for name in names:
        (folder / f"{name}.{suffix}").write_text("\n".join(lines), encoding="utf-8")
    place = folder / ("rows" if held else f"rows.{suffix}")
    of_the_hub = [
        f"data.{name}=null" for name in ("revision", "config") if getattr(recipe.data, name)
    ]
    return [f"model.name={folder / 'model'}", f"data.path={place}", *of_the_hub]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_trains_on_a_small_stand_in(path, tmp_path):
    overrides = [*stand_in(load_recipe(path), tmp_path), "data.max_length=120"]
    folder = run_folder(tmp_path, *overrides, recipe=str(path))
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1]["step"] == 2
    assert load_recipe(folder / "recipe.yaml").data == load_recipe(path, overrides).data


def test_a_run_folder_explains_itself(tmp_path):
    folder = run_folder(tmp_path, "training.logging_steps=1")
    assert load_recipe(folder / "recipe.yaml").training.max_steps == 2
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["versions"]["torch"] and environment["data"] and environment["finished"]
    (launch,) = environment["launches"]
    assert launch["started"] <= environment["finished"] <= launch["ended"]
    assert (launch["strategy"], launch["processes"], launch["precision"]) == ("single", 1, "fp32")
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in logged if "loss" in entry] == [1, 2]
    assert [entry["step"] for entry in logged if "eval_loss" in entry] == [0, 2]
    samples = (folder / "samples.md").read_text(encoding="utf-8")
    assert "## 日本の首都はどこですか？" in samples and samples.count("After:") == 3
    assert (folder / "model.safetensors").exists() and (folder / "tokenizer.json").exists()


def test_a_mixture_of_experts_is_trained_and_asked(tmp_path):
    sizes = "hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4"
    experts = "num_key_value_heads: 2, num_local_experts: 4, max_position_embeddings: 128"
    config = f"model.from_scratch.config={{model_type: mixtral, {sizes}, {experts}}}"
    assert read_samples(run_folder(tmp_path, config))[0].after is not None


def test_the_folder_alone_answers_as_training_did(tmp_path, capsys):
    folder = run_folder(tmp_path, "training.max_steps=20", "training.learning_rate=1e-2")
    after = (
        (folder / "samples.md")
        .read_text(encoding="utf-8")
        .split("After:\n\n    ")[1]
        .splitlines()[0]
    )
    capsys.readouterr()
    generate.main([str(folder), "What is the capital of Japan?"])
    assert capsys.readouterr().out.strip() == after.strip()


def test_batched_answers_are_those_of_single_questions(tmp_path, capsys):
    folder = run_folder(tmp_path, "training.max_steps=20", "training.learning_rate=1e-2")
    questions = [
        "What is 2 + 3?",
        "日本の首都はどこですか？",
        "Name the opposite of hot, please, in one word.",
    ]
    capsys.readouterr()
    generate.main([str(folder), *questions])
    together = capsys.readouterr().out
    for question in questions:
        generate.main([str(folder), question])
    assert capsys.readouterr().out == together


@pytest.mark.usefixtures("warm_python")
def test_questions_come_from_standard_input_too(tmp_path, run_script):
    folder = run_folder(tmp_path)
    done = run_script(
        "generate.py",
        folder,
        "-",
        "generation.max_new_tokens=2",
        stdin="What is 1 + 1?\n\nAnd 2?\n",
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 2
    none = run_script("generate.py", folder)
    assert none.returncode == 2 and none.stderr.startswith("error: no question")


def test_lora_leaves_the_base_alone_and_saves_a_small_adapter(tmp_path, capsys):
    tokenizer = tiny.byte_level()
    tiny.model_of("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    before = load_file(tmp_path / "model" / "model.safetensors")
    overrides = [
        "model.from_scratch=null",
        f"model.name={tmp_path / 'model'}",
        "training.max_steps=10",
    ]
    lora = ["lora={r: 4, target_modules: [q_proj, v_proj]}", "training.learning_rate=1e-2"]
    folder = run_folder(tmp_path, *overrides, *lora)
    after = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    adapter = load_file(folder / "adapter_model.safetensors")
    assert adapter and all("lora_" in name for name in adapter)
    assert not (folder / "model.safetensors").exists()
    capsys.readouterr()
    generate.main([str(folder), "What is 2 + 3?"])
    assert capsys.readouterr().out


def test_an_adapter_on_a_base_from_scratch_finds_its_base_again(tmp_path, capsys):
    lora = [
        "lora={r: 4, target_modules: [c_attn, c_fc]}",
        "training.max_steps=40",
        "training.learning_rate=5e-2",
    ]
    folder = run_folder(tmp_path, *lora, "generation.max_new_tokens=8")
    after = (
        (folder / "samples.md")
        .read_text(encoding="utf-8")
        .split("After:\n\n    ")[1]
        .splitlines()[0]
    )
    capsys.readouterr()
    generate.main([str(folder), "What is the capital of Japan?"])
    assert capsys.readouterr().out.splitlines()[0].strip() == after.strip()


@pytest.mark.parametrize("command", [sft.main, preview.main], ids=["sft", "preview"])
def test_a_folder_with_brackets_in_its_name_is_named_whole(tmp_path, capsys, command):
    check = ["--check"] if command is sft.main else []
    command([*check, "recipes/quickstart.yaml", f"training.output_dir={tmp_path / 'gpt2[lora]'}"])
    assert "gpt2[lora]" in capsys.readouterr().out.replace("\n", "")


def test_the_same_command_resumes_from_the_last_checkpoint(tmp_path):
    """Stopped in an epoch and resumed, a run ends with the same weights, bit for bit."""
    steps = [
        "training.save_total_limit=null",
        "training.max_steps=50",
        "training.save_strategy=steps",
        "training.save_steps=20",
        "training.logging_steps=1",
        "generation.prompts=[]",
    ]
    whole = run_folder(tmp_path / "whole", *steps)
    folder = run_folder(tmp_path / "stopped", *steps)
    interrupted(folder, "checkpoint-50", "model.safetensors", "metrics.jsonl")
    assert sorted(path.name for path in folder.glob("checkpoint-*"))[-1] == "checkpoint-40"
    again = run_folder(tmp_path / "stopped", *steps)
    assert losses_of(again) == losses_of(whole) and len(losses_of(again)) == 50
    assert len(json.loads((again / "environment.json").read_text())["launches"]) == 2
    first, second = (load_file(path / "model.safetensors") for path in (whole, again))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def evaluated():
    """A function: evaluations find these losses by step, and those of step `stop` get a signal."""
    loop, predict = ResponseTrainer.evaluation_loop, ResponseTrainer.prediction_step

    def pretend(losses: dict[int, float], stop: int | None = None) -> None:
        def found(trainer, *args, **kwargs):
            output = loop(trainer, *args, **kwargs)
            output.metrics["eval_loss"] = losses.get(trainer.state.global_step, 9.0)
            return output

        def predicted(trainer, *args, **kwargs):
            if trainer.state.global_step == stop:
                os.kill(os.getpid(), signal.SIGUSR1)
            return predict(trainer, *args, **kwargs)

        patch.setattr(ResponseTrainer, "evaluation_loop", found)
        patch.setattr(ResponseTrainer, "prediction_step", predicted)

    with pytest.MonkeyPatch.context() as patch:
        yield pretend


BEST = [
    "training.load_best_model_at_end=true",
    "training.eval_strategy=steps",
    "training.eval_steps=4",
]


@pytest.mark.parametrize(
    ("strategy", "losses", "best", "stop"),
    [
        ("steps", {4: 6.0, 8: 5.0, 12: 3.0}, 12, 12),
        ("steps", {4: 6.0, 8: 3.0, 12: 5.0}, 8, 8),
        ("best", {4: 6.0, 8: 3.0, 12: 5.0}, 8, 8),
    ],
)
def test_the_best_weights_are_kept_also_where_their_evaluation_was_cut_short(
    tmp_path, evaluated, strategy, losses, best, stop
):
    steps = ["training.save_steps=4", "training.max_steps=14", "training.save_total_limit=1", *BEST]
    command = [*steps, f"training.save_strategy={strategy}"]
    evaluated(losses)
    whole = run_folder(tmp_path / "whole", *command)
    evaluated(losses, stop=stop)
    with pytest.raises(Stopped):
        run_folder(tmp_path / "stopped", *command)
    assert f"checkpoint-{stop}" in [path.name for path in (tmp_path / "stopped" / "run").iterdir()]
    evaluated(losses)
    again = run_folder(tmp_path / "stopped", *command)
    saved = load_file(again / f"checkpoint-{best}" / "model.safetensors")
    for folder in (whole, again):
        weights = load_file(folder / "model.safetensors")
        assert all(torch.equal(weights[name], saved[name]) for name in saved)
    assert losses_of(again, "eval_loss") == losses_of(whole, "eval_loss")
    assert losses_of(again, "train_loss") == losses_of(whole, "train_loss")


def test_the_loss_that_is_told_is_that_of_the_weights_that_are_saved(tmp_path, capsys):
    steps = ["training.save_strategy=steps", "training.save_steps=4", "training.max_steps=8"]
    folder = run_folder(
        tmp_path, *steps, *BEST, "training.greater_is_better=true"
    )  # the worst one, to have it earlier
    (_, begin), (_, first), (_, second), (step, told) = losses_of(folder, "eval_loss")
    assert second < first < begin and step == 8 and told == pytest.approx(first)
    assert f"-> {first:.3f}" in capsys.readouterr().out


def test_an_evaluation_after_training_is_cut_short_where_nothing_is_lost(tmp_path, evaluated):
    steps = ["training.max_steps=4", "training.save_strategy=steps", "training.save_steps=4"]
    evaluated({}, stop=4)
    with pytest.raises(
        Stopped, match="stopped by SIGUSR1 after step 4 of 4; the same command resumes"
    ):
        run_folder(tmp_path, *steps)
    evaluated({4: 2.0})
    assert losses_of(run_folder(tmp_path, *steps), "eval_loss") == [(0, 9.0), (4, 2.0)]


def test_an_evaluation_after_training_without_a_checkpoint_is_not_cut_short(tmp_path, evaluated):
    evaluated({2: 2.0}, stop=2)
    folder = run_folder(tmp_path)
    assert (
        losses_of(folder, "eval_loss") == [(0, 9.0), (2, 2.0)]
        and (folder / "model.safetensors").exists()
    )


def test_a_finished_run_takes_over_where_it_is_to_be_published(tmp_path):
    folder = run_folder(tmp_path)
    before = load_recipe(folder / "recipe.yaml")
    run_folder(tmp_path, "publish={repo: you/models, subfolder: chapter05/sft_model}")
    after = load_recipe(folder / "recipe.yaml")
    assert before.publish is None and after.publish.repo == "you/models"
    assert after.model_copy(update={"publish": None}) == before


def test_signals_wait_while_processes_that_load_batches_are_born(tmp_path, monkeypatch):
    held_back, iterate = [], DataLoader.__iter__

    def watched(loader):
        held_back.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        return iterate(loader)

    monkeypatch.setattr(DataLoader, "__iter__", watched)
    steps = [
        "training.max_steps=3",
        "training.save_strategy=steps",
        "training.save_steps=2",
        "training.eval_strategy=epoch",
    ]
    folder = run_folder(tmp_path, *steps, "training.save_total_limit=null")
    interrupted(folder, "checkpoint-3")
    begun = len(held_back)
    run_folder(tmp_path, *steps, "training.save_total_limit=null")
    assert 0 < begun < len(held_back) and all(set(SIGNALS) <= waiting for waiting in held_back)
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())


@pytest.mark.parametrize("damage", ["truncated", "emptied", "a bit flipped"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(tmp_path, capsys, damage):
    steps = [
        "training.max_steps=12",
        "training.save_strategy=steps",
        "training.save_steps=4",
        "training.save_total_limit=null",
        "training.logging_steps=1",
    ]
    folder = run_folder(tmp_path, *steps)
    weights, losses = (folder / "model.safetensors").read_bytes(), losses_of(folder)
    interrupted(folder)
    file = folder / "checkpoint-12" / "optimizer.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(
        {"truncated": content[:-100], "emptied": b"", "a bit flipped": content}[damage]
    )
    run_folder(tmp_path, *steps)
    said = capsys.readouterr().err
    assert f"{folder / 'checkpoint-12'} is not used: optimizer.pt" in said
    assert f"resuming from {folder / 'checkpoint-8'}" in said
    assert (folder / "model.safetensors").read_bytes() == weights and losses_of(folder) == losses
    assert (folder / "checkpoint-12" / "optimizer.pt").stat().st_size == len(content)


def test_a_folder_of_another_recipe_is_refused_and_a_finished_one_left_alone(tmp_path, capsys):
    folder = run_folder(tmp_path)
    with pytest.raises(UserError, match=r"training\.learning_rate was 0\.002, is 0\.5"):
        run_folder(tmp_path, "training.learning_rate=0.5")
    written = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}
    run_folder(tmp_path)
    assert "is finished" in capsys.readouterr().out
    assert {
        path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"
    } == written


def test_a_check_trains_nothing_and_a_misspelt_key_imports_no_torch(tmp_path, run_script, run_warm):
    command = [
        "sft.py",
        "--check",
        "recipes/quickstart.yaml",
        f"training.output_dir={tmp_path / 'run'}",
    ]
    done = run_warm(*command)
    assert done.returncode == 0, done.stderr
    assert "589 kept" in done.stdout and "nothing was trained" in done.stdout
    assert not (tmp_path / "run" / "recipe.yaml").exists()
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    misspelt = run_script(*command, "data.pat=x", PYTHONPATH=str(tmp_path))
    assert "did you mean data.path" in misspelt.stderr


@pytest.mark.usefixtures("warm_python")
@pytest.mark.parametrize("logger", ["tensorboard", "wandb"])
def test_loggers_get_scalars_and_answers(tmp_path, logger):
    overrides = [
        "training.report_to=none",
        *FAST,
        "training.logging_steps=1",
        f"training.report_to={logger}",
    ]
    command = ["recipes/quickstart.yaml", f"training.output_dir={tmp_path / 'run'}", *overrides]
    done = subprocess.run(
        [sys.executable, "src/sft.py", *command], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    if logger == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(next((tmp_path / "run" / "runs").iterdir())))
        events.Reload()
        assert (
            "train/loss" in events.Tags()["scalars"]
            and "eval/perplexity" in events.Tags()["scalars"]
        )
        assert events.Tags()["tensors"]
        assert "eval/chrf" in events.Tags()["scalars"]
    else:
        assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))


def test_preview_and_training_see_the_same_examples(tmp_path):
    preview.main(["recipes/quickstart.yaml", f"training.output_dir={tmp_path}"])
    written = [
        json.loads(line)
        for line in (tmp_path / "preview" / "examples.jsonl").read_text().splitlines()
    ]
    report = json.loads((tmp_path / "preview" / "report.json").read_text())
    assert report["rows"] == {"loaded": 589, "where": 589, "kept": 589, "train": 531, "eval": 58}
    assert [line["row"] for line in written] == list(range(589))
    held_out = [line["row"] for line in written if line["split"] == "eval"]
    assert held_out == [n for n in range(0, 589, 10) if n != 570]  # whose answer is trained
    assert sum(len(line["input_ids"]) for line in written) == report["tokens"]["total"]
    assert (
        sum(token != -100 for line in written for token in line["labels"])
        == report["tokens"]["response"]
    )
    assert report["end_mark_share"] == 1.0 and report["dropped"] == {}
    assert (tmp_path / "preview" / "token_lengths.png").read_bytes().startswith(b"\x89PNG")


def test_quickstart_learns_to_answer(tmp_path):
    """The embedded default, shortened: it knows what it was trained on, and most of the rest."""
    folder = run_folder(
        tmp_path,
        "training.max_steps=600",
        "training.lr_scheduler_type=linear",
        "generation.max_new_tokens=16",
    )
    text = Path("recipes/data/quickstart.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    trained = [row for number, row in enumerate(rows) if number % 10][::9]
    ask = load_asker(folder, load_recipe(folder / "recipe.yaml"))
    answers = ask([row["prompt"] for row in trained])
    right = sum(a == row["response"] for a, row in zip(answers, trained, strict=True))
    assert right >= 0.9 * len(trained)
    (_, before), *_, (_, after) = losses_of(folder, "eval_loss")
    assert after < 1.0 < 6.0 < before


def test_a_batch_log_is_plain_lines_of_at_most_80_columns(tmp_path, run_script):
    settings = [f"training.output_dir={tmp_path / 'run'}", "training.max_steps=2"]
    settings += ["training.logging_steps=1", "generation.max_new_tokens=2"]
    done = run_script("sft.py", "recipes/quickstart.yaml", *settings, COLUMNS="80")
    assert (done.returncode, done.stderr) == (0, "")
    printed = done.stdout.replace(str(tmp_path), "")
    assert "1 process x 1 micro-batch x 16 = 16 examples" in printed
    steps = [line.split()[0] for line in printed.splitlines() if "/2 " in line]
    assert steps == ["0/2", "1/2", "2/2", "2/2"]  # with an evaluation before and after
    assert max(map(len, printed.splitlines())) <= 80
    assert "\r" not in printed and "{" not in printed
