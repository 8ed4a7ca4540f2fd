"""The loggers of training.report_to: whether they can log, and the answers in them. Scalars are the
trainer's own.
"""

import hashlib
import importlib.util
import netrc
import os
from collections.abc import Callable, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetuning.errors import UserError
from finetuning.files import write_text
from finetuning.recipe.recipe import Recipe
from finetuning.runs.metrics import read_metrics
from finetuning.runs.samples import Sample, quoted

if TYPE_CHECKING:
    from transformers import Trainer

# What has to be importable, as transformers asks for it, and what pip installs for that; by itself
# where both have the logger's name.
MODULES = {
    "azure_ml": ("azureml.core.run",),
    "dagshub": ("dagshub", "mlflow"),
    "flyte": ("flytekit",),
}
PACKAGES = {
    "azure_ml": "azureml-sdk",
    "comet_ml": "comet-ml",
    "dagshub": "dagshub mlflow",
    "flyte": "flytekit",
    "wandb": "-c constraints.txt -e '.[wandb]'",  # an extra of ours, in the version that is tested
}
# Not a package, but where Kubeflow's trainer has started the process.
KUBEFLOW = "KUBEFLOW_TRAINER_SERVER_URL"


def loggers_of(recipe: Recipe) -> list[str]:
    names = recipe.training.report_to
    names = [names] if isinstance(names, str) else names or []
    return [name for name in names if name != "none"]


def require_loggers(recipe: Recipe, folder: Path) -> None:
    """Raises UserError for a logger that is not installed or not logged in.

    Has wandb write below the run folder, and into the run that is there if it is resumed.
    """
    for name in loggers_of(recipe):
        require_installed(name)
    if "wandb" in loggers_of(recipe):
        os.environ.setdefault("WANDB_DIR", str(folder))
        if last := newest(folder / "wandb", "*run-*-*"):
            os.environ.setdefault("WANDB_RUN_ID", last.name.rpartition("-")[2])
            os.environ.setdefault("WANDB_RESUME", "allow")
        is_offline = os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun")
        if not (is_offline or has_wandb_key()):
            raise UserError(
                "training.report_to: wandb is not logged in: run `wandb login`, or set "
                "WANDB_MODE=offline"
            )


def require_installed(name: str) -> None:
    """Raises UserError for a logger that transformers would refuse when the model is loaded."""
    if name == "kubeflow":
        if KUBEFLOW not in os.environ:
            raise UserError(f"training.report_to: kubeflow is for jobs of Kubeflow: no {KUBEFLOW}")
        return
    if not all(map(is_there, MODULES.get(name, (name,)))):
        what = PACKAGES.get(name, name)
        raise UserError(f"training.report_to: {name} is not installed: pip install {what}")


def is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a package that it is in
        return False


def has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        hosts = netrc.netrc().hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return any("wandb" in host for host in hosts)


def newest(folder: Path, pattern: str) -> Path | None:
    found = sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime)
    return found[-1] if found else None


def resume_loggers(trainer: "Trainer", run_folder: Path) -> None:
    """Has every logger but tensorboard log into the run that it began in this run folder, without
    what it was told before: a resumed run trains its last steps again, with the same numbers.
    """
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        TensorBoardCallback,
    )

    names = trainer.args.report_to or ()
    if "trackio" in names:  # it takes up the run of that name
        trainer.args.run_name = trainer.args.run_name or stable_name(run_folder)
    if "mlflow" in names:
        trainer.add_callback(mlflow_run(run_folder / "mlflow_run"))
    known = {(line["step"], frozenset(line) - {"step"}) for line in read_metrics(run_folder)}
    for callback in trainer.callback_handler.callbacks:
        is_logger = type(callback) in INTEGRATION_TO_CALLBACK.values()
        if is_logger and not isinstance(callback, TensorBoardCallback):
            callback.on_log = without_repeats(callback.on_log, known)


def stable_name(run_folder: Path) -> str:
    """The same for every launch of a run; not that of another folder of this name."""
    path = str(run_folder.absolute())
    return f"{run_folder.name}-{hashlib.sha256(path.encode()).hexdigest()[:6]}"


def without_repeats(
    on_log: Callable[..., None], known: Set[tuple[int, frozenset[str]]]
) -> Callable[..., None]:
    def log(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if (state.global_step, frozenset(kwargs["logs"])) not in known:
            on_log(args, state, control, **kwargs)

    return log


def mlflow_run(file: Path) -> Any:
    """A callback that keeps the id of MLflow's run in the file, for the launches after this one."""
    import mlflow
    from transformers import TrainerCallback

    def name_run() -> None:
        if file.is_file():
            os.environ["MLFLOW_RUN_ID"] = file.read_text(encoding="utf-8")

    class MlflowRun(TrainerCallback):
        """Comes after MLflow's own, which begins the run, or takes it up, and ends it."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero:
                write_text(file, mlflow.active_run().info.run_id)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            name_run()  # for the evaluation after training: MLflow forgets it with the run's end

    name_run()
    return MlflowRun()


def tensorboard_folder(run_folder: Path) -> str | None:
    """Where this run's events are; None before there are any."""
    last = newest(run_folder / "runs", "*")
    return os.environ.get("TENSORBOARD_LOGGING_DIR") or (str(last) if last else None)


def resume_tensorboard(trainer: "Trainer", run_folder: Path, step: int) -> None:
    """Has a resumed run log into the folder it logged into before.

    Steps after the checkpoint's, which are trained again, are taken back (purge_step). transformers
    makes another folder at every start, so that one run would look like many.
    """
    from transformers.integrations import TensorBoardCallback

    callback = trainer.pop_callback(TensorBoardCallback)
    if callback is None:
        return
    folder = tensorboard_folder(run_folder)
    if folder and trainer.is_world_process_zero():
        from torch.utils.tensorboard import SummaryWriter

        callback = TensorBoardCallback(SummaryWriter(folder, purge_step=step + 1))
        callback.logging_dir = folder  # of the evaluation after training
    trainer.add_callback(callback)


def log_samples(
    recipe: Recipe, folder: Path, samples: list[Sample], scores: dict[str, float], step: int
) -> None:
    """The answers before and after as text in tensorboard and as a table in wandb; the scores as
    figures beside the evaluation's. Others have closed the run by now.
    """
    loggers = loggers_of(recipe)
    if "tensorboard" in loggers:
        from torch.utils.tensorboard import SummaryWriter

        # The trainer has closed its writer by now; another one adds to the same run.
        with SummaryWriter(tensorboard_folder(folder) or str(folder)) as writer:
            for number, (question, before, after) in enumerate(samples):
                # As code: in TensorBoard's Markdown an answer could load a picture from anywhere.
                parts = ("question", question), ("before", before or ""), ("after", after or "")
                text = "\n\n".join(f"{name}:\n\n{quoted(part)}" for name, part in parts)
                writer.add_text(f"samples/{number}", text, step)
            for name, score in scores.items():
                writer.add_scalar(f"eval/{name}", score, step)
    if "wandb" in loggers:
        import wandb

        table = wandb.Table(
            columns=["question", "before", "after"], data=[list(sample) for sample in samples]
        )
        wandb.log({"samples": table, **{f"eval/{name}": score for name, score in scores.items()}})
