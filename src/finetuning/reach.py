"""Whether what a recipe names on the Hub can be had, found out before anything heavy is imported.

The libraries retry a closed door for 24 to 48 seconds a file and then report it with a page of traceback.
"""

from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from finetuning.address import PREFIX
from finetuning.errors import TryAgain, UserError
from finetuning.recipe import Recipe
from finetuning.sources import is_local, looks_local

TIMEOUT = 10  # seconds


class Need(NamedTuple):
    """Something of the Hub that a recipe names."""

    name: str
    kind: Literal["model", "dataset"]
    setting: str

    @property
    def as_local(self) -> str:
        return f"{self.setting}=/path/to/{self.name.split('/')[-1]}"


def needs_of(recipe: Recipe) -> list[Need]:
    """What the recipe takes from the Hub. Raises UserError where a local model folder is not there."""
    needs = []
    name = recipe.model.name
    if name and not name.startswith(PREFIX) and not Path(name).expanduser().exists():
        if looks_local(name):
            raise UserError(f"model.name: {name}: no such folder")
        needs.append(Need(name, "model", "model.name"))
    return needs + [Need(s.path, "dataset", "data.path") for s in recipe.data.sources if not is_local(s)]


def base_needs(recipe: Recipe, folder: Path) -> list[Need]:
    """What asking a trained model takes from the Hub: an adapter its base model, full weights nothing."""
    is_adapter = (folder / "adapter_config.json").exists()
    return [need for need in needs_of(recipe) if need.kind == "model"] if is_adapter else []


def require_hub(needs: list[Need]) -> None:
    """Raises UserError if one of them can neither be asked of the Hub nor, in offline mode, taken from the cache.

    TryAgain where the Hub does not answer: a closed door at once, what it asks us to try again after some seconds.
    """
    if not needs:
        return
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
    from huggingface_hub.utils import HFValidationError

    from finetuning.hub import httpx, patiently, reason

    local = "point the recipe at local copies: " + " ".join(dict.fromkeys(need.as_local for need in needs))

    def ask(need: Need) -> None:
        name, kind, setting = need
        try:
            HfApi().repo_info(name, repo_type=kind, timeout=TIMEOUT)
        except GatedRepoError:
            raise UserError(f"{setting}: {name} is gated: ask for access on its page and set HF_TOKEN") from None
        except (RepositoryNotFoundError, HFValidationError):
            raise UserError(f"{setting}: {name} is neither a local path nor a {kind} on the Hub") from None
        except HfHubHTTPError:
            raise
        except (httpx.HTTPError, OSError) as error:
            names = ", ".join(dict.fromkeys(need.name for need in needs))
            cached = all(is_cached(need.name, need.kind) for need in needs)
            offline = "set HF_HUB_OFFLINE=1 to use the copies in the cache, or " if cached else ""
            raise TryAgain(
                f"{constants.ENDPOINT} could not be reached for {names} ({reason(error)}); {offline}{local}"
            ) from None

    for need in needs:
        if not constants.is_offline_mode():
            patiently(partial(ask, need), need.name)
        elif not is_cached(need.name, need.kind):
            raise UserError(f"{need.setting}: {need.name} is not in the cache and HF_HUB_OFFLINE is set; {local}")


def is_cached(name: str, kind: str) -> bool:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return (Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=kind)).is_dir()


def cached_commit(name: str, revision: str | None) -> str | None:
    """The commit of a model that was just loaded from the Hub; None for a local folder."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RevisionResolutionError

    if Path(name).expanduser().exists():
        return None
    try:
        return HfApi().resolve_revision(name, revision=revision, local_files_only=True).resolved
    except (RevisionResolutionError, HFValidationError):
        return None
