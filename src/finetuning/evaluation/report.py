"""report.html: one or more runs to look at, in one file that loads nothing."""

import difflib
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from markupsafe import Markup

from finetuning.evaluation.compared_run import Run
from finetuning.evaluation.comparison import cell, differing, name_of
from finetuning.evaluation.results import TRAINED
from finetuning.evaluation.table import ScoreRow, score_rows
from finetuning.files import write_text
from finetuning.html_page import render, text
from finetuning.runs.chart import COLOURS, Line, chart
from finetuning.runs.samples import known_samples

REPORT = "report.html"
TEMPLATE = Path(__file__).with_name("report.html")
MAX_ANSWERS = 100  # of a run, those with the worst scores
WORD = re.compile(r"[A-Za-z0-9]+|.", re.DOTALL)
# English and Japanese name, and the figures of metrics.jsonl that are drawn together.
CHARTS = (
    ("loss", "損失", ("loss", "eval_loss")),
    ("token accuracy", "トークンの正解率", ("mean_token_accuracy", "eval_mean_token_accuracy")),
    ("reward accuracy", "報酬の正解率", ("rewards/accuracies", "eval_rewards/accuracies")),
    ("reward margin", "報酬の差", ("rewards/margins", "eval_rewards/margins")),
    ("learning rate", "学習率", ("learning_rate",)),
    ("gradient norm", "勾配のノルム", ("grad_norm",)),
    ("tokens a second", "1 秒あたりのトークン数", ("tokens_per_second",)),
    ("memory (GiB)", "メモリ (GiB)", ("memory_gib",)),
)


@dataclass(frozen=True)
class Shown:
    """A run as the page shows it."""

    run: Run
    name: str
    colour: str

    @property
    def scores(self) -> list[ScoreRow]:
        return score_rows(self.run.evaluation)

    @cached_property
    def answers(self) -> list[dict[str, Any]]:
        """The worst of the trained model first."""
        shown = []
        for line in self.run.answers:
            with suppress(KeyError, TypeError, ValueError, AttributeError):  # a damaged line
                shown.append(
                    (float(line["answers"][TRAINED]["scores"]["chrf"]), answer_parts(line))
                )
        shown.sort(key=lambda pair: pair[0])
        return [parts for _, parts in shown[:MAX_ANSWERS]]

    @property
    def samples(self) -> list[Any]:
        return list(known_samples(self.run.path) or [])

    @property
    def launches(self) -> list[dict[str, Any]]:
        return list(self.run.environment.get("launches") or [])

    @property
    def rows(self) -> dict[str, Any]:
        """What became of the rows; nothing for a run of an earlier version."""
        return next((launch["rows"] for launch in self.launches if "rows" in launch), {})

    @property
    def overrides(self) -> list[str]:
        """Settings that differ from the recipe file: as they were given at the last start."""
        arguments = self.launches[-1].get("arguments", []) if self.launches else []
        return [each for each in arguments if re.match(r"[a-z_]+(\.\w+)*=", str(each))]

    def lines(self, figures: Sequence[str], is_alone: bool) -> list[Line]:
        kept = self.run.environment.get("kept_step")
        names = [figure if is_alone else f"{self.name} {figure}" for figure in figures]
        return [
            Line(name, *self.run.curve(figure), self.colour, figure.startswith("eval_"), kept)
            for name, figure in zip(names, figures, strict=True)
        ]


def answer_parts(line: Mapping[str, Any]) -> dict[str, Any]:
    """A question, and the answers with what is not in the reference marked."""
    messages, reference = line.get("messages") or [], str(line.get("reference", ""))
    answers = {
        model: {
            "text": marked(str(answer["text"]), reference),
            "chrf": f"{answer['scores']['chrf']:.0f}",
            "is_cut": not answer["ended"],
        }
        for model, answer in line["answers"].items()
        if "scores" in answer
    }
    return {"messages": messages, "reference": reference, "answers": answers, "row": line["row"]}


def marked(answer: str, reference: str) -> Markup:
    """The answer, with <mark> around words and characters that the reference has not there."""
    said, expected = WORD.findall(answer), WORD.findall(reference)
    parts = []
    matcher = difflib.SequenceMatcher(None, expected, said, autojunk=False)
    for kind, _, _, start, end in matcher.get_opcodes():
        if piece := text("".join(said[start:end])):
            parts.append(piece if kind == "equal" else Markup("<mark>{}</mark>").format(piece))
    return Markup("").join(parts)


def report(runs: Sequence[Run]) -> str:
    """The page of these runs, side by side."""
    every = list(runs)
    shown = [
        Shown(run, name_of(run, every), COLOURS[number % len(COLOURS)])
        for number, run in enumerate(every)
    ]
    is_alone = len(shown) == 1
    charts = [
        (english, japanese, chart([line for each in shown for line in each.lines(names, is_alone)]))
        for english, japanese, names in CHARTS
    ]
    return render(
        TEMPLATE,
        title=", ".join(each.name for each in shown),
        runs=shown,
        charts=[each for each in charts if each[2]],
        settings=[
            (name, [cell(run.settings.get(name)) for run in every]) for name in differing(every)
        ],
    )


def write_report(folder: Path) -> None:
    """report.html of a run folder."""
    write_text(folder / REPORT, report([Run(folder)]))
