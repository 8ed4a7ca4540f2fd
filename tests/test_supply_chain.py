"""What is installed: every version is pinned, the build's too, and no known hole is allowed."""

import re
import tomllib

from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PINS = {
    canonicalize_name(name): version
    for name, version in re.findall(
        r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M
    )
}
# The last version with a known hole, by advisory.
HOLES = {
    "jinja2": "3.1.5",  # CVE-2025-27516: out of the sandbox that chat templates run in
    "filelock": "3.20.2",  # CVE-2026-22701
}


def requirements():
    groups = PROJECT["project"].get("optional-dependencies", {}).values()
    lists = [PROJECT["project"]["dependencies"], *groups, PROJECT["build-system"]["requires"]]
    return [Requirement(text) for group in lists for text in group]


def test_every_requirement_is_pinned_and_its_pin_is_allowed():
    for requirement in requirements():
        pin = PINS.get(canonicalize_name(requirement.name))
        assert pin, f"{requirement.name} is not in constraints.txt"
        assert requirement.specifier.contains(pin, prereleases=True), requirement


def test_no_lower_bound_allows_a_known_hole():
    bounds = {canonicalize_name(each.name): each.specifier for each in requirements()}
    assert not [name for name, version in HOLES.items() if bounds[name].contains(version)]


def test_the_build_is_pinned_too():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "export PIP_CONSTRAINT" in makefile and "export PIP_BUILD_CONSTRAINT" in makefile
    assert "setuptools" in PINS
