"""Whether what a recipe names on the Hub can be had, found out before anything heavy is imported.

The libraries retry a closed door for 24 to 48 seconds a file and then report it with a page of traceback.
"""

from pathlib import Path
from typing import Literal, NamedTuple

from finetuning.address import PREFIX
from finetuning.errors import UserError
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
    """Raises UserError if one of them can neither be asked of the Hub nor, in offline mode, taken from the cache."""
    if not needs:
        return
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
    from huggingface_hub.utils import HFValidationError, httpx  # its own copy: `import httpx` has other errors

    local = "point the recipe at local copies: " + " ".join(dict.fromkeys(need.as_local for need in needs))
    for name, kind, setting in needs:
        try:
            if constants.is_offline_mode():
                if not is_cached(name, kind):
                    raise UserError(f"{setting}: {name} is not in the cache and HF_HUB_OFFLINE is set; {local}")
            else:
                HfApi().repo_info(name, repo_type=kind, timeout=TIMEOUT)
        except GatedRepoError:
            raise UserError(f"{setting}: {name} is gated: ask for access on its page and set HF_TOKEN") from None
        except (RepositoryNotFoundError, HFValidationError):
            raise UserError(f"{setting}: {name} is neither a local path nor a {kind} on the Hub") from None
        except (httpx.HTTPError, HfHubHTTPError, OSError) as error:
            names = ", ".join(dict.fromkeys(need.name for need in needs))
            reason = (str(error) or type(error).__name__).splitlines()[0]
            cached = all(is_cached(need.name, need.kind) for need in needs)
            offline = "set HF_HUB_OFFLINE=1 to use the copies in the cache, or " if cached else ""
            raise UserError(
                f"{constants.ENDPOINT} could not be reached for {names} ({reason}); {offline}{local}"
            ) from None


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
