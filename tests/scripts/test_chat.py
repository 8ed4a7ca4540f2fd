"""The page of src/chat.py, in a real browser and by its requests."""

import contextlib
import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import ROOT

import generate

pytestmark = pytest.mark.usefixtures("all_warm")

QUESTION = "What is 3 + 1?"


@contextlib.contextmanager
def chat(*arguments: object) -> Iterator[str]:
    """The address of a page that src/chat.py serves."""
    script = subprocess.Popen(
        [sys.executable, "src/chat.py", *map(str, arguments), "--port", "0"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield script.stdout.readline().split()[0]
    finally:
        script.terminate()
        script.communicate(timeout=60)


@pytest.fixture(scope="module")
def page(runs):
    """A full run beside its base model."""
    with chat(runs["full"]) as address:
        yield address


def post(address: str, request: Any, kind: str = "application/json") -> list[dict[str, Any]]:
    body = json.dumps(request).encode()
    sent = urllib.request.Request(f"{address}answer", body, {"Content-Type": kind})
    with urllib.request.urlopen(sent, timeout=60) as response:
        return [json.loads(line) for line in response]


def asked(words: str, model: int = 1, **settings: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": words}]
    return {"model": model, "messages": messages, "settings": settings}


@pytest.fixture
def answer(runs, capsys):
    """What src/generate.py answers to QUESTION."""

    def answer(kind: str, *arguments: str) -> str:
        capsys.readouterr()
        generate.main([str(runs[kind]), QUESTION, *arguments])
        return capsys.readouterr().out.removesuffix("\n")

    return answer


def test_the_trained_model_answers_as_generate_does_and_the_base_does_not(page, answer):
    *pieces, last = post(page, asked(QUESTION))
    assert "".join(line["piece"] for line in pieces) == last["answer"] == answer("full")
    assert post(page, asked(QUESTION, model=0))[-1]["answer"] != last["answer"]
    assert last["prompt"][0] == [f"### Question: {QUESTION}\n### Answer:", False]
    text, is_trained = last["prompt"][1]
    assert text == f" {last['answer']}<|endoftext|>" and is_trained


def test_settings_are_of_one_answer(page, answer):
    short = post(page, asked(QUESTION, max_new_tokens=1))[-1]["answer"]
    assert short == answer("full", "generation.max_new_tokens=1") != answer("full")
    assert post(page, asked(QUESTION))[-1]["answer"] == answer("full")


@pytest.mark.parametrize(
    ("request_", "what"),
    [
        (asked("long " * 400), r"at most 256"),
        (asked(QUESTION, max_new_tokens=0), "max_new_tokens: "),
        (asked(QUESTION, temperature=-1.0, do_sample=True), "temperature"),
        (asked(QUESTION, num_beams=3), "settings: num_beams cannot be changed here"),
        (asked(QUESTION, model=7), "not a question"),
        ({"model": 0}, "column messages: expected a list of turns"),
        ([], "not a question"),
    ],
)
def test_what_cannot_be_answered_is_said_and_the_page_lives_on(page, request_, what):
    (line,) = post(page, request_)
    assert what in line["error"]
    assert "answer" in post(page, asked(QUESTION, max_new_tokens=1))[-1]


def test_a_page_of_another_site_cannot_ask(page):
    """A browser sends other kinds than these without leave, but JSON only with it."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        with pytest.raises(urllib.error.HTTPError, match="415"):
            post(page, asked(QUESTION), kind)


def test_only_this_machine_is_listened_to_unless_told(page):
    assert page.startswith("http://127.0.0.1:")


def test_an_adapter_is_shown_beside_its_base_model(runs, answer):
    with chat(runs["lora"]) as address:
        with urllib.request.urlopen(f"{address}models") as response:
            names = [model["name"] for model in json.load(response)]
        base, trained = (
            post(address, asked(QUESTION, model=number))[-1]["answer"] for number in (0, 1)
        )
    assert names[0].startswith("base model ") and names[1] == str(runs["lora"])
    assert trained == answer("lora") != base


def test_a_question_typed_in_a_browser_is_answered(page, browser, answer):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.wait import WebDriverWait

    browser.get(page)
    wait = WebDriverWait(browser, 60)
    wait.until(lambda _: len(browser.find_elements(By.CSS_SELECTOR, "section")) == 2)
    browser.find_element(By.ID, "question").send_keys(QUESTION)
    browser.find_element(By.ID, "send").click()
    wait.until(lambda _: len(browser.find_elements(By.CSS_SELECTOR, "[data-done]")) == 2)

    base, trained = browser.find_elements(By.CSS_SELECTOR, "section")
    shown = trained.find_element(By.CSS_SELECTOR, ".assistant")
    assert shown.get_property("textContent") == answer("full")
    assert base.find_element(By.CSS_SELECTOR, ".assistant").get_property("textContent") != answer(
        "full"
    )
    green = trained.find_element(By.CSS_SELECTOR, "pre .trained").get_property("textContent")
    assert green == f" {answer('full')}<|endoftext|>"

    loaded = browser.execute_script(
        "return performance.getEntriesByType('resource').map(entry => entry.name)"
    )
    assert loaded and all(name.startswith(page) for name in loaded)
    errors = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert errors == []
