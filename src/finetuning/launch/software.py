"""Versions of the software on this node, and whether all nodes have the same."""

import importlib.metadata
import importlib.util
import platform
import subprocess
from functools import cache
from pathlib import Path

from finetuning.errors import UserError
from finetuning.launch.strategy import Strategy


def software() -> dict[str, str | None]:
    """Versions of what decides a result on this node: Python, the libraries, and our own code as a
    git revision."""
    return {"python": platform.python_version(), **versions(), "this code": git_revision()}


def require_same_software(nodes: list[tuple[str, dict[str, str | None]]]) -> None:
    """Raises UserError where a version is not the same in all of (host, software)."""
    for name in dict.fromkeys(name for _, found in nodes for name in found):
        hosts: dict[str | None, list[str]] = {}
        for host, found in nodes:
            hosts.setdefault(found.get(name), []).append(host)
        if len(hosts) > 1:
            parts = ", ".join(
                f"{version or 'none'} on {shown(names)}" for version, names in hosts.items()
            )
            raise UserError(
                f"the nodes do not have the same software: {name} is {parts}; install the same "
                "everywhere"
            )


def require_deepspeed(strategy: Strategy) -> None:
    """Raises UserError where the accelerate config asks for ZeRO and DeepSpeed is not installed."""
    if strategy.name.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            f"the accelerate config asks for {strategy.name}, and DeepSpeed is not installed: "
            "pip install -c constraints.txt -e '.[deepspeed]'; without it: "
            "accelerate_configs/fsdp2.yaml"
        )


def shown(hosts: list[str]) -> str:
    """The first three, and how many more there are."""
    names = list(dict.fromkeys(hosts))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "tokenizers",
    "deepspeed",
    "bitsandbytes",
)


def versions() -> dict[str, str]:
    """Of the packages that decide how a run goes, as far as they are installed."""
    return {name: version for name in PACKAGES if (version := installed(name))}


@cache
def installed(package: str) -> str | None:
    """Its version. Finding it takes 1 ms, and a run asks 36 times."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_revision() -> str | None:
    """The commit of this code, with `-dirty` where files differ from it; None outside a git
    checkout."""
    command = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
    ]
    try:
        return (
            subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
            or None
        )
    except (OSError, subprocess.CalledProcessError):
        return None
