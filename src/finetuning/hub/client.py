"""Speaking to the Hub: what passes by itself is tried again, what does not is told in one line with its remedy.

huggingface_hub tries again only in part: not when a commit, a tag or the head of a branch is asked for, and not when a
download breaks off (2.4.0).
"""

import hashlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, constants, get_token, hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import httpx, logging, parse_ratelimit_headers, sha

from finetuning.errors import DISK_FULL, TryAgain, UserError, one_line

TIMEOUT = 10  # seconds, for the first word of an answer


WAITS = (1, 2, 4, 8)  # seconds between one attempt and the next


LONGEST_WAIT = 300  # seconds: the Hub counts requests over five minutes


# Somebody else was faster (409, 412), too many requests, or the server's own trouble.
PASSING = (408, 409, 412, 425, 429, 500, 502, 503, 504)


T = TypeVar("T")


def patiently(action: Callable[[], T], repo: str) -> T:
    """What the action returns, tried again while what fails may pass; the action must be safe to repeat.

    Raises TryAgain where it does not pass, UserError where it cannot.
    """
    for wait in (*WAITS, None):
        try:
            with quietly():
                return action()
        except HFValidationError as error:  # a name that the Hub cannot have
            raise UserError(one_line(error)) from None
        except Exception as error:
            problem = problem_of(error)
            if problem is None:
                raise
            if wait is None or not may_pass(problem):
                raise explained(problem, repo) from None
            pause = asked_pause(problem) or wait
            print(f"the Hub: {reason(problem)}; again in {pause} s", file=sys.stderr, flush=True)
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


@contextmanager
def quietly() -> Iterator[None]:
    """Without the client's warnings: they repeat what is said here, and show signed links to files."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def tree_of(repo: str, commit: str) -> dict[str, RepoFile]:
    """{path: what the Hub lists of the file} of a commit."""
    entries = HfApi().list_repo_tree(repo, recursive=True, revision=commit)
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def fetch(
    repo: str, path: str, commit: str, cache: Path | None = None, force: bool = False
) -> Path:
    """A file of a commit, in the cache. What breaks off is a ConnectionError or one of the client's errors."""
    try:
        return Path(
            hf_hub_download(repo, path, revision=commit, cache_dir=cache, force_download=force)
        )
    except RuntimeError as error:  # what hf_xet makes of every failed download
        if any(words in str(error) for words in DISK_FULL):
            raise
        raise ConnectionError(one_line(error)) from error


def read(repo: str, entry: RepoFile, commit: str) -> bytes:
    """A small file's content. A damaged one is fetched once more, then it is a ConnectionError."""
    for force in (False, True):
        file = fetch(repo, entry.path, commit, force=force)
        if is_intact(file, entry):
            return file.read_bytes()
    raise ConnectionError(f"{entry.path} arrived damaged twice")


def is_intact(file: Path, entry: RepoFile) -> bool:
    """Whether the file is what the Hub lists; its client compares only the length."""
    if not file.is_file() or file.stat().st_size != entry.size:
        return False
    return (
        sha256(file) == entry.lfs.sha256
        if entry.lfs
        else sha.git_hash(file.read_bytes()) == entry.blob_id
    )


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def require_access(repo: str, write: bool) -> None:
    """Raises UserError unless the repository is there and we may read it, or write to it."""

    def ask() -> None:
        if write and not get_token():
            raise LocalTokenNotFoundError
        HfApi().auth_check(repo, write=write)

    patiently(ask, repo)


def problem_of(error: BaseException) -> Exception | None:
    """What went wrong between us and the Hub, or None if it is something else.

    The client wraps it: a failed upload is a RuntimeError, a failed download a LocalEntryNotFoundError.
    """
    kinds = (
        HfHubHTTPError,
        httpx.HTTPError,
        LocalTokenNotFoundError,
        ConnectionError,
        TimeoutError,
    )
    return next((cause for cause in chain(error) if isinstance(cause, kinds)), None)


def chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def may_pass(problem: Exception) -> bool:
    if isinstance(problem, HfHubHTTPError):
        return status_of(problem) in PASSING
    return not isinstance(problem, (OfflineModeIsEnabled, LocalTokenNotFoundError))


def status_of(problem: HfHubHTTPError) -> int:
    return problem.response.status_code


def asked_pause(problem: Exception) -> int | None:
    """Seconds that the Hub asks us to wait, within reason."""
    if not isinstance(problem, HfHubHTTPError):
        return None
    limit = parse_ratelimit_headers(problem.response.headers)
    after = problem.response.headers.get("Retry-After", "")
    seconds = (
        limit.reset_in_seconds
        if limit and limit.remaining == 0
        else int(after)
        if after.isdigit()
        else None
    )
    return None if seconds is None else min(seconds + 1, LONGEST_WAIT)


def reason(problem: Exception) -> str:
    """In a few words, without the addresses and ids that the client's messages are full of."""
    if isinstance(problem, HfHubHTTPError):
        said = (problem.server_message or "").strip().splitlines()
        return f"{status_of(problem)} {said[0] if said else problem.response.reason_phrase}".strip()
    return (str(problem) or type(problem).__name__).splitlines()[0]


def explained(problem: Exception, repo: str) -> UserError:
    """The problem in one line that names the remedy."""
    tokens = "https://huggingface.co/settings/tokens"
    log_in = "log in with `hf auth login`, or set HF_TOKEN"
    owner = repo.split("/")[0]
    if isinstance(problem, OfflineModeIsEnabled):
        return UserError(f"{repo} has to be asked of the Hub, but HF_HUB_OFFLINE is set; unset it")
    if isinstance(problem, GatedRepoError):
        return UserError(f"{repo} is gated: ask for access on its page, and {log_in}")
    if isinstance(problem, RevisionNotFoundError):
        return UserError(f"{repo} has no such branch, tag or commit")
    if isinstance(problem, RepositoryNotFoundError):
        hidden = "the token may not see it" if get_token() else f"it is private: {log_in}"
        return UserError(
            f"{repo}: there is no such repository, or {hidden}; to make it: hf repos create {repo}"
        )
    status = status_of(problem) if isinstance(problem, HfHubHTTPError) else None
    if isinstance(problem, LocalTokenNotFoundError) or (status == 401 and not get_token()):
        return UserError(
            f"{repo}: the Hub wants a token and there is none; {log_in} (tokens: {tokens})"
        )
    if status == 401:
        return UserError(
            f"{repo}: the Hub does not know the token (expired, revoked?); make another: {tokens}"
        )
    if status == 403:
        return UserError(
            f"{repo}: the token may not do that; take one with write access to {owner} ({tokens}), or publish to a "
            "repository of your own: publish.repo=you/name"
        )
    if may_pass(problem):
        return TryAgain(
            f"{constants.ENDPOINT} could not be reached for {repo}, or gave up: {reason(problem)}; "
            "give the same command again"
        )
    return UserError(f"{repo}: the Hub refuses: {reason(problem)}")
