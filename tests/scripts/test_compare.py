"""Run folders side by side: what differs, what came of it, the best first."""

import csv
import json
from pathlib import Path

import pytest

import compare
from finetuning.errors import UserError

RECIPE = """\
model: {{name: gpt2}}
data: {{path: rows.jsonl, reader: prompt_response, template: question_answer}}
training: {{output_dir: '{folder}', learning_rate: {rate}, max_steps: 20}}
"""


def make_run(folder: Path, rate: str, losses: list[float], finished: bool = True) -> Path:
    """A run folder with evaluation losses at steps 0, 10, ..., and twice those in training."""
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder, rate=rate))
    (folder / "environment.json").write_text(
        json.dumps({"finished": "2026-01-01" if finished else None})
    )
    lines = [
        {"step": 10 * n, "eval_loss": loss, "eval_mean_token_accuracy": 0.5}
        for n, loss in enumerate(losses)
    ]
    lines += [
        {"step": 10 * n, "loss": 2 * loss, "tokens_per_second": 1e4}
        for n, loss in enumerate(losses)
        if n
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def sweep(tmp_path) -> Path:
    make_run(tmp_path / "1", "1e-5", [5.0, 4.0, 3.0])
    make_run(tmp_path / "2", "2e-5", [5.0, 3.0, 1.0])
    make_run(tmp_path / "10", "1e-3", [5.0, float("nan")])
    make_run(tmp_path / "11", "5e-5", [5.0, 2.0], finished=False)
    return tmp_path


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "comparison.csv").open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def test_the_best_run_comes_first_and_one_without_a_number_last(sweep):
    compare.main([str(sweep)])
    assert [row["run"] for row in table(sweep)] == ["2", "11", "1", "10"]


def test_the_table_has_what_differs_and_what_came_of_it(sweep, capsys):
    compare.main([str(sweep)])
    assert table(sweep)[0] == {
        "run": "2",
        "training.learning_rate": "2e-05",
        "train loss": "2.0",
        "evaluation loss": "1.0",
        "evaluation accuracy": "0.5",
        "tokens/s": "10000.0",
        "hours": "",
        "GPU hours": "",
        "state": "finished",
    }
    assert table(sweep)[1]["state"] == "step 10"
    printed = capsys.readouterr().out
    assert "learning_rate" in printed and "2e-05" in printed and "max_steps" not in printed
    assert (sweep / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_runs_that_differ_in_their_seed_only_have_a_mean_and_a_spread(sweep, capsys):
    for name, rate, seed, loss in (("a", "1e-5", 1, 3.5), ("b", "1e-5", 2, 4.5), ("c", "9", 3, 1)):
        recipe = make_run(sweep / "seeds" / name, rate, [5.0, loss]) / "recipe.yaml"
        recipe.write_text(recipe.read_text().replace("max_steps", f"seed: {seed}, max_steps"))
    compare.main([str(sweep / "seeds")])
    assert "evaluation loss" in (printed := capsys.readouterr().out) and "4 ± 0.7071" in printed
    found = json.loads((sweep / "seeds/comparison.json").read_text())
    assert [run["evaluation loss"] for run in found["runs"]] == [1.0, 3.5, 4.5]
    (row,) = found["seeds"]
    assert (row["seeds"], row["training.learning_rate"], row["evaluation loss"]) == (2, 1e-5, 4.0)
    assert row["evaluation loss sd"] == pytest.approx(0.5**0.5)
    assert "2,1e-05," in (sweep / "seeds/comparison_seeds.csv").read_text()


def test_the_table_has_the_hours_of_all_launches_and_those_of_gpus(sweep):
    launches = [
        {"started": "2026-01-01T00:00:00+00:00", "ended": "2026-01-01T01:00:00+00:00"},
        {"started": "2026-01-01T02:00:00+00:00"},  # killed
        {"started": "2026-01-01T04:00:00+00:00", "ended": "2026-01-01T04:30:00+00:00"},
    ]
    launches = [{**launch, "device": "cuda:0", "processes": 4} for launch in launches]
    launches[2]["device"] = "cpu"
    (sweep / "2/environment.json").write_text(json.dumps({"finished": None, "launches": launches}))
    old = {"started": "2026-01-01T00:00:00+00:00", "device": "cpu", "processes": 1}
    ended = {"finished": "2026-01-01T00:15:00+00:00", "launches": [old]}  # before ends were noted
    (sweep / "1/environment.json").write_text(json.dumps(ended))
    compare.main([str(sweep)])
    hours = {row["run"]: (row["hours"], row["GPU hours"]) for row in table(sweep)}
    assert hours["2"] == ("1.5", "4.0") and hours["1"] == ("0.25", "0.0")


def test_brackets_and_colons_are_letters_like_others(sweep, capsys):
    for name, newline in (("a[red]", "[/nl]"), ("b:x:", "[nl]")):
        recipe = make_run(sweep / "more" / name, "1e-5", [0.5]) / "recipe.yaml"
        recipe.write_text(
            recipe.read_text().replace("question_answer", f'question_answer, newline: "{newline}"')
        )
    compare.main([str(sweep / "more")])
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("a[red]", "b:x:", "[/nl]", "[nl]"))


def test_runs_can_be_named_one_by_one(sweep):
    other = make_run(sweep / "more" / "long", "1e-5", [0.5])
    compare.main([str(sweep / "1"), str(other)])
    assert [(row["run"], row["evaluation loss"]) for row in table(sweep)] == [
        ("more/long", "0.5"),
        ("1", "3.0"),
    ]


def test_a_run_that_has_just_begun_is_shown(sweep):
    (sweep / "2" / "metrics.jsonl").write_text('{"step": 10, "eval_lo')
    (sweep / "1" / "metrics.jsonl").unlink()
    compare.main([str(sweep)])
    assert [(row["run"], row["evaluation loss"]) for row in table(sweep)][1:3] == [
        ("1", ""),
        ("2", ""),
    ]


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds none"):
        compare.main([str(tmp_path)])


def test_a_folder_that_cannot_be_written_is_named(sweep):
    (sweep / "comparison.csv").mkdir()
    with pytest.raises(UserError, match=f"{sweep}: the comparison cannot be written"):
        compare.main([str(sweep)])


def test_a_table_that_is_too_wide_becomes_two_without_broken_words(sweep, monkeypatch, capsys):
    settings = "warmup_steps: 0.1, weight_decay: 0.01, lr_scheduler_type: cosine, "
    for run in ("1", "2"):
        recipe = sweep / run / "recipe.yaml"
        recipe.write_text(recipe.read_text().replace("max_steps", f"{settings}max_steps"))
    monkeypatch.setenv("COLUMNS", "80")
    compare.main([str(sweep)])
    *lines, _ = capsys.readouterr().out.splitlines()  # the last names the folder
    assert max(map(len, lines)) <= 80
    printed = "\n".join(lines)
    assert printed.count("run") >= 2 and "…" not in printed
    for word in ("scheduler_", "learning_", "2e-05", "cosine", "accuracy", "tokens/s", "finished"):
        assert word in printed, word
    assert printed.index("learning_") < printed.index("accuracy")


def test_no_cell_of_the_csv_is_a_formula(sweep):
    recipe = sweep / "1" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("rows.jsonl", "'=HYPERLINK(1)'"))
    compare.main([str(sweep)])
    cells = [cell for row in table(sweep) for cell in row.values()]
    assert "'=HYPERLINK(1)" in cells
    assert not [cell for cell in cells if cell.startswith(("=", "+", "@"))]
