"""What a Hub, or a server in its place, may answer: names of files by digest, bounded, from one
host.

huggingface_hub 2.4.0 joins the ETag header to the path of its cache unchecked: `../../../x` wrote
and overwrote any file of the user. It follows `next` links to other hosts with the token, and reads
bodies and pages without end. One hook in its client sees every answer before the library does.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import httpx2
from huggingface_hub import set_client_factory
from huggingface_hub.utils._http import default_client_factory

from finetuning.errors import UserError
from finetuning.untrusted_text import short_line

DIGEST = re.compile(r"[0-9a-f]{40,64}", re.I)  # SHA-1 of a commit or blob, SHA-256 of a large file
DIGEST_HEADERS = ("X-Repo-Commit", "X-Linked-ETag", "ETag")

MAX_ANSWER = 256 * 2**20  # bytes of all that one question is answered with: a million files' names
MIN_COST = 64 * 2**10  # bytes that an answer counts at least, so that empty pages come to an end


class Allowance:
    """How many bytes the server may still send."""

    def __init__(self, size: int) -> None:
        self.size = self.left = size

    def take(self, size: int) -> None:
        self.left -= size
        if self.left < 0:
            raise UserError(
                f"the Hub sends more than the {self.size:,} bytes that were to be expected; refused"
            )


ALLOWANCE: ContextVar[Allowance | None] = ContextVar("ALLOWANCE", default=None)


@contextmanager
def at_most(size: int) -> Iterator[None]:
    """Within, a server may answer with this many bytes in all; then UserError."""
    token = ALLOWANCE.set(Allowance(size))
    try:
        yield
    finally:
        ALLOWANCE.reset(token)


class CountedStream(httpx2.SyncByteStream):
    """A body whose bytes are taken from an allowance."""

    def __init__(self, stream: httpx2.SyncByteStream, allowance: Allowance) -> None:
        self.stream, self.allowance = stream, allowance

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self.stream:
            self.allowance.take(len(chunk))
            yield chunk

    def close(self) -> None:
        self.stream.close()


def ask_plainly(request: httpx2.Request) -> None:
    """A compressed answer could be a thousand times what was counted."""
    if ALLOWANCE.get():
        request.headers["Accept-Encoding"] = "identity"


def check_answer(response: httpx2.Response) -> None:
    """Raises UserError for an answer that is not of the Hub's protocol; see the module."""
    require_digests(response)
    require_same_host(response)
    if allowance := ALLOWANCE.get():
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise UserError("the Hub sends a compressed answer that was not asked for; refused")
        allowance.take(MIN_COST)
        assert isinstance(response.stream, httpx2.SyncByteStream)
        response.stream = CountedStream(response.stream, allowance)


def require_digests(response: httpx2.Response) -> None:
    if DIGEST_HEADERS[0] not in response.headers:
        return
    for header in DIGEST_HEADERS:
        value = response.headers.get(header)
        if value and not DIGEST.fullmatch(value.removeprefix("W/").strip('"')):
            raise UserError(
                f"the Hub names a file {short_line(value)} ({header}), which is not a digest; "
                "refused"
            )


def require_same_host(response: httpx2.Response) -> None:
    """The client sends its token wherever the next page is said to be."""
    link = response.links.get("next", {}).get("url")
    if link and response.url.join(link).host != response.url.host:
        raise UserError(f"the Hub has its next page on another host, {short_line(link)}; refused")


def checked_client() -> httpx2.Client:
    """The library's own client, with every answer checked."""
    client = default_client_factory()
    hooks = client.event_hooks
    client.event_hooks = {
        "request": [*hooks["request"], ask_plainly],
        "response": [*hooks["response"], check_answer],
    }
    return client


set_client_factory(checked_client)
