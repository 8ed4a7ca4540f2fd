"""`make test-gpu`: one line without a GPU, and a report of every check with one."""

from types import SimpleNamespace

import gpus
import pytest
import torch

pytest_plugins = ["pytester"]

CHECKS = """
import pytest

def test_that_passes(record_property):
    record_property("loss", "1.25")

def test_that_fails():
    assert False

@pytest.mark.skip(reason="needs 2 GPUs, there is 1")
def test_that_is_skipped():
    pass
"""
T4 = SimpleNamespace(name="Tesla T4", major=7, minor=5, total_memory=15 * 2**30)


@pytest.fixture
def a_t4(monkeypatch):
    """torch.cuda as it is where there is a T4."""
    said = {
        "is_available": True,
        "device_count": 1,
        "get_device_properties": T4,
        "get_device_name": T4.name,
        "get_device_capability": (7, 5),
        "get_arch_list": ["sm_75", "sm_80"],
    }
    for name, value in said.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)


def reported(pytester, *arguments: str) -> list[str]:
    """The lines of the report on CHECKS."""
    pytester.makepyfile(CHECKS)
    lines = pytester.runpytest_inprocess("-p", "gpu_report", *arguments).outlines
    start = next(number for number, line in enumerate(lines) if "report: from here on" in line)
    return lines[start + 1 :]


def test_the_report_has_the_machine_and_every_check_with_its_figure(pytester, a_t4):
    lines = reported(pytester)
    assert lines[0] == "GPU 0: Tesla T4, compute capability 7.5, 15.0 GiB"
    assert "kernels of torch for sm_75, sm_80" in lines
    assert any(
        line.startswith("python 3") and f"torch {torch.__version__}" in line for line in lines
    )
    file = "test_the_report_has_the_machine_and_every_check_with_its_figure.py"
    assert f"passed  {file}::test_that_passes: loss 1.25" in lines
    assert f"failed  {file}::test_that_fails" in lines
    assert f"skipped {file}::test_that_is_skipped: needs 2 GPUs, there is 1" in lines
    assert "1 passed, 1 failed, 1 skipped, on Tesla T4" in lines


def test_without_a_gpu_there_is_one_line(pytester):
    done = pytester.runpytest_inprocess("-p", "gpu_report")
    assert done.ret == pytest.ExitCode.USAGE_ERROR and not done.outlines
    (line,) = filter(None, done.errlines)
    assert line.startswith("ERROR: there is no GPU that torch can use: ")
    assert line.endswith("; docs/gpu.md says which wheel of torch fits which driver")


@pytest.mark.parametrize(
    ("needs", "reason"),
    [
        ({}, None),
        ({"capability": (7, 5)}, None),
        ({"count": 2}, "needs 2 GPUs, there is 1"),
        ({"capability": (8, 0)}, "needs compute capability 8.0, this GPU has 7.5"),
    ],
)
def test_a_check_that_the_gpu_cannot_have_is_skipped_with_the_reason(needs, reason, a_t4):
    assert gpus.lacking(**needs) == reason


def test_no_test_finds_a_gpu_but_those_of_make_test_gpu():
    assert gpus.lacking() == "no GPU that torch can use is shown to this test: make test-gpu"
