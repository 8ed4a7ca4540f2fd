"""The budget of a run in the terminal: memory part by part, steps, time, disk, verdict."""

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from finetuning.budget.budget import Budget

EXPLAINED = {
    "weights": "of the base model",
    "adapters": "LoRA",
    "gradients": "of what is trained",
    "optimizer": "its averages",
    "activations": "kept for backward, or needed meanwhile",
    "logits": "of some response positions at a time",
    "communication": "between processes",
}
NOTHING_IS_ENOUGH = (
    "no one setting; more memory, or several GPUs with accelerate_configs/zero3.yaml"
)
VERDICTS = {"fits": "bold green", "tight": "bold yellow", "does not fit": "bold red"}


def budget_table(budget: "Budget") -> Table:
    table = Table("memory of a process", "MiB", "")
    table.columns[1].justify = "right"
    for part, size in budget.parts.items():
        if size:
            table.add_row(part, mib(size), EXPLAINED[part])
    table.add_section()
    table.add_row("total", mib(budget.total), f"of {mib(budget.available)} on {budget.device.name}")
    return table


def print_budget(console: Console, budget: "Budget", advice: list[str]) -> None:
    """Memory of a process part by part, steps, time, disk, and whether it fits."""
    console.print(budget_table(budget), soft_wrap=False)
    examples, slots, responses = budget.longest
    unit = "pairs" if budget.has_reference else "examples"
    lines = {
        "longest": f"{examples} {unit}, {slots:,} tokens computed, {responses:,} of them response",
        "steps": f"{budget.steps:,} of {budget.step} {unit} ({budget.strategy}), "
        f"{budget.tokens:,} tokens in all",
        "time": computing(budget),
        "disk": f"{mib(budget.disk)} MiB for checkpoints and weights, {mib(budget.free)} are free",
    }
    for name, text in lines.items():
        console.print(f"{name:<8} {text}")
    console.print(f"verdict  {budget.verdict}", style=VERDICTS[budget.verdict])
    if budget.verdict != "fits":
        found = ", or ".join(advice) or NOTHING_IS_ENOUGH
        console.print(f"         by this estimate enough: {found}")
    if budget.disk > budget.free:
        console.print(
            "         too little room on the disk: lower training.save_total_limit, or make room",
            style="red",
        )


def computing(budget: "Budget") -> str:
    if budget.seconds is None:
        return "not known for this GPU"
    shortest, longest = map(duration, budget.seconds)
    reference = "the reference included, " if budget.has_reference else ""
    return f"{shortest} to {longest} of computing, {reference}without start, evaluation and answers"


def mib(size: int) -> str:
    return f"{size / 2**20:,.1f}" if size < 10 * 2**20 else f"{size / 2**20:,.0f}"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"
