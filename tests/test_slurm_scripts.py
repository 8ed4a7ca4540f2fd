"""The scripts in slurm/, read and linted; test_slurm.py runs them."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))
# What a cluster may not have, or has under another name: to be given on the command line.
NEVER = ("account", "partition", "qos", "constraint", "nodelist", "gres", "gpus", "mem", "time", "mail-user")


def directives(script: str) -> tuple[list[str], list[str]]:
    """(#SBATCH options that Slurm reads, lines that look like one but come after the first command)"""
    read, ignored = [], []
    has_begun = False
    for line in script.splitlines()[1:]:
        if re.match(r"\s*#\s*SBATCH\b", line):
            (ignored if has_begun or not line.startswith("#SBATCH ") else read).append(line.removeprefix("#SBATCH "))
        has_begun |= bool(line.strip()) and not line.lstrip().startswith("#")
    return read, ignored


def test_a_directive_after_the_first_command_is_noticed():
    script = "#!/bin/bash\n# why\n#SBATCH --nodes=1\n\n#SBATCH --requeue\nset -u\n#SBATCH --time=1\n# SBATCH --mem=1\n"
    assert directives(script) == (["--nodes=1", "--requeue"], ["--time=1", "# SBATCH --mem=1"])
    assert directives("#!/bin/bash\n # SBATCH --nodes=1\n")[1]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_slurm_reads_every_directive(script):
    read, ignored = directives(script.read_text())
    assert read and not ignored


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_directives_ask_for_nothing_that_a_cluster_may_not_have(script):
    names = [line.removeprefix("--").split("=")[0] for line in directives(script.read_text())[0]]
    assert not set(names) & set(NEVER) and {"requeue", "open-mode", "signal", "output"} <= set(names)


def test_a_task_of_an_array_asks_for_what_a_single_run_asks_for():
    single, array = ({*directives((ROOT / "slurm" / name).read_text())[0]} for name in ("sft.sh", "array.sh"))
    assert {line.split("=")[0] for line in single ^ array} == {"--job-name", "--output"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_folder_of_the_log_is_in_the_repository(script):
    (output,) = [line for line in directives(script.read_text())[0] if line.startswith("--output=")]
    folder = Path(output.removeprefix("--output=")).parent
    tracked = subprocess.run(["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert tracked, f"a job whose {folder}/ is missing fails without a word"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_and_shellcheck_find_nothing(script):
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)
    if not shutil.which("shellcheck"):
        missing = pytest.fail if os.environ.get("CI") else pytest.skip
        missing("shellcheck is not installed: apt-get install shellcheck")
    found = subprocess.run(["shellcheck", script], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


WRONG = {
    "nowhere": ("sft.sh", ["config.yaml", "recipe.yaml"], "no src/sft.py"),
    "nothing": ("sft.sh", [], "found: \n"),
    "no_config": ("sft.sh", ["accelerate_configs/zero9.yaml", "recipes/dolly_gpt2.yaml"], "zero9.yaml"),
    "not_submitted": ("sft.sh", ["accelerate_configs/cpu.yaml", "recipes/dolly_gpt2.yaml"], "sbatch slurm/sft.sh"),
    "check_nothing": ("sft.sh", ["--check", "--nodes=2", "--"], "found: \n"),
    "array_nothing": ("array.sh", ["accelerate_configs/cpu.yaml", "recipes/dolly_gpt2.yaml"], "a file of overrides"),
    "array_no_file": ("array.sh", ["accelerate_configs/cpu.yaml", "recipes/dolly_gpt2.yaml", "no.txt"], "no.txt"),
    "array_empty": ("array.sh", ["accelerate_configs/cpu.yaml", "recipes/dolly_gpt2.yaml", "EMPTY"], "no overrides"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_end_in_one_line(case, tmp_path):
    script, arguments, words = WRONG[case]
    (tmp_path / "empty.txt").write_text("# nothing\n\n")
    arguments = [argument.replace("EMPTY", str(tmp_path / "empty.txt")) for argument in arguments]
    folder = tmp_path if case == "nowhere" else ROOT
    done = subprocess.run([ROOT / "slurm" / script, *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 2
    assert words in done.stderr and done.stderr.count("\n") == 1 and done.stderr.startswith(f"slurm/{script}: ")
