"""The report of `make test-gpu`: what this machine has, and what every check found on its GPU.

PYTHONPATH=tests python -m pytest -p gpu_report -m gpu

A check says its figures by pytest's `record_property`. Without a GPU the report is one line.
"""

import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from gpus import dotted, why_no_gpu

from finetuning.launch.software import software

OUTCOMES = ("passed", "failed", "skipped")


def pytest_configure(config: pytest.Config) -> None:
    if not torch.cuda.is_available():
        raise pytest.UsageError(
            f"there is no GPU that torch can use: {why_no_gpu()}; docs/gpu.md says which wheel of "
            "torch fits which driver"
        )


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.section("report: from here on, to send")
    for line in (*machine(), "", *checks(terminalreporter.stats)):
        terminalreporter.write_line(line)


def machine() -> Iterator[str]:
    """Lines on GPUs, driver and software."""
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        capability = dotted((gpu.major, gpu.minor))
        size = gpu.total_memory / 2**30
        yield f"GPU {number}: {gpu.name}, compute capability {capability}, {size:.1f} GiB"
    yield f"driver {driver()}, CUDA {torch.version.cuda} of torch"
    yield f"kernels of torch for {', '.join(torch.cuda.get_arch_list())}"
    yield ", ".join(f"{name} {version}" for name, version in software().items())


def driver() -> str:
    """The version of NVIDIA's driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown (there is no nvidia-smi)"
    return done.stdout.split("\n")[0]


def checks(stats: dict[str, list[Any]]) -> Iterator[str]:
    """A line a check, with its figures or the reason why it was skipped; the last counts them."""
    for outcome in OUTCOMES:
        for report in stats.get(outcome, []):
            if report.when == "call" or outcome != "passed":
                yield f"{outcome:8}{report.nodeid.removeprefix('tests/')}{found_by(report)}"
    errors = stats.get("error", [])
    yield from (f"error   {report.nodeid}" for report in errors)
    counts = {outcome: len(stats.get(outcome, [])) for outcome in OUTCOMES}
    counts["failed"] += len(errors)
    words = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    yield f"{words}, on {torch.cuda.get_device_name()}"


def found_by(report: Any) -> str:
    """Figures of a check that ran, the reason of one that did not."""
    if report.skipped:
        return f": {report.longrepr[2].removeprefix('Skipped: ')}"
    figures = [f"{name} {figure}" for name, figure in report.user_properties]
    return f": {', '.join(figures)}" if figures else ""
