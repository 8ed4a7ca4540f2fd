"""What went wrong between us and the Hub: whether it may pass, and in one line what to do."""

import re
from collections.abc import Iterator

import httpx2
from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # exports its functions lazily
    parse_ratelimit_headers,
)

from finetuning.errors import TryAgain, UserError

MAX_WAIT = 300  # seconds: the Hub counts requests over five minutes
# Somebody else was faster (409, 412), too many requests, or the server's own trouble.
TRANSIENT = (408, 409, 412, 425, 429, 500, 502, 503, 504)
TOKENS_PAGE = "https://huggingface.co/settings/tokens"
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


def hub_problem(error: BaseException) -> Exception | None:
    """What went wrong between us and the Hub, or None if the error is of another kind.

    The client wraps it: a failed upload is a RuntimeError, a failed download a
    LocalEntryNotFoundError.
    """
    kinds = (
        HfHubHTTPError,
        httpx2.HTTPError,
        httpx2.InvalidURL,
        LocalTokenNotFoundError,
        ConnectionError,
        TimeoutError,
    )
    return next((cause for cause in causes(error) if isinstance(cause, kinds)), None)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, its cause, the cause's cause ..."""
    while error is not None:
        yield error
        error = error.__cause__


def is_transient(problem: Exception) -> bool:
    if isinstance(problem, HfHubHTTPError):
        return problem.response.status_code in TRANSIENT
    permanent = (OfflineModeIsEnabled, LocalTokenNotFoundError, httpx2.InvalidURL)
    return not isinstance(problem, permanent)


def requested_wait(problem: Exception) -> int | None:
    """Seconds that the Hub asks us to wait, at most MAX_WAIT; None if it does not say."""
    if not isinstance(problem, HfHubHTTPError):
        return None
    headers = problem.response.headers
    limit, after = parse_ratelimit_headers(headers), headers.get("Retry-After", "")
    if limit and limit.remaining == 0:
        return min(limit.reset_in_seconds + 1, MAX_WAIT)
    return min(int(after) + 1, MAX_WAIT) if after.isdigit() else None


def short_reason(problem: Exception) -> str:
    """Short, without the addresses and ids that the client's messages are full of."""
    if isinstance(problem, HfHubHTTPError):
        said = (problem.server_message or "").strip().splitlines()
        phrase = said[0] if said else problem.response.reason_phrase
        return f"{problem.response.status_code} {phrase}".strip()
    return (str(problem) or type(problem).__name__).splitlines()[0]


def as_user_error(problem: Exception, repo: str) -> UserError:
    """The problem in one line that says what to do."""
    if isinstance(problem, OfflineModeIsEnabled):
        return UserError(f"{repo} has to be asked of the Hub, but HF_HUB_OFFLINE is set; unset it")
    if isinstance(problem, LocalTokenNotFoundError):
        return no_token(repo)
    if isinstance(problem, GatedRepoError):
        return UserError(f"{repo} is gated: ask for access on its page, and {LOG_IN}")
    if isinstance(problem, RevisionNotFoundError):
        return UserError(f"{repo} has no such branch, tag or commit")
    if isinstance(problem, RepositoryNotFoundError):
        hidden = "the token may not see it" if get_token() else f"it is private: {LOG_IN}"
        return UserError(
            f"{repo}: no such repository, or {hidden}; to create it: hf repos create {repo}"
        )
    if isinstance(problem, HfHubHTTPError) and problem.response.status_code in (401, 403):
        return refused_token(repo, problem.response.status_code)
    if is_transient(problem):
        return TryAgain(
            f"{endpoint()} could not be reached for {repo}, or gave up: "
            f"{short_reason(problem)}; run the same command again"
        )
    return UserError(f"{repo}: the Hub refuses: {short_reason(problem)}")


def no_token(repo: str) -> UserError:
    return UserError(
        f"{repo}: the Hub wants a token, none is set; {LOG_IN} (tokens: {TOKENS_PAGE})"
    )


def refused_token(repo: str, status: int) -> UserError:
    if status == 403:
        return UserError(
            f"{repo}: the token may not do that; take one with write access to "
            f"{repo.split('/')[0]} ({TOKENS_PAGE}), or publish to a repository of your own: "
            "publish.repo=you/name"
        )
    if not get_token():
        return no_token(repo)
    return UserError(
        f"{repo}: the Hub does not know the token (expired, revoked?); "
        f"create another: {TOKENS_PAGE}"
    )


def endpoint() -> str:
    """The Hub's address, for messages: a mirror's may hold a password."""
    return re.sub("//[^/@]*@", "//", constants.ENDPOINT)
