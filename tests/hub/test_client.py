"""What is tried again, how long it is waited, and what is said in the end."""

import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import httpx

from finetuning.errors import TryAgain, UserError
from finetuning.hub import client, failures

REQUEST = httpx.Request(
    "GET", "http://hub/api?sig=secret", headers={"Authorization": "Bearer hf_secret"}
)


def answer(status: int, **headers: str) -> HfHubHTTPError:
    response = httpx.Response(
        status, headers={name.replace("_", "-"): v for name, v in headers.items()}, request=REQUEST
    )
    return HfHubHTTPError(
        f"{status} for http://hub/api?sig=secret", response=response, server_message="words"
    )


@pytest.fixture
def waits(monkeypatch):
    seconds = []
    monkeypatch.setattr(client.time, "sleep", seconds.append)
    return seconds


def failing(*errors: Exception):
    """An action that fails with these in turn, then returns "done"."""
    left = list(errors)

    def act() -> str:
        if left:
            raise left.pop(0)
        return "done"

    return act


def wrapped(error: Exception, kind: type[Exception]) -> Exception:
    outer = kind("Error while uploading 'model.safetensors'")
    outer.__cause__ = error
    return outer


PASSING = [
    *(answer(status) for status in (408, 409, 412, 429, 500, 502, 503, 504)),
    httpx.ReadError("cut"),
    httpx.ConnectTimeout("late"),
    ConnectionError("of Xet"),
    wrapped(answer(503), RuntimeError),
    wrapped(httpx.ReadError("cut"), LocalEntryNotFoundError),
]


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_what_may_pass_is_tried_again(error, waits, capsys):
    assert client.with_retries(failing(error, error), "a/b") == "done"
    assert len(waits) == 2 and capsys.readouterr().err.count("next attempt in") == 2


def test_it_ends_after_five_attempts(waits):
    with pytest.raises(TryAgain, match="run the same command again"):
        client.with_retries(failing(*[answer(503)] * 5), "a/b")
    assert waits == list(client.WAITS)


@pytest.mark.parametrize(
    "error",
    [answer(400), answer(401), answer(403), answer(404), OfflineModeIsEnabled("off")],
    ids=repr,
)
def test_what_does_not_pass_is_told_at_once(error, waits):
    with pytest.raises(UserError) as caught:
        client.with_retries(failing(error), "a/b")
    assert not isinstance(caught.value, TryAgain) and waits == []
    assert "secret" not in str(caught.value) and str(caught.value).startswith("a/b")


def test_what_is_not_the_hubs_is_left_alone(waits):
    with pytest.raises(ZeroDivisionError):
        client.with_retries(failing(ZeroDivisionError()), "a/b")
    with pytest.raises(OSError, match="No space left"):
        client.with_retries(failing(OSError("No space left on device")), "a/b")


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry_After": "7"}, 8),
        ({"RateLimit": '"api";r=0;t=55'}, 56),
        ({"RateLimit": '"api";r=3;t=55'}, 1),
        ({"Retry_After": "99999"}, failures.MAX_WAIT),
        ({"Retry_After": "Wed, 21 Oct 2026 07:28:00 GMT"}, 1),
    ],
)
def test_the_hub_says_how_long_to_wait(headers, seconds, waits):
    client.with_retries(failing(answer(429, **headers)), "a/b")
    assert waits == [seconds]
