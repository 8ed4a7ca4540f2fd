"""src/generate.py: questions from everywhere, answers in order, checkpoints too."""

import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import generate
from finetuning.errors import UserError

QUESTION = "What is 3 + 1?"


@pytest.fixture
def ask(capsys):
    """A function that asks in this process: arguments -> what is printed."""

    def ask(*arguments: object) -> str:
        capsys.readouterr()
        generate.main([*map(str, arguments)])
        return capsys.readouterr().out

    return ask


@pytest.mark.usefixtures("warm_python")
def test_files_standard_input_and_arguments_are_asked_alike(runs, ask, tmp_path, run_script):
    (tmp_path / "q.txt").write_bytes(f"\ufeff{QUESTION}\r\n\r\nWhat is 4 + 1?\r\n".encode())
    rows = [{"prompt": QUESTION, "id": 7}, {"messages": [{"role": "user", "content": "Hi"}]}]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    typed = ask(runs["full"], QUESTION, "What is 4 + 1?")
    assert ask(runs["full"], tmp_path / "q.txt") == typed
    asked = run_script("generate.py", runs["full"], "-", stdin=f"{QUESTION}\nWhat is 4 + 1?\n")
    assert (asked.stdout, asked.stderr) == (typed, "")
    answers = [
        json.loads(line) for line in ask(runs["full"], tmp_path / "q.jsonl", "--json").splitlines()
    ]
    assert [{k: v for k, v in row.items() if k != "answer"} for row in answers] == rows
    assert answers[0]["answer"] == typed.splitlines()[0]


def test_answers_go_to_a_file(runs, ask, tmp_path):
    said = ask(runs["full"], QUESTION, "--output", tmp_path / "a.jsonl")
    assert said == f"written to {tmp_path / 'a.jsonl'}: 1 answers\n"
    row = json.loads((tmp_path / "a.jsonl").read_text())
    assert row == {"prompt": QUESTION, "answer": ask(runs["full"], QUESTION).removesuffix("\n")}


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_checkpoint_of_an_unfinished_run_is_asked(kind, runs, ask, tmp_path):
    run = Path(shutil.copytree(runs[kind], tmp_path / "run"))
    whole = ask(run, QUESTION)
    for file in [*run.glob("*.safetensors"), *run.glob("adapter_config.json")]:
        file.unlink()
    with pytest.raises(UserError, match="is missing"):
        ask(run, QUESTION)
    assert ask(run, QUESTION, "--checkpoint", "last") == whole
    assert ask(run / "checkpoint-30", QUESTION) == ask(run, QUESTION, "--checkpoint", "30") == whole


def test_a_checkpoint_that_is_not_there_or_damaged_is_named(runs, ask, tmp_path):
    run = Path(shutil.copytree(runs["full"], tmp_path / "run"))
    with pytest.raises(UserError, match="has no checkpoint-7; there are: checkpoint-30"):
        ask(run, QUESTION, "--checkpoint", "7")
    (run / "checkpoint-30" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"checkpoint-30 is not used: config\.json has 2 bytes"):
        ask(run / "checkpoint-30", QUESTION)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--json"], "--json and --output are for questions that are given"),
        (["none.jsonl"], "none.jsonl: cannot be read: No such file"),
        ([" "], "a question is empty"),
        (["Hi", "--output", "/none/a.jsonl"], "/none: no such folder"),
        (["training.max_steps=1"], "only generation.* and model.quantization may change"),
    ],
)
def test_what_cannot_be_asked_is_told_before_a_model_is_loaded(runs, arguments, what, monkeypatch):
    monkeypatch.setattr("finetuning.inference.trained_model.load_asker", pytest.fail)
    with pytest.raises(UserError) as error:
        generate.main([str(runs["full"]), *arguments])
    assert what in str(error.value)


@pytest.mark.usefixtures("warm_python")
def test_without_a_question_it_is_a_conversation_at_a_terminal(runs, ask):
    """Through a pseudo-terminal, as a person types."""
    terminal, child = pty.openpty()
    script = subprocess.Popen(
        [sys.executable, "src/generate.py", str(runs["full"])],
        cwd=ROOT,
        stdin=child,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    os.close(child)
    os.write(terminal, f"{QUESTION}\n/new\n{QUESTION}\n/quit\n".encode())
    said, _ = script.communicate(timeout=120)
    os.close(terminal)
    answer = ask(runs["full"], QUESTION).removesuffix("\n")
    assert script.returncode == 0 and said.count(answer) == 2
