"""slurm/sft.sh and slurm/array.sh on a real Slurm: nodes, limits, preemption, sweeps, chains.

Most of the time goes into starting Python. So each story (a function from a cluster to a job) is
begun before the first test, some of them at once; a test asks what came of it.
"""

import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT
from safetensors.torch import load_file
from slurm_cluster import missing, running_cluster, wait_for
from slurm_site import SAVED_EVERY, SECONDS, STEPS, Job, Site, has_pending, make_site

from finetuning.recipe.recipe import load_recipe

pytestmark = pytest.mark.cluster

AT_ONCE = 3  # stories; each starts several Pythons
# Makes the recipe one of preferences.
OF_PAIRS = ("data.path=pairs.jsonl", "data.reader=preference", "training.max_steps=20")
LARGE = (
    "-- accelerate_configs/ddp.yaml recipe.yaml training.output_dir=outputs/large "
    "training.global_batch_size=null"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Iterator[Site]:
    if reason := missing():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    with running_cluster() as cluster:
        yield make_site(cluster, tmp_path_factory.mktemp("slurm"))


class Stories(dict):
    """{story: its future}; one that is asked for begins."""

    def __init__(self, site: Site) -> None:
        self.site, self.threads = site, ThreadPoolExecutor(AT_ONCE)

    def __missing__(self, story):
        self[story] = self.threads.submit(story, self.site)
        return self[story]


@pytest.fixture(scope="module")
def begun(request, site) -> Iterator[Stories]:
    stories = Stories(site)
    for item in request.session.items:
        if (
            item.path == Path(__file__)
            and hasattr(item, "callspec")
            and "job" in item.callspec.params
        ):
            stories[item.callspec.params["job"]]
    yield stories
    stories.threads.shutdown(
        wait=False, cancel_futures=True
    )  # what still waits for a job ends with the cluster


@pytest.fixture
def job(request, begun):
    """What the story returned that the test is about."""
    return begun[request.param].result()


def about(story):
    return pytest.mark.parametrize("job", [story], indirect=True, ids=lambda story: story.__name__)


def assert_same_training(job: Job, other: Job) -> None:
    """The same final weights and logged losses, bit for bit."""
    weights = [run.run / "model.safetensors" for run in (job, other)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    for figure in ("loss", "eval_loss", "grad_norm"):
        assert job.logged(figure) == other.logged(figure)
    assert [step for step, _ in job.logged("loss")] == list(range(10, STEPS + 1, 10))


# One node and many


def one_process(site):
    return site.train("one", "--nodes=1").end()


def two_nodes(site):
    return site.train("two", "--nodes=2", config="cpu_ddp").end()


def two_nodes_of_two(site):
    return site.train("four", "--nodes=2", "--ntasks-per-node=2", config="cpu_ddp").end()


@about(one_process)
def test_one_node_trains(job):
    assert job.facts["JobState"] == "COMPLETED" and job.facts["Restarts"] == "0"
    assert (job.run / "model.safetensors").exists()
    assert job.log.splitlines()[-1] == "slurm/sft.sh: finished"


@pytest.mark.parametrize(
    ("job", "processes"),
    [(two_nodes, 2), (two_nodes_of_two, 4)],
    indirect=["job"],
    ids=["2x1", "2x2"],
)
def test_two_nodes_train_what_one_process_trains(job, processes, begun):
    one = begun[one_process].result()
    assert job.facts["JobState"] == "COMPLETED", job.log
    launch = json.loads((job.run / "environment.json").read_text())["launches"][-1]
    assert (launch["processes"], launch["strategy"]) == (processes, "ddp")
    losses, expected = (dict(run.logged("loss")) for run in (job, one))
    assert len(losses) == STEPS // 10 and losses == pytest.approx(expected, rel=1e-5)
    weights, expected = (load_file(run.run / "model.safetensors") for run in (job, one))
    assert all((weights[name] - expected[name]).abs().max() < 1e-4 for name in expected)


def of_preferences(site):
    return site.train("preferred", "--nodes=2", config="cpu_ddp", overrides=OF_PAIRS).end()


@about(of_preferences)
def test_a_recipe_of_preferences_is_trained_as_any_other(job):
    assert job.facts["JobState"] == "COMPLETED", job.log
    assert len(job.logged("rewards/margins")) == 2
    arguments = json.loads((job.run / "environment.json").read_text())["launches"][-1]["arguments"]
    assert arguments[0] == "src/dpo.py"


def addresses(site):
    # CONTAINER and SRUN_OPTIONS as for a container, which is not there: they set a variable and a
    # working directory.
    hooks = {
        "CONTAINER": "env INSIDE=yes",
        "SRUN_OPTIONS": f"--chdir={site.folder.with_name('probes')}/.",
    }
    return site.probe(
        "ok", "--nodes=2", "--gres=gpu:2", "--cpus-per-task=2", OMP_NUM_THREADS="", **hooks
    ).end()


@about(addresses)
def test_every_process_knows_where_it_is(job):
    processes = job.probed()
    assert job.facts["JobState"] == "COMPLETED" and [process["rank"] for process in processes] == [
        0,
        1,
        2,
        3,
    ]
    assert {process["sum"] for process in processes} == {6}
    assert {process["MASTER_ADDR"] for process in processes} in ({"node1"}, {"node2"})
    assert [process["host"] for process in processes] in (
        ["node1"] * 2 + ["node2"] * 2,
        ["node2"] * 2 + ["node1"] * 2,
    )
    assert [process["LOCAL_RANK"] for process in processes] == ["0", "1", "0", "1"]
    assert {process["INSIDE"] for process in processes} == {"yes"}
    # GPUs and CPUs of the node are those that Slurm gave: two processes share two of each.
    assert {
        (process["CUDA_VISIBLE_DEVICES"], process["OMP_NUM_THREADS"]) for process in processes
    } == {("0,1", "1")}


def neighbours(site):
    jobs = [site.probe("ok", "--nodelist=node1", "--gres=gpu:1") for _ in range(2)]
    return [job.end() for job in jobs]


@about(neighbours)
def test_two_jobs_share_a_node(job):
    assert [one.facts["JobState"] for one in job] == ["COMPLETED"] * 2
    assert {one.facts["NodeList"] for one in job} == {"node1"}
    ports = {process["MASTER_PORT"] for one in job for process in one.probed()}
    assert len(ports) == 2


# Before queueing


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "slurm").glob("*.sh")))
def test_slurm_takes_every_script_as_it_is(site, script):
    assert (
        "to start at"
        in site.cluster.run("sbatch", "--test-only", f"slurm/{script}", cwd=site.folder).stderr
    )


def check(site, *words: str):
    return site.cluster.run("slurm/sft.sh", "--check", *words, check=False, cwd=site.folder)


def test_a_check_finds_all_right(site):
    arguments = [
        "accelerate_configs/cpu_ddp.yaml",
        "recipe.yaml",
        "training.output_dir=outputs/checked",
    ]
    done = check(site, "--nodes=2", "--gres=gpu:2", "--", *arguments)
    assert done.returncode == 0, done.stderr
    assert "to start at" in done.stderr
    fsdp = ["accelerate_configs/fsdp2.yaml", *arguments[1:]]
    assert check(site, *fsdp).returncode == 0, (
        "a login node has no GPU, and options of sbatch may be left out"
    )
    of_pairs = check(site, *arguments[:2], "training.output_dir=outputs/pairs", *OF_PAIRS)
    assert of_pairs.returncode == 0, of_pairs.stderr


def test_a_check_of_a_sweep_names_the_line(site):
    (site.folder / "typo.txt").write_text(
        "training.learning_rate=1e-4\ntraining.learning_rat=1e-3\n"
    )
    arguments = ["accelerate_configs/cpu.yaml", "recipe.yaml", "typo.txt"]
    done = site.cluster.run("slurm/array.sh", "--check", *arguments, check=False, cwd=site.folder)
    assert done.returncode == 2
    assert "line 2 of typo.txt: override 'training.learning_rat=1e-3'" in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "-- accelerate_configs/cpu.yaml recipe.yaml training.max_step=1",
            "did you mean training.max_steps",
        ),
        (
            "-- accelerate_configs/ddp.yaml recipe.yaml training.output_dir=recipe.yaml",
            "cannot be written",
        ),
        (
            f"--nodes=9 {LARGE}",
            "allocation failure",
        ),
        (
            f"--gres=gpu:64 {LARGE}",
            "allocation failure",
        ),
    ],
    ids=["recipe", "folder", "nodes", "gpus"],
)
def test_a_check_finds_what_is_wrong(site, words, said):
    done = check(site, *words.split())
    assert done.returncode != 0 and said in done.stderr and "Traceback" not in done.stderr


# Stopped from outside


def told_by_scancel(site):
    job = site.train("told", "--nodes=2", config="cpu_ddp")
    job.wait_for_step(10)
    site.cluster.run("scancel", "--signal=USR1", job.number)
    return job.end()


def at_the_time_limit(site):
    job = site.train("late", "--time=60", "--signal=B:USR1@150")
    job.wait_for_step(10)
    with job.frozen() as processes:
        # Two to three minutes from now: Slurm looks every 30 s whether 150 s are left.
        hours, minutes, _ = map(int, job.facts["RunTime"].split(":"))
        job.limit(60 * hours + minutes + 3)
        wait_for(
            "the signal",
            lambda: all(has_pending(process, signal.SIGUSR1) for process in processes),
            150,
        )
    wait_for("the restart", lambda: job.facts["Restarts"] != "0", SECONDS)
    job.limit(60)  # this time it may finish
    return job.end()


def preempted(site):
    job = site.train("outbid", "--partition=low", overrides=("training.dataloader_num_workers=1",))
    job.wait_for_step(10)
    with job.frozen():  # Slurm wakes it with SIGCONT before it sends SIGTERM
        site.submit(
            "--partition=urgent", "--exclusive", "--output=/dev/null", "--wrap=sleep 3"
        ).end()
    return job.end()


def powered_off(site):
    job = site.train("dark", "--partition=fragile", "--nodes=2", config="cpu_ddp")
    job.wait_for_step(SAVED_EVERY + 20)
    site.cluster.power_off("node5")
    return job.end()


@pytest.mark.parametrize(
    ("job", "uninterrupted", "said"),
    [
        (told_by_scancel, two_nodes, "stopped by SIGUSR1 after step"),
        (at_the_time_limit, one_process, "stopped by SIGUSR1 after step"),
        (preempted, one_process, "stopped by SIGTERM after step"),
        (powered_off, two_nodes, "DUE TO NODE FAILURE"),
    ],
    indirect=["job"],
    ids=["scancel", "time_limit", "preemption", "node_failure"],
)
def test_a_stopped_job_is_queued_again_and_ends_as_if_nothing_had_been(
    job, uninterrupted, said, begun
):
    assert job.facts["JobState"] == "COMPLETED", job.log
    assert job.facts["Restarts"] == "1"
    assert said in job.log and job.log.splitlines()[-1] == "slurm/sft.sh: finished"
    assert_same_training(job, begun[uninterrupted].result())


def cancelled(site):
    job = site.train("unwanted")
    job.wait_for_step(10)
    site.cluster.run("scancel", job.number)
    return job.end()


@about(cancelled)
def test_a_cancelled_job_is_not_queued_again(job):
    assert job.facts["JobState"] == "CANCELLED" and job.facts["Restarts"] == "0"
    assert "queued" not in job.log


# Failed by its own fault


def misspelt(site):
    return site.train("misspelt", overrides=("training.learning_rat=1",)).end()


def alone_on_two_nodes(site):
    return site.train("alone", "--nodes=2", config="cpu").end()


def wrong_in_one_process(site):
    return site.probe("wrong", "--nodes=2", "--gres=gpu:1").end()


def killed_in_one_process(site):
    return site.probe("killed", "--nodes=2", "--gres=gpu:1").end()


@pytest.mark.parametrize(
    ("job", "code", "said"),
    [
        (misspelt, 2, "did you mean training.learning_rate?"),
        (alone_on_two_nodes, 2, "accelerate started one process where 2 were asked for"),
        (wrong_in_one_process, 2, "error: something is wrong in process 1"),
        (killed_in_one_process, 1, "killed"),
    ],
    indirect=["job"],
    ids=["misspelt", "alone", "wrong", "killed"],
)
def test_a_job_that_fails_is_not_queued_again_and_says_why_at_last(job, code, said):
    assert (job.facts["JobState"], job.facts["Restarts"], job.exit_code) == ("FAILED", "0", code), (
        job.log
    )
    last = job.log.splitlines()[-1]
    assert last.startswith("slurm/sft.sh: failed, and is not queued again: ") and said in last


def never_ready(site):
    return site.probe("stopped", "--nodes=1", "--gres=gpu:1", MAX_RESTARTS="1").end()


@about(never_ready)
def test_restarts_are_bounded(job):
    assert (job.facts["JobState"], job.facts["Restarts"], job.exit_code) == ("FAILED", "1", 75)
    assert "MAX_RESTARTS" in job.log.splitlines()[-1]
    assert "Traceback" not in job.log


def stuck(site):
    return site.probe("stuck", "--nodes=1", "--gres=gpu:1").end()


@about(stuck)
def test_a_job_that_is_stopped_twice_at_the_same_step_is_not_queued_again(job):
    assert (job.facts["JobState"], job.facts["Restarts"], job.exit_code) == ("FAILED", "1", 75)
    assert "stopped again after step 3, and is not queued again" in job.log.splitlines()[-1]


def told_too_late(site):
    job = site.probe("slow", "--nodes=1", "--gres=gpu:2")
    wait_for("its last line", job.probed, SECONDS)
    for options in (["--batch"], [], ["--batch"], [], ["--batch"]):  # its shell, or all processes
        # Not checked: on a slow machine the job may have ended before the last of them.
        site.cluster.run("scancel", "--signal=USR1", *options, job.number, check=False)
        time.sleep(1)
    return job.end()


@about(told_too_late)
def test_a_signal_in_each_of_the_last_five_seconds_changes_nothing(job):
    assert (job.facts["JobState"], job.facts["Restarts"]) == ("COMPLETED", "0"), job.log
    assert job.log.splitlines()[-1] == "slurm/sft.sh: finished"


def repeated(site):
    site.train("again", overrides=("training.max_steps=10",)).end()
    return site.train("again", overrides=("training.max_steps=10",)).end()


@about(repeated)
def test_a_finished_run_that_is_submitted_again_ends_at_once(job):
    assert job.facts["JobState"] == "COMPLETED"
    assert "is finished" in job.log


# Sweep and chain


def sweep(site):
    lines = ["# learning rates", "training.learning_rate=1e-4", "", "training.learning_rate=1e-3"]
    lines += [
        "training.learning_rate=1e-2 'training.run_name=a quoted name'",
        "training.learning_rate=1e-5",
    ]
    (site.folder / "rates.txt").write_text("\n".join(lines) + "\n")
    common = ["training.max_steps=20", "training.save_strategy=no"]
    command = [
        "slurm/array.sh",
        "-c1",
        "--",
        "accelerate_configs/cpu.yaml",
        "recipe.yaml",
        "rates.txt",
        *common,
    ]
    said = site.cluster.run(*command, cwd=site.folder).stdout
    array, table = re.fullmatch(
        r"array job (\d+): 4 runs in outputs/rates\nthen job (\d+): .*\n", said
    ).groups()
    return Job(site, array), Job(site, table).end()


@about(sweep)
def test_a_sweep_trains_every_line_and_ends_in_a_table(job):
    array, table = job
    folder = array.site.folder / "outputs" / "rates"
    rates = [
        load_recipe(folder / str(n) / "recipe.yaml").training.learning_rate for n in range(1, 5)
    ]
    assert rates == [1e-4, 1e-3, 1e-2, 1e-5]
    assert load_recipe(folder / "3" / "recipe.yaml").training.run_name == "a quoted name"
    assert table.facts["JobState"] == "COMPLETED", table.log
    printed = [line for line in table.log.splitlines() if "finished" in line]
    assert len(printed) == 4 and printed[0].split()[1] == "3", table.log  # the highest rate
    assert (folder / "comparison.png").exists() and (folder / "comparison.csv").exists()
    assert [file.name for file in (array.site.folder / "logs").glob("array-*-3.out")] == [
        f"array-{array.number}-3.out"
    ]


def stopped_in_a_sweep(site):
    """Slurm's number of an array's task is that of the whole array; here that one is stopped."""
    (site.folder / "seeds.txt").write_text("training.seed=1\ntraining.seed=2\n")
    command = [
        "slurm/array.sh",
        "-c1",
        "--",
        "accelerate_configs/cpu.yaml",
        "recipe.yaml",
        "seeds.txt",
    ]
    array = re.match(r"array job (\d+)", site.cluster.run(*command, cwd=site.folder).stdout)[1]
    files = [site.folder / "outputs" / "seeds" / line / "metrics.jsonl" for line in "12"]
    wait_for(
        "both runs",
        lambda: all(file.exists() and '"step": 20' in file.read_text() for file in files),
        SECONDS,
    )
    tasks = [Job(site, f"{array}_{line}") for line in "12"]
    stopped = next(task for task in tasks if task.facts["JobId"] == array)
    site.cluster.run("scancel", "--signal=USR1", stopped.number)
    return stopped.end(), *(task.end() for task in tasks if task != stopped)


@about(stopped_in_a_sweep)
def test_a_task_of_a_sweep_that_is_stopped_is_resumed_and_the_others_do_not_notice(job):
    restarts = [(task.facts["JobState"], task.facts["Restarts"]) for task in job]
    assert restarts == [("COMPLETED", "1"), ("COMPLETED", "0")]
    stopped = job[0]
    log = stopped.site.folder / "logs" / f"array-{stopped.number.replace('_', '-')}.out"
    assert "stopped; it is queued again" in log.read_text()


def documented_chain(site):
    """The commands of docs/slurm.md, with tiny models and rows, and a Hub that nodes reach."""
    server = [
        sys.executable,
        str(ROOT / "tests" / "hub_server.py"),
        str(site.folder),
        "10.77.0.254",
        "controller",
    ]
    variables = json.loads(site.cluster.beside_the_controller(*server).stdout.readline())
    (block,) = re.findall(
        r"^```sh\n(train=.*?)^```",
        (ROOT / "docs" / "slurm.md").read_text(),
        re.MULTILINE | re.DOTALL,
    )
    for said, meant in (
        ("--gres=gpu:1", "-c1"),
        ("single_gpu.yaml recipes/dolly_gpt2.yaml", "cpu.yaml recipe.yaml training.max_steps=20"),
        (
            "src/publish.py outputs/dolly_gpt2",
            "src/publish.py outputs/run publish.repo=elith/llm-book-models "
            "publish.subfolder=chapter05/sft_model",
        ),
    ):
        assert said in block
        block = block.replace(said, meant)
    environment = [f"{name}={value}" for name, value in variables.items()]
    script = f"{block}\necho $train $publish $ask"
    numbers = site.cluster.run(
        "env", *environment, "bash", "-euc", script, cwd=site.folder
    ).stdout.split()
    return [Job(site, number).end() for number in numbers]


@about(documented_chain)
def test_a_run_is_trained_published_and_asked_by_jobs_that_wait_for_each_other(job):
    train, publish, ask = job
    logs = train.site.folder / "logs"
    published, answer = (
        logs / name for name in (f"publish-{publish.number}.out", f"ask-{ask.number}.out")
    )
    assert [one.facts["JobState"] for one in job] == ["COMPLETED"] * 3, (
        published.read_text() + train.log
    )
    assert train.facts["EndTime"] <= publish.facts["StartTime"]
    assert publish.facts["EndTime"] <= ask.facts["StartTime"]
    assert "1 of 1 greedy answers are the run folder's" in published.read_text()
    assert answer.read_text().strip()


def broken_chain(site):
    train = site.train("unfit", overrides=("data.max_length=0",))
    after = [
        f"--dependency=afterok:{train.number}",
        "--kill-on-invalid-dep=yes",
        "--output=/dev/null",
        "--wrap=true",
    ]
    dependent = site.submit(*after)
    return train.end(), dependent.end()


@about(broken_chain)
def test_a_job_that_depends_on_one_that_failed_is_taken_off_the_queue(job):
    assert [one.facts["JobState"] for one in job] == ["FAILED", "CANCELLED"]
