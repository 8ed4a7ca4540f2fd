"""What test_slurm.py does on a cluster: submit jobs that train a tiny recipe, and look at them."""

import json
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from conftest import ROOT
from slurm_cluster import Cluster, wait_for

STEPS, SAVED_EVERY = 400, 100
RECIPE = f"""\
model:
  from_scratch:
    vocab_size: 300
    config: {{model_type: gpt2, n_layer: 1, n_embd: 16, n_head: 2, n_positions: 64,
      embd_pdrop: 0.0, attn_pdrop: 0.0, resid_pdrop: 0.0}}
data:
  path: rows.jsonl
  reader: prompt_response
  template: question_answer
  max_length: 64
  eval: {{every: 8}}
training:
  output_dir: outputs/run
  max_steps: {STEPS}
  global_batch_size: 8
  learning_rate: 1e-3
  # A step of less than rounding must not become a whole one, or processes drift apart.
  adam_epsilon: 1e-4
  logging_steps: 10
  save_steps: {SAVED_EVERY}
  save_total_limit: 2
"""
ROWS = [
    {"prompt": f"What is {n} + {n}?", "response": f"It is {2 * n}. " * (1 + n % 3)}
    for n in range(64)
]
SECONDS = 600  # that a job may take; the machine may be slow, and other jobs run beside it


@dataclass(frozen=True)
class Site:
    """A cluster, and a folder on it that looks like a checkout of this repository."""

    cluster: Cluster
    folder: Path

    def submit(self, *words: object, **environment: str) -> "Job":
        """sbatch, with a CPU a process. Options come first, then script and arguments."""
        command = [
            "env",
            *(f"{name}={value}" for name, value in environment.items()),
            "sbatch",
            "--parsable",
            "-c1",
        ]
        done = self.cluster.run(*command, *map(str, words), cwd=self.folder)
        return Job(self, done.stdout.strip())

    def train(
        self, name: str, *options: object, config: str = "cpu", overrides: tuple[str, ...] = ()
    ) -> "Job":
        """Submits slurm/sft.sh with the tiny recipe and a run folder outputs/NAME."""
        arguments = [
            f"accelerate_configs/{config}.yaml",
            "recipe.yaml",
            f"training.output_dir=outputs/{name}",
        ]
        return self.submit(f"--job-name={name}", *options, "slurm/sft.sh", *arguments, *overrides)

    def probe(self, end: str, *options: object, **environment: str) -> "Job":
        """Submits slurm/sft.sh with tests/slurm_probe.py in the place of src/sft.py."""
        site = Site(self.cluster, self.folder.with_name("probes"))
        return site.submit(
            f"--job-name={end}",
            *options,
            "slurm/sft.sh",
            "accelerate_configs/ddp.yaml",
            end,
            **environment,
        )


@dataclass(frozen=True)
class Job:
    site: Site
    number: str

    @property
    def facts(self) -> dict[str, str]:
        return self.site.cluster.job(self.number)

    @property
    def log(self) -> str:
        """What it printed, in logs/<name>-<number>.out unless it was told otherwise."""
        file = self.site.folder / "logs" / f"{self.facts['JobName']}-{self.number}.out"
        return file.read_text(errors="replace") if file.exists() else ""

    @property
    def run(self) -> Path:
        return self.site.folder / "outputs" / self.facts["JobName"]

    @property
    def exit_code(self) -> int:
        return int(self.facts["ExitCode"].split(":")[0])

    def logged(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of a figure in metrics.jsonl."""
        file = self.run / "metrics.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]
        return [(line["step"], line[name]) for line in lines if name in line]

    def wait_for_step(self, step: int) -> None:
        def is_there() -> bool:
            assert self.facts["JobState"] in ("PENDING", "CONFIGURING", "RUNNING"), self.log
            return (self.run / "metrics.jsonl").exists() and any(
                at >= step for at, _ in self.logged("loss")
            )

        wait_for(f"step {step} of job {self.number}", is_there, SECONDS)

    def limit(self, minutes: int) -> None:
        """Gives it so many minutes from its start."""
        self.site.cluster.run("scontrol", "update", f"JobId={self.number}", f"TimeLimit={minutes}")

    def end(self) -> "Job":
        """Waits until Slurm has done with it."""
        ended = (
            "COMPLETED",
            "FAILED",
            "CANCELLED",
            "TIMEOUT",
            "NODE_FAIL",
            "PREEMPTED",
            "OUT_OF_MEMORY",
        )
        wait_for(f"the end of job {self.number}", lambda: self.facts["JobState"] in ended, SECONDS)
        return self

    @contextmanager
    def frozen(self) -> Iterator[list[psutil.Process]]:
        """Its training processes, stopped in the middle of a step, so that others find them
        training.
        """
        processes = [process for process in psutil.process_iter() if self.is_training(process)]
        assert processes
        for process in processes:
            process.suspend()
        try:
            yield processes
        finally:
            for process in processes:
                with suppress(psutil.NoSuchProcess):
                    process.resume()

    def probed(self) -> list[dict]:
        """What the processes of tests/slurm_probe.py printed, by rank."""
        found = [json.loads(line) for line in self.log.splitlines() if line.startswith('{"rank"')]
        return sorted(found, key=lambda process: process["rank"])

    def is_training(self, process: psutil.Process) -> bool:
        try:
            command = process.cmdline()
            is_ours = process.environ().get("SLURM_JOB_ID") == self.number
        except psutil.Error:
            return False
        return is_ours and command[1:2] == ["src/sft.py"]


def has_pending(process: psutil.Process, number: signal.Signals) -> bool:
    """Whether the signal was sent to the (stopped) process."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    pending = [
        int(mask, 16) for mask in re.findall(r"^(?:SigPnd|ShdPnd):\s*(\w+)", status, re.MULTILINE)
    ]
    return any(mask >> (number - 1) & 1 for mask in pending)


def make_site(cluster: Cluster, folder: Path) -> Site:
    """Two checkouts: one that trains, and one with the probe in the place of src/sft.py."""
    checkout, probes = folder / "checkout", folder / "probes"
    for place in (checkout, probes):
        (place / "logs").mkdir(parents=True)
        (place / ".venv").symlink_to(sys.prefix)
        for name in ("accelerate_configs", "slurm"):
            (place / name).symlink_to(ROOT / name)
    (checkout / "src").symlink_to(ROOT / "src")
    (checkout / "recipe.yaml").write_text(RECIPE)
    (checkout / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    pairs = [{**row, "chosen": row["response"], "rejected": "No."} for row in ROWS]
    (checkout / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (probes / "src").mkdir()
    (probes / "src" / "finetuning").symlink_to(ROOT / "src" / "finetuning")
    shutil.copy(ROOT / "tests" / "slurm_probe.py", probes / "src" / "sft.py")
    return Site(cluster, checkout)
