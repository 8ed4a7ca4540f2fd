"""The loggers of training.report_to: whether they can log, and the answers in them. Scalars are the
trainer's own.
"""

import importlib.util
import netrc
import os
from pathlib import Path
from typing import TYPE_CHECKING

from finetuning.errors import UserError
from finetuning.recipe.recipe import Recipe
from finetuning.runs.folder import Sample, quoted

if TYPE_CHECKING:
    from transformers import Trainer

# Loggers whose package has another name.
PACKAGES = {"azure_ml": "azureml", "flyte": "flytekit"}
WANDB = "-c constraints.txt -e '.[wandb]'"  # an extra of ours, in the version that is tested


def loggers_of(recipe: Recipe) -> list[str]:
    names = recipe.training.report_to
    names = [names] if isinstance(names, str) else names or []
    return [name for name in names if name != "none"]


def require_loggers(recipe: Recipe, folder: Path) -> None:
    """Raises UserError for a logger that is not installed or not logged in.

    Has wandb write below the run folder, and into the run that is there if it is resumed.
    """
    for name in loggers_of(recipe):
        package = PACKAGES.get(name, name)
        if importlib.util.find_spec(package) is None:
            what = WANDB if name == "wandb" else package
            raise UserError(f"training.report_to: {name} is not installed: pip install {what}")
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
