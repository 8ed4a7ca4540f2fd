"""Whether something on the Hub can be had."""

from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from finetuning.errors import TryAgain, UserError

TIMEOUT = 10  # seconds


class Need(NamedTuple):
    """Something of the Hub that a recipe names."""

    name: str
    kind: Literal["model", "dataset"]
    setting: str

    @property
    def as_local(self) -> str:
        return f"{self.setting}=/path/to/{self.name.split('/')[-1]}"


def require_hub(needs: list[Need]) -> None:
    """Raises UserError if one of them can neither be asked of the Hub nor, in offline mode, taken from the cache.

    TryAgain where the Hub does not answer: a closed door at once, what it asks us to try again after some seconds.
    """
    if not needs:
        return
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
    from huggingface_hub.utils import HFValidationError

    from finetuning.hub.client import httpx, patiently, reason

    local = "point the recipe at local copies: " + " ".join(
        dict.fromkeys(need.as_local for need in needs)
    )

    def ask(need: Need) -> None:
        name, kind, setting = need
        try:
            HfApi().repo_info(name, repo_type=kind, timeout=TIMEOUT)
        except GatedRepoError:
            raise UserError(
                f"{setting}: {name} is gated: ask for access on its page and set HF_TOKEN"
            ) from None
        except (RepositoryNotFoundError, HFValidationError):
            raise UserError(
                f"{setting}: {name} is neither a local path nor a {kind} on the Hub"
            ) from None
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
            raise UserError(
                f"{need.setting}: {need.name} is not in the cache and HF_HUB_OFFLINE is set; {local}"
            )


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
