"""The nodes of a run: whether all have the same software."""

import platform

from finetuning.errors import UserError
from finetuning.run_folder import git_revision, versions


def software() -> dict[str, str | None]:
    """Versions of what decides a result on this node: Python, the libraries, and our own code as a git revision."""
    return {"python": platform.python_version(), **versions(), "this code": git_revision()}


def require_same_software(nodes: list[tuple[str, dict[str, str | None]]]) -> None:
    """Raises UserError where a version is not the same in all of (host, software)."""
    for name in dict.fromkeys(name for _, found in nodes for name in found):
        hosts: dict[str | None, list[str]] = {}
        for host, found in nodes:
            hosts.setdefault(found.get(name), []).append(host)
        if len(hosts) > 1:
            parts = ", ".join(f"{version or 'none'} on {shown(names)}" for version, names in hosts.items())
            raise UserError(f"the nodes do not have the same software: {name} is {parts}; install the same everywhere")


def shown(hosts: list[str]) -> str:
    """The first three, and how many more there are."""
    names = list(dict.fromkeys(hosts))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
