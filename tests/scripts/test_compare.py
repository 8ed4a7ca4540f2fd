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


@pytest.fixture
def scored(sweep):
    """The sweep with scores in two of its runs."""
    for name, chrf in (("1", 40.0), ("2", 30.0)):
        scores = {
            score: {"mean": mean, "low": mean - 3, "high": mean + 4}
            for score, mean in (("exact_match", 10.0), ("chrf", chrf), ("repeated", chrf / 10))
        }
        found = {"questions": 9, "of": 9, "names": ["base", "trained"], "differences": {}}
        (sweep / name / "evaluation.json").write_text(
            json.dumps({**found, "scores": {"base": scores, "trained": scores}})
        )
    return sweep


def test_scores_stand_with_their_intervals_in_every_file(scored, capsys):
    compare.main([str(scored)])
    first = table(scored)[0]
    bounds = [float(first[name]) for name in ("chrf", "chrf low", "chrf high")]
    assert bounds == [30.0, 27.0, 34.0]
    assert list(first)[-9:-6] == ["exact_match", "exact_match low", "exact_match high"]
    found = json.loads((scored / "comparison.json").read_text())["runs"]
    assert [run["chrf"] for run in found] == [30.0, None, 40.0, None]
    assert "30.0 [27, 34]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("by", "order"),
    [
        ("chrf", ["1", "2", "11", "10"]),
        ("repeated", ["2", "1", "11", "10"]),
        ("training.learning_rate", ["1", "2", "11", "10"]),
        ("learning_rate", ["1", "2", "11", "10"]),
        ("evaluation loss", ["2", "11", "1", "10"]),
        ("run", ["1", "10", "11", "2"]),
    ],
)
def test_any_column_can_be_sorted_by(by, order, scored):
    compare.main([str(scored), "--by", by])
    assert [row["run"] for row in table(scored)] == order


def test_an_unknown_column_is_refused_by_name(sweep):
    with pytest.raises(UserError, match=r"no such column; there are run, .*; did you mean hours"):
        compare.main([str(sweep), "--by", "huors"])


def test_scores_can_be_read_in_80_columns(scored, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    compare.main([str(scored)])
    *lines, _ = capsys.readouterr().out.splitlines()
    printed = "\n".join(lines)
    assert max(map(len, lines)) <= 80 and "…" not in printed
    assert "30.0" in printed and "[27, 34]" in printed
    places = [printed.index(word) for word in ("2e-05", "10,000", "[27, 34]")]
    assert places == sorted(places)  # settings, figures, scores


def test_the_plot_has_the_intervals_of_scores(scored, monkeypatch):
    import matplotlib.axes

    bars = []
    monkeypatch.setattr(
        matplotlib.axes.Axes, "errorbar", lambda self, *args, **more: bars.append((args, more))
    )
    compare.main([str(scored)])
    (_, means), more = bars[0]
    assert means == [10.0, 40.0] and more["yerr"] == [[3.0, 3.0], [4.0, 4.0]]
    assert len(bars) == 4 and bars[3][0] == ([], [])


def test_seeds_have_the_mean_of_their_scores(scored):
    for name, seed in (("1", 1), ("2", 2)):
        recipe = scored / name / "recipe.yaml"
        text = (
            recipe.read_text()
            .replace("2e-5", "1e-5")
            .replace("max_steps", f"seed: {seed}, max_steps")
        )
        recipe.write_text(text)
    compare.main([str(scored / "1"), str(scored / "2")])
    (row,) = json.loads((scored / "comparison.json").read_text())["seeds"]
    assert (row["chrf"], row["chrf sd"]) == (35.0, pytest.approx(50**0.5))
