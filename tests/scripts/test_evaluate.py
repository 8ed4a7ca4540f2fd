"""src/evaluate.py: models side by side on the same questions, resumed, shared out, gated."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from hub_server import REPO
from run_folders import ROWS, S, copied, error_of, files_below

import evaluate
import publish
from finetuning.evaluation import models
from finetuning.runs.folder import RunFolder


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A file of 40 questions that are not the recipe's evaluation set."""
    file = tmp_path_factory.mktemp("rows") / "faq.jsonl"
    file.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    return file


@pytest.fixture
def arguments(runs, rows, tmp_path):
    """Of the LoRA run beside its base, on 24 of the rows."""
    data = ["--data", str(rows), "--reader", "prompt_response", "--questions", "24"]
    return [str(runs["lora"]), *data, "--output", str(tmp_path / "out")]


def test_a_run_is_compared_with_its_base(arguments, tmp_path, capsys, runs):
    evaluate.main(arguments)
    found = RunFolder(tmp_path / "out")
    base, trained = found.evaluation["names"]
    assert base.startswith("base model") and trained == str(runs["lora"])
    assert found.evaluation["questions"] == 24 and found.evaluation["of"] == 40
    assert found.evaluation["differences"].keys() == {trained}
    assert len(found.answers) == 24
    difference = found.evaluation["differences"][trained]["chrf"]["mean"]
    means = [found.evaluation["scores"][name]["chrf"]["mean"] for name in (base, trained)]
    assert difference == pytest.approx(means[1] - means[0]) and difference != 0
    printed = capsys.readouterr().out
    assert "24 answers" in printed and "What is" in printed and "difference" in printed


def test_the_evaluation_set_is_asked_where_no_rows_are_given(runs, tmp_path):
    output = tmp_path / "out"
    evaluate.main([str(runs["full"]), str(runs["sharded"]), "--output", str(output)])
    found = RunFolder(output)
    assert found.evaluation["names"] == [str(runs["full"]), str(runs["sharded"])]
    assert [line["row"] for line in found.answers] == [0, 10, 20, 30]  # eval: {every: 10}


def test_killed_at_five_instants_it_leaves_the_same_files(arguments, tmp_path, monkeypatch):
    evaluate.main(arguments)
    whole = files_below(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    plain_keeper = models.keeper

    def killing_keeper(unfinished, model):
        keep = plain_keeper(unfinished, model)

        def keep_and_die(answers):
            keep(answers)
            with unfinished.file.open("a", encoding="utf-8") as stream:
                stream.write('{"model": "half a li')
            raise KeyboardInterrupt

        return keep_and_die

    for _ in range(5):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(models, "keeper", killing_keeper)
            evaluate.main(arguments)
        assert files_below(tmp_path / "out").keys() == {"unfinished.jsonl"}
    evaluate.main(arguments)
    assert files_below(tmp_path / "out") == whole


def test_what_is_done_is_only_printed_again(arguments, tmp_path, monkeypatch, capsys):
    evaluate.main(arguments)
    first = capsys.readouterr().out
    monkeypatch.setattr(models, "columns_of", None)
    evaluate.main(arguments)
    assert capsys.readouterr().out == first


def test_other_questions_do_not_overwrite_an_evaluation(arguments, call, tmp_path):
    evaluate.main(arguments)
    before = files_below(tmp_path / "out")
    line = error_of(call(evaluate, *arguments, "generation.max_new_tokens=3"))
    assert "choose another folder with --output" in line
    assert files_below(tmp_path / "out") == before


def test_a_score_below_its_bound_is_an_error(arguments, call):
    assert call(evaluate, *arguments, "--at-least", "length=0.1").code == 0
    done = call(evaluate, *arguments, "--at-least", "exact_match=100.5")
    assert done.code == 2 and "exact_match is" in error_of(done)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["--at-least", "chfr=3"], "no score chfr; there are"),
        (["--at-least", "chrf=high"], "expected a number"),
        (["--questions", "some"], "expected a number from 1 on, or all"),
        (["--data", "rows.jsonl"], "--data and --reader go together"),
        (["--data", "rows.jsonl", "--reader", "none"], "--data, --reader: "),
        (["--data", "none.jsonl", "--reader", "alpaca"], "none.jsonl"),
        (["training.max_steps=3"], "training.max_steps=3"),
    ],
)
def test_a_mistake_is_one_line(changes, says, call, runs):
    assert says in error_of(call(evaluate, str(runs["full"]), *changes))


def test_a_checkpoint_is_evaluated_beside_its_run(runs, rows, tmp_path):
    run, output = runs["lora"], tmp_path / "out"
    data = ["--data", str(rows), "--reader", "prompt_response", "--questions", "3"]
    checkpoint = str(next(run.glob("checkpoint-*")))
    evaluate.main([checkpoint, str(run), *data, "--output", str(output)])
    assert RunFolder(output).evaluation["names"] == [checkpoint, str(run)]


def test_a_pulled_model_and_an_8_bit_base_answer_as_the_run_folder(
    runs, rows, tmp_path, hub, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    publish.main([str(copied(runs["full"], tmp_path / "run")), "--unasked"])
    data = ["--data", str(rows), "--reader", "prompt_response", "--questions", "9"]
    pulled = f"hub:{REPO}/{S}"
    evaluate.main([str(runs["full"]), pulled, *data, "--output", "pulled"])
    first, *others = RunFolder(tmp_path / "pulled").evaluation["names"]
    assert others == [pulled]
    for line in RunFolder(tmp_path / "pulled").answers:
        assert line["answers"][first] == line["answers"][pulled]

    lora = [str(runs["lora"]), "--no-base", *data]
    evaluate.main([*lora, "--output", "whole"])
    evaluate.main([*lora, "model.quantization=8bit", "--output", "in_8_bit"])
    chrf = [
        RunFolder(tmp_path / name).evaluation["scores"][str(runs["lora"])]["chrf"]["mean"]
        for name in ("whole", "in_8_bit")
    ]
    assert chrf[0] > 0 and chrf[1] == pytest.approx(chrf[0], rel=0.5)


@pytest.mark.cluster
@pytest.mark.usefixtures("warm_python")
def test_two_processes_write_the_files_of_one(arguments, tmp_path):
    evaluate.main(arguments)
    whole = files_below(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command += ["accelerate_configs/cpu_ddp.yaml", "src/evaluate.py", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert files_below(tmp_path / "out") == whole
