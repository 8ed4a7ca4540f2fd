"""The scripts in slurm/, read and linted; test_slurm.py runs them."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

from finetuning.training_script import script_of

SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))
# What a cluster may not have, or has under another name: to be given on the command line.
NEVER = (
    "account",
    "partition",
    "qos",
    "constraint",
    "nodelist",
    "gres",
    "gpus",
    "mem",
    "time",
    "mail-user",
)


def directives(script: str) -> tuple[list[str], list[str]]:
    """(#SBATCH options that Slurm reads, lines like one that come after the first command)"""
    read, ignored = [], []
    has_begun = False
    for line in script.splitlines()[1:]:
        if re.match(r"\s*#\s*SBATCH\b", line):
            (ignored if has_begun or not line.startswith("#SBATCH ") else read).append(
                line.removeprefix("#SBATCH ")
            )
        has_begun |= bool(line.strip()) and not line.lstrip().startswith("#")
    return read, ignored


def test_a_directive_after_the_first_command_is_noticed():
    script = (
        "#!/bin/bash\n# why\n#SBATCH --nodes=1\n\n#SBATCH --requeue\nset -u\n"
        "#SBATCH --time=1\n# SBATCH --mem=1\n"
    )
    assert directives(script) == (["--nodes=1", "--requeue"], ["--time=1", "# SBATCH --mem=1"])
    assert directives("#!/bin/bash\n # SBATCH --nodes=1\n")[1]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_slurm_reads_every_directive(script):
    read, ignored = directives(script.read_text())
    assert read and not ignored


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_directives_ask_for_nothing_that_a_cluster_may_not_have(script):
    names = [line.removeprefix("--").split("=")[0] for line in directives(script.read_text())[0]]
    assert not set(names) & set(NEVER) and {"requeue", "open-mode", "signal", "output"} <= set(
        names
    )


def test_a_task_of_an_array_asks_for_what_a_single_run_asks_for():
    single, array = (
        {*directives((ROOT / "slurm" / name).read_text())[0]} for name in ("sft.sh", "array.sh")
    )
    assert {line.split("=")[0] for line in single ^ array} == {"--job-name", "--output"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_folder_of_the_log_is_in_the_repository(script):
    (output,) = [line for line in directives(script.read_text())[0] if line.startswith("--output=")]
    folder = Path(output.removeprefix("--output=")).parent
    tracked = subprocess.run(
        ["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
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
    "no_config": (
        "sft.sh",
        ["accelerate_configs/zero9.yaml", "recipes/dolly_gpt2.yaml"],
        "zero9.yaml",
    ),
    "not_submitted": (
        "sft.sh",
        ["accelerate_configs/cpu.yaml", "recipes/dolly_gpt2.yaml"],
        "sbatch slurm/sft.sh",
    ),
    "check_nothing": ("sft.sh", ["--check", "--nodes=2", "--"], "found: \n"),
    "array_nothing": (
        "array.sh",
        ["accelerate_configs/cpu.yaml", "recipes/dolly_gpt2.yaml"],
        "a file of overrides",
    ),
    "array_no_file": (
        "array.sh",
        ["accelerate_configs/cpu.yaml", "recipes/dolly_gpt2.yaml", "no.txt"],
        "no.txt",
    ),
    "array_quote": (
        "array.sh",
        ["accelerate_configs/cpu.yaml", "recipes/dolly_gpt2.yaml", "QUOTE"],
        "unmatched",
    ),
    "array_empty": (
        "array.sh",
        ["accelerate_configs/cpu.yaml", "recipes/dolly_gpt2.yaml", "EMPTY"],
        "no overrides",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_end_in_one_line(case, tmp_path):
    script, arguments, words = WRONG[case]
    (tmp_path / "empty.txt").write_text("# nothing\n\n")
    (tmp_path / "quote.txt").write_text("training.seed=1\ntraining.run_name=it's training.seed=3\n")
    files = {"EMPTY": str(tmp_path / "empty.txt"), "QUOTE": str(tmp_path / "quote.txt")}
    arguments = [files.get(argument, argument) for argument in arguments]
    folder = tmp_path if case == "nowhere" else ROOT
    done = subprocess.run(
        [ROOT / "slurm" / script, *arguments], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert (
        words in done.stderr
        and done.stderr.count("\n") == 1
        and done.stderr.startswith(f"slurm/{script}: ")
    )


def test_a_check_finds_that_there_is_no_folder_for_the_log(tmp_path):
    """Slurm opens it before the script runs, and says nothing where it cannot."""
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "sft.py").touch()
    (tmp_path / "cpu.yaml").touch()
    command = [ROOT / "slurm" / "sft.sh", "--check", "cpu.yaml", "recipe.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.endswith("where Slurm opens the log: mkdir logs\n")


def called(script: str, *arguments: str, folder: Path, **environment: str) -> list[list[str]]:
    """The words of every command of Slurm that the script gives, written down instead of run."""
    programs = folder / "bin"
    programs.mkdir()
    for name in ("sbatch", "srun", "scancel", "scontrol", "squeue"):
        (programs / name).write_text(
            f'#!/bin/bash\nprintf "%s\\n" {name} "$@" "" >>{folder}/called\necho 7\n'
        )
        (programs / name).chmod(0o755)
    variables = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", **environment}
    subprocess.run(
        [ROOT / "slurm" / script, *arguments],
        cwd=ROOT,
        env=variables,
        check=True,
        capture_output=True,
    )
    return [words.splitlines() for words in (folder / "called").read_text().split("\n\n") if words]


@pytest.mark.parametrize("place", ["rates.txt", "./rates", "sweeps.d/rates"])
def test_a_sweep_is_named_after_its_file_and_its_table_goes_to_the_same_account(place, tmp_path):
    (tmp_path / "sweeps.d").mkdir()
    (tmp_path / place).write_text("training.seed=1\n")
    options = ["-A", "me", "-pgpu", "--qos", "long", "--partition=a", "--gres=gpu:1", "--time", "9"]
    command = [
        *options,
        "--",
        "accelerate_configs/cpu.yaml",
        "recipes/dolly_gpt2.yaml",
        str(tmp_path / place),
    ]
    array, table = called("array.sh", *command, folder=tmp_path)
    assert array[:4] == ["sbatch", "--parsable", "--array=1-1", "-A"]
    assert table[-1].endswith("python src/compare.py outputs/rates")
    assert [word for word in table if word in (*options, "9")] == options[:-3]


def test_a_task_of_an_array_without_a_line_is_refused(tmp_path):
    (tmp_path / "rates.txt").write_text("training.seed=1\n")
    command = [
        ROOT / "slurm/array.sh",
        "accelerate_configs/cpu.yaml",
        "recipes/dolly_gpt2.yaml",
        tmp_path / "rates.txt",
    ]
    environment = {**os.environ, "SLURM_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "--array goes from 1 to 1" in done.stderr


@pytest.mark.parametrize(
    ("options", "processes"),
    [
        ("", 1),
        ("--nodes=2 --gres=gpu:8", 16),
        ("-N2 --gres gpu:h100:4", 8),
        ("-N 3 --ntasks-per-node 2 --mem=0", 6),
        ("--gpus-per-node=h100:2 --nodes 2-4", 4),
        ("--gres=gpu --nodes=2", 2),
    ],
)
def test_processes_of_a_job_are_counted_from_its_options(options, processes):
    command = [ROOT / "slurm" / "count_processes", *options.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == (f"{processes}\n", "")


@pytest.mark.parametrize(
    ("words", "script"),
    [
        (["recipes/quickstart_dpo.yaml", "--verbose"], "src/dpo.py"),
        (["recipes/quickstart.yaml"], "src/sft.py"),
        (["recipes/quickstart.yaml", "data.reader=preference"], "src/dpo.py"),
        (["recipes/missing.yaml"], "src/sft.py"),
        (["recipes/quickstart.yaml", "--nothing"], "src/sft.py"),
    ],
)
def test_a_job_launches_the_script_that_trains_its_recipe(words, script):
    assert script_of([str(ROOT / words[0]), *words[1:]]) == script


HOSTILE = [
    "$(touch MARK)",
    "`touch MARK`",
    "'a;touch MARK'",
    "'a|touch MARK'",
    "'a&&touch MARK'",
    "*",
]


def test_nothing_in_a_sweep_is_run_by_the_shell(tmp_path):
    """A stranger's file of overrides: its name and its lines are words, as they stand."""
    mark = ROOT / "mark-of-a-stranger"
    words = [word.replace("MARK", mark.name) for word in HOSTILE]
    sweep = tmp_path / f"x $(touch {mark.name});`touch {mark.name}`.txt"
    lines = [f'training.run_name="{word}"' if " " in word else word for word in words]
    sweep.write_text("\n".join(f"training.run_name={line}" for line in lines) + "\n")
    arguments = ["accelerate_configs/cpu.yaml", "recipes/dolly_gpt2.yaml", str(sweep), *words]
    array, table = called("array.sh", f"--comment={words[0]}", "--", *arguments, folder=tmp_path)
    assert array[-len(arguments) :] == arguments and f"--comment={words[0]}" in array
    programs = tmp_path / "bin"
    (programs / "python").write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" >{tmp_path}/compared\n')
    (programs / "python").chmod(0o755)
    variables = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    wrap = table[-1].removeprefix("--wrap ").replace("$PWD/.venv/bin:", "")
    subprocess.run(["sh", "-c", wrap], cwd=ROOT, env=variables, check=True)
    assert (tmp_path / "compared").read_text() == f"src/compare.py\noutputs/{sweep.stem}\n"
    for number in range(1, len(words) + 1):
        task = {**variables, "SLURM_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": str(number)}
        task |= {"SLURM_JOB_NUM_NODES": "1", "SLURM_SUBMIT_DIR": str(ROOT)}
        subprocess.run(
            [ROOT / "slurm/array.sh", *arguments], cwd=ROOT, env=task, capture_output=True
        )
    assert not mark.exists()
