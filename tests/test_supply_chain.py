"""What is installed: every version is pinned, the build's too, and every hash but torch's.

No known hole is allowed.
"""

import importlib.metadata
import re
import subprocess
import sys
import tomllib

import pytest
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


EXTRAS = PROJECT["project"]["optional-dependencies"]
LOCKS = ["base", *EXTRAS]
LOCKED = re.compile(
    r"^([\w.-]+)==([^\s;]+)(?: ; (.+?))?((?: \\\n    --hash=sha256:[0-9a-f]{64})+)$", re.M
)
# Of other systems than Linux, and what torch brings as each machine's build of it needs.
ELSEWHERE = re.compile("win32|emscripten|os_name == 'nt'")
WITH_TORCH = {"torch", "triton"}


def locked(name):
    """{package: (version, marker)} of a file of requirements/."""
    text = (ROOT / f"requirements/{name}.txt").read_text(encoding="utf-8")
    found = {match[1]: (match[2], match[3] or "") for match in LOCKED.finditer(text)}
    assert len(found) == len(re.findall("==", re.sub("(?m) ;.*", "", text))), "a line without hash"
    return found


@pytest.mark.parametrize("name", LOCKS)
def test_the_lock_has_the_pinned_versions(name):
    for package, (version, marker) in locked(name).items():
        assert PINS.get(package) == version or ELSEWHERE.search(marker), package
        assert not re.match("nvidia|cuda", package)


LEFT_OUT = {
    name
    for file in (ROOT / "requirements").glob("left_out*.txt")
    for name in re.findall(r"(?m)^[\w-]+$", file.read_text(encoding="utf-8"))
}


def needed(name, extras=(), seen=None):
    """Names of what an installed package requires here, itself included."""
    seen = set() if seen is None else seen
    name = canonicalize_name(name)
    if name in seen or name in WITH_TORCH | LEFT_OUT or name.startswith(("nvidia-", "cuda-")):
        return seen
    seen.add(name)
    for text in importlib.metadata.requires(name) or []:
        requirement = Requirement(text)
        environments = [{"extra": extra} for extra in extras or [""]]
        if not requirement.marker or any(map(requirement.marker.evaluate, environments)):
            needed(requirement.name, requirement.extras, seen)
    return seen


@pytest.mark.parametrize("name", ["base", "dev", "export", "wandb"])
def test_the_lock_has_all_that_is_needed(name):
    """make installs from it with --no-deps."""
    wanted = PROJECT["project"]["dependencies"] if name == "base" else EXTRAS[name]
    names = {other for text in wanted for other in needed(Requirement(text).name)}
    names |= needed("sympy") | needed("networkx") | needed("setuptools")  # of torch
    assert names <= {*locked("base"), *locked(name)}


def test_an_altered_package_is_not_installed(tmp_path):
    """pip compares each hash as make calls it; a wheel of our own stands for what an index has."""
    wheel = write_wheel(tmp_path / "wheels")
    lock = tmp_path / "lock.txt"
    lock.write_text(f"stand-in==1.0 --hash=sha256:{'0' * 64}\n")
    flags = re.search(r"(?m)^LOCKED := \$\(PIP\) (.+)$", MAKEFILE)[1].split()
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "--find-links", str(wheel.parent)]
    target = ["--target", str(tmp_path / "installed"), "--requirement", str(lock)]
    done = subprocess.run([*pip, *flags, *target], capture_output=True, text=True)
    assert done.returncode and "DO NOT MATCH THE HASHES" in done.stderr
    assert not (tmp_path / "installed").exists()


def write_wheel(folder):
    """A package without code, as an index has it."""
    import zipfile

    folder.mkdir()
    wheel, info = folder / "stand_in-1.0-py3-none-any.whl", "stand_in-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: stand-in\nVersion: 1.0\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def test_all_that_make_installs_is_locked_and_the_build_is_that_of_the_lock():
    installs = re.findall(r"(?m)^\t\$\((PIP|LOCKED)\) (.+)$", MAKEFILE)
    free = [words for kind, words in installs if kind == "PIP"]
    assert free == [
        "--constraint constraints.txt torch",
        "--no-deps --no-build-isolation --editable .",
        "--constraint constraints.txt pip-audit uv",  # what makes and audits the lock
    ]
    assert "setuptools" in locked("base")
    assert "pip install" not in re.sub(r"(?m)^PIP := .+$", "", MAKEFILE)
