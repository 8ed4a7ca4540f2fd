"""The losses of several runs in one plot, and their scores beside."""

from pathlib import Path
from typing import Any

from finetuning.evaluation.compared_run import Run
from finetuning.evaluation.comparison import cell, differing, name_of, scores_of, short
from finetuning.evaluation.scores import BETTER_IF_HIGHER, SCORES
from finetuning.runs.plots import label, pyplot


def label_of(run: Run, runs: list[Run]) -> str:
    """The run's name and what sets it apart."""
    settings = [f"{short(name)}={cell(run.settings.get(name))}" for name in differing(runs)]
    return ", ".join([name_of(run, runs), *settings])


def plot_runs(runs: list[Run], file: Path) -> None:
    """Training loss and evaluation loss over the steps, a line for each run, and their scores."""
    plt = pyplot()
    scores = [name for name in scores_of(runs) if name in BETTER_IF_HIGHER]
    count = 3 if scores else 2
    size = (5.5 * count, 4.5 + 0.12 * len(runs))
    figure, panels = plt.subplots(1, count, figsize=size, layout="constrained")
    curves = (("loss", "training loss"), ("eval_loss", "evaluation loss"))
    colours = [plt.get_cmap("viridis")(0.9 * n / max(1, len(runs) - 1)) for n in range(len(runs))]
    for panel, (name, loss) in zip(panels, curves, strict=False):
        for run, colour in zip(runs, colours, strict=True):
            panel.plot(*run.curve(name), color=colour, marker=".", label=label_of(run, runs))
        panel.set_xlabel(label("step"))
        panel.set_ylabel(label(loss))
    if scores:
        plot_scores(panels[2], runs, scores, colours)
    legend = figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2
    )
    for text in legend.get_texts():
        text.set_parse_math(False)  # a $ in a setting is not the beginning of a formula
    figure.savefig(file, dpi=120)
    plt.close(figure)


def plot_scores(panel: Any, runs: list[Run], names: list[str], colours: list[Any]) -> None:
    """The mean of each score with its interval, the runs beside each other."""
    for number, (run, colour) in enumerate(zip(runs, colours, strict=True)):
        shift = 0.7 * ((number + 0.5) / len(runs) - 0.5)
        known = [(n, run.scores[name]) for n, name in enumerate(names) if name in run.scores]
        places = [place + shift for place, _ in known]
        means = [score["mean"] for _, score in known]
        # A mean may lie outside its percentile interval by rounding.
        below = [max(0, score["mean"] - score["low"]) for _, score in known]
        above = [max(0, score["high"] - score["mean"]) for _, score in known]
        panel.errorbar(places, means, yerr=[below, above], color=colour, fmt="o", capsize=3)
    panel.set_xticks(range(len(names)), [SCORES[name] for name in names])
    panel.set_ylabel(label("percent"))
