"""The loggers of training.report_to: whether they can log, and the answers in them. Scalars are the
trainer's own.
"""

import importlib.util
import netrc
import os
from pathlib import Path

from finetuning.errors import UserError
from finetuning.recipe.recipe import Recipe
from finetuning.runs.folder import Sample, quoted

# Loggers whose package has another name.
PACKAGES = {"azure_ml": "azureml", "flyte": "flytekit"}


def loggers_of(recipe: Recipe) -> list[str]:
    names = recipe.training.report_to
    names = [names] if isinstance(names, str) else names or []
    return [name for name in names if name != "none"]


def require_loggers(recipe: Recipe, folder: Path) -> None:
    """Raises UserError for a logger that is not installed or not logged in; has wandb write below
    the run folder.
    """
    for name in loggers_of(recipe):
        package = PACKAGES.get(name, name)
        if importlib.util.find_spec(package) is None:
            raise UserError(f"training.report_to: {name} is not installed: pip install {package}")
    if "wandb" in loggers_of(recipe):
        os.environ.setdefault("WANDB_DIR", str(folder))
        if (
            os.environ.get("WANDB_MODE") not in ("offline", "disabled", "dryrun")
            and not has_wandb_key()
        ):
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


def log_samples(recipe: Recipe, folder: Path, samples: list[Sample], step: int) -> None:
    """The answers before and after as text in tensorboard and as a table in wandb."""
    loggers = loggers_of(recipe)
    if "tensorboard" in loggers:
        from torch.utils.tensorboard import SummaryWriter

        # The trainer has closed its writer by now; another one in the newest log folder adds to the
        # same run.
        runs = sorted((folder / "runs").glob("*"), key=lambda path: path.stat().st_mtime)
        with SummaryWriter(
            os.environ.get("TENSORBOARD_LOGGING_DIR") or str(runs[-1] if runs else folder)
        ) as writer:
            for number, (question, before, after) in enumerate(samples):
                # As code: in TensorBoard's Markdown an answer could load a picture from anywhere.
                parts = ("question", question), ("before", before), ("after", after or "")
                text = "\n\n".join(f"{name}:\n\n{quoted(part)}" for name, part in parts)
                writer.add_text(f"samples/{number}", text, step)
    if "wandb" in loggers:
        import wandb

        table = wandb.Table(
            columns=["question", "before", "after"], data=[list(sample) for sample in samples]
        )
        wandb.log({"samples": table})
