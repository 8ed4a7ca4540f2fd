"""The answers to the evaluation set, before and after training, through src/sft.py."""

import json
import shutil

import pytest
from run_folders import interrupted, run_folder

import sft
from finetuning.evaluation.asking import ask
from finetuning.evaluation.results import known_answers
from finetuning.evaluation.turns import draw, turns_of
from finetuning.inference.trained_model import load_asker
from finetuning.runs.folder import RunFolder

MANY = "evaluation.questions=20"
LONGER = ("training.max_steps=6", "training.save_strategy=steps", "training.save_steps=6")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run."""
    return run_folder(tmp_path_factory.mktemp("answers"), MANY, *LONGER)


def again(run):
    """The same command once more."""
    sft.main([str(run / "recipe.yaml"), f"training.output_dir={run}"])


def test_base_and_trained_answer_the_same_questions(run):
    folder = RunFolder(run)
    assert len(folder.answers) == 20
    assert all(line["answers"].keys() == {"base", "trained"} for line in folder.answers)
    assert folder.evaluation["names"] == ["base", "trained"]
    assert folder.evaluation["questions"] == 20 and folder.evaluation["of"] == 58
    said = [line["answers"] for line in folder.answers]
    assert any(each["base"]["text"] != each["trained"]["text"] for each in said)


def test_the_trained_answers_are_those_of_the_run_folder(run):
    folder = RunFolder(run)
    turns = draw(turns_of(folder.recipe.data, [line["row"] for line in folder.answers]), "all")
    asked = ask(load_asker(run, folder.recipe), turns)
    assert asked == known_answers(folder.answers, "trained")
    assert asked != known_answers(folder.answers, "base")


def test_the_questions_are_rows_that_were_not_trained_on(run):
    rows = [line["row"] for line in RunFolder(run).answers]
    assert all(row % 10 == 0 for row in rows)  # data.eval: {every: 10}


def test_the_losses_are_those_that_were_logged(run):
    folder = RunFolder(run)
    logged = folder.curve("eval_loss")[1]
    losses = folder.evaluation["losses"]
    assert losses["base"]["eval_loss"] == logged[0]
    assert losses["trained"]["eval_loss"] == logged[-1]


def test_the_scores_are_logged_like_other_figures(run):
    folder = RunFolder(run)
    scores = folder.evaluation["scores"]["trained"]
    assert folder.last("eval_char_f1") == scores["char_f1"]["mean"]
    assert folder.curve("eval_char_f1")[0] == [6]


def test_the_last_screen_shows_both_with_intervals(run, tmp_path, capsys):
    other = shutil.copytree(run, tmp_path / "run")
    interrupted(other)
    capsys.readouterr()
    again(other)
    screen = capsys.readouterr().out
    assert "20 answers" in screen and "exact match" in screen and "bootstrap" in screen
    assert RunFolder(other).answers == RunFolder(run).answers


@pytest.mark.parametrize("damage", ["", '{"row": 0, "turn": 1, "answers": 5}\n[1]\n'])
def test_a_run_that_an_earlier_version_began_scores_the_trained_model(run, tmp_path, damage):
    other = shutil.copytree(run, tmp_path / "run")
    interrupted(other, "answers.jsonl", "evaluation.json")
    if damage:
        (other / "answers.jsonl").write_text(damage, encoding="utf-8")
    again(other)
    evaluation = RunFolder(other).evaluation
    assert evaluation["names"] == ["trained"] and evaluation["differences"] == {}
    assert evaluation["scores"]["trained"] == RunFolder(run).evaluation["scores"]["trained"]


def test_without_questions_nothing_is_written(tmp_path):
    run = run_folder(tmp_path, "evaluation.questions=0")
    assert not (run / "answers.jsonl").exists() and not (run / "evaluation.json").exists()
    assert RunFolder(run).evaluation is None and RunFolder(run).answers == []


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 1}', "\0"])
def test_a_damaged_evaluation_is_none(tmp_path, content):
    (tmp_path / "evaluation.json").write_text(content)
    assert RunFolder(tmp_path).evaluation is None


def test_labels_get_accuracy_and_a_confusion_table(tmp_path):
    rows = tmp_path / "rows.jsonl"
    lines = [{"prompt": f"Is {n} even?", "response": "yes" if n % 2 else "no"} for n in range(60)]
    rows.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    run = run_folder(tmp_path, MANY, f"data.path={rows}", "data.eval={every: 3}")
    labels = RunFolder(run).evaluation["labels"]
    assert labels["labels"] == ["no", "yes"] and labels["answers"][:2] == ["no", "yes"]
    for model, table in labels["confusion"].items():
        assert sum(map(sum, table)) == 20
        exact = RunFolder(run).evaluation["scores"][model]["exact_match"]["mean"]
        assert labels["accuracy"][model] == exact
