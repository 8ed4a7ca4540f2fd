"""Speaking to the Hub: transient failures are retried, others are told in one line with what to do.

huggingface_hub retries only in part: not when a commit, a tag or the head of a branch is requested,
and not when a download breaks off (2.4.0).
"""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from huggingface_hub import (
    HfApi,
    constants,
    get_token,
    hf_hub_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import logging as client_logging
from huggingface_hub.utils import sha

from finetuning.errors import DISK_FULL, UserError, one_line
from finetuning.files import sha256_of
from finetuning.hub.failures import (
    as_user_error,
    endpoint,
    hub_problem,
    is_transient,
    requested_wait,
    short_reason,
)
from finetuning.hub.protocol import DIGEST, MAX_ANSWER, MIN_COST, at_most
from finetuning.untrusted_text import printable

TIMEOUT = 10  # seconds until an answer begins
WAITS = (1, 2, 4, 8)  # seconds between one attempt and the next
ATTEMPTS = 6  # of the client itself, which begins a file again where the line is cut

T = TypeVar("T")


def with_retries(action: Callable[[], T], repo: str) -> T:
    """What the action returns, retried after transient failures; it must be safe to repeat.

    Raises TryAgain where a failure does not pass, UserError where it cannot.
    """
    for wait in (*WAITS, None):
        try:
            with without_client_warnings(), at_most(MAX_ANSWER):
                return action()
        except HFValidationError as error:  # a name that the Hub cannot have
            raise UserError(one_line(error)) from None
        except Exception as error:
            problem = hub_problem(error)
            if problem is None:
                raise
            if wait is None or not is_transient(problem):
                raise as_user_error(problem, repo) from None
            pause = requested_wait(problem) or wait
            said = f"the Hub: {short_reason(problem)}; next attempt in {pause} s"
            print(printable(said), file=sys.stderr, flush=True)
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


@contextmanager
def without_client_warnings() -> Iterator[None]:
    """The client's warnings repeat what is said here, and show signed links to files."""
    before = client_logging.get_verbosity()
    client_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        client_logging.set_verbosity(before)


# Asking


def require_access(repo: str, write: bool) -> None:
    """Raises UserError unless the repository exists and we may read it, or write to it."""

    def ask() -> None:
        if write and not get_token():
            raise LocalTokenNotFoundError
        HfApi().auth_check(repo, write=write)

    with_retries(ask, repo)


def head_commit(repo: str, revision: str = "main") -> str:
    """The commit that a branch, tag or commit of a model repository stands at."""
    with understood(repo):
        commit = HfApi().repo_info(repo, revision=revision, timeout=TIMEOUT).sha
        if not isinstance(commit, str) or not DIGEST.fullmatch(commit):
            raise ValueError(f"commit {commit!r}")
    return commit


def is_private(repo: str) -> bool:
    """Whether only its owner, and whom the owner lets, can read the repository."""
    return HfApi().repo_info(repo, timeout=TIMEOUT).private is True


def list_files(repo: str, commit: str) -> dict[str, RepoFile]:
    """{path: size and checksum, as the Hub lists them} of every file of a commit."""
    with understood(repo):
        entries = HfApi().list_repo_tree(repo, recursive=True, revision=commit)
        return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


@contextmanager
def understood(repo: str) -> Iterator[None]:
    """UserError for an answer that the client makes no sense of: not JSON, or not of the Hub."""
    try:
        yield
    except (HFValidationError, UserError):
        raise
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(
            f"{repo}: {endpoint()} answers with what is not of the Hub's protocol: "
            f"{type(error).__name__}: {one_line(error)}"
        ) from None


# Downloading


def download_file(
    repo: str, entry: RepoFile, commit: str, cache: Path | None = None, force: bool = False
) -> Path:
    """A file of a commit, in the cache.

    An interrupted download raises ConnectionError or one of the client's errors.
    """
    if force:
        require_inside(entry.path, repo, commit, cache)
    try:
        with understood(repo), at_most(ATTEMPTS * entry.size + 16 * MIN_COST):
            return Path(
                hf_hub_download(
                    repo, entry.path, revision=commit, cache_dir=cache, force_download=force
                )
            )
    except RuntimeError as error:  # hf_xet raises it for every failed download
        if any(text in str(error) for text in DISK_FULL):
            raise
        raise ConnectionError(one_line(error)) from error


def require_inside(path: str, repo: str, commit: str, cache: Path | None) -> None:
    """Raises UserError where a cached file is a link out of the cache: it would be overwritten."""
    root = Path(cache or constants.HF_HUB_CACHE)
    file = try_to_load_from_cache(repo, path, cache_dir=root, revision=commit)
    if isinstance(file, str) and not Path(file).resolve().is_relative_to(root.resolve()):
        raise UserError(f"{file} is a link to {Path(file).resolve()}, outside the cache; delete it")


def read_file(repo: str, entry: RepoFile, commit: str) -> bytes:
    """A small file's content. A damaged one is fetched once more, then it is a ConnectionError."""
    for force in (False, True):
        file = download_file(repo, entry, commit, force=force)
        if is_intact(file, entry):
            return file.read_bytes()
    raise ConnectionError(f"{entry.path}: checksum mismatch after two downloads")


def is_intact(file: Path, entry: RepoFile) -> bool:
    """Whether the file is what the Hub lists; its client compares only the length."""
    if not file.is_file() or file.stat().st_size != entry.size:
        return False
    if entry.lfs:
        return sha256_of(file) == entry.lfs.sha256
    return sha.git_hash(file.read_bytes()) == entry.blob_id
