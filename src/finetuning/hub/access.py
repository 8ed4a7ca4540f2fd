"""Are the model and the data sets that a recipe names reachable?"""

from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from finetuning.errors import TryAgain, UserError

TIMEOUT = 10  # seconds


class Need(NamedTuple):
    """A repository of the Hub that a recipe names."""

    name: str
    kind: Literal["model", "dataset"]
    setting: str
    """of the recipe, which names it"""

    @property
    def as_local(self) -> str:
        """The override that names a local copy instead."""
        return f"{self.setting}=/path/to/{self.name.split('/')[-1]}"


def require_hub(needs: list[Need]) -> None:
    """Raises UserError unless every one is reachable, or in offline mode in the cache.

    TryAgain where the Hub does not answer: at once if the connection is refused, after some seconds
    where it asks to be tried again.
    """
    if not needs:
        return
    from huggingface_hub import constants

    from finetuning.hub.client import with_retries

    for need in needs:
        require_name(need)
        if not constants.is_offline_mode():
            with_retries(partial(require_reachable, need, needs), need.name)
        elif not is_cached(need.name, need.kind):
            raise UserError(
                f"{need.setting}: {need.name} is not in the cache and HF_HUB_OFFLINE is set; "
                f"{local_copies(needs)}"
            )


def require_name(need: Need) -> None:
    """Raises UserError for what no repository of the Hub can be called."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(need.name)
    except HFValidationError:
        raise UserError(neither(need)) from None


def neither(need: Need) -> str:
    return f"{need.setting}: {need.name} is neither a local path nor a {need.kind} on the Hub"


def require_reachable(need: Need, needs: list[Need]) -> None:
    """Asks the Hub for one of the needs; the message names local copies of all of them.

    An answer that may pass (503, say) stays the client's own error.
    """
    import httpx2
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
    )

    name, kind, setting = need
    try:
        HfApi().repo_info(name, repo_type=kind, timeout=TIMEOUT)
    except GatedRepoError:
        raise UserError(
            f"{setting}: {name} is gated: ask for access on its page and set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(neither(need)) from None
    except HfHubHTTPError:
        raise
    except (httpx2.HTTPError, OSError) as error:
        raise unreachable(needs, error) from None


def unreachable(needs: list[Need], error: Exception) -> TryAgain:
    from finetuning.hub.failures import endpoint, short_reason

    names = ", ".join(dict.fromkeys(need.name for need in needs))
    cached = all(is_cached(need.name, need.kind) for need in needs)
    offline = "set HF_HUB_OFFLINE=1 to use the copies in the cache, or " if cached else ""
    return TryAgain(
        f"{endpoint()} could not be reached for {names} ({short_reason(error)}); "
        f"{offline}{local_copies(needs)}"
    )


def local_copies(needs: list[Need]) -> str:
    overrides = dict.fromkeys(need.as_local for need in needs)
    return f"point the recipe at local copies: {' '.join(overrides)}"


def is_cached(name: str, kind: str) -> bool:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return (Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=kind)).is_dir()


def loaded_commit(name: str, revision: str | None) -> str | None:
    """The commit of a model that was just loaded from the Hub; None for a local folder."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RevisionResolutionError

    if Path(name).expanduser().exists():
        return None
    try:
        return HfApi().resolve_revision(name, revision=revision, local_files_only=True).resolved
    except (RevisionResolutionError, HFValidationError):
        return None
