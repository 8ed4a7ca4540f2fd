"""report.html: what it shows, in both languages, and that no text puts markup into it."""

import base64
import hashlib
import json
import re
import shutil
from html.parser import HTMLParser

import pytest
from conftest import ROOT

from finetuning.evaluation.asking import Answer
from finetuning.evaluation.compared_run import Run
from finetuning.evaluation.report import marked, report, write_report
from finetuning.evaluation.results import BASE, TRAINED, answer_lines, results_of, summary
from finetuning.evaluation.turns import Turn

HOSTILE = (
    "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
    "</title></svg><!-- {{ 7 * 7 }} ' onload='x \x1b[31m\u202e <mark>東京</mark>"
)


@pytest.fixture
def run(tmp_path):
    """A finished run of an earlier version, with a hostile text wherever one can stand."""
    folder = tmp_path / "run"
    shutil.copytree(ROOT / "tests/old_runs/finished", folder)
    turns = [Turn(n, 1, [{"role": "user", "content": HOSTILE}], f"{n} {HOSTILE}") for n in range(8)]
    trained = [turn.reference if turn.row % 2 else "b" for turn in turns]
    said = {
        BASE: {turn.key: Answer(f"nothing {HOSTILE}", False) for turn in turns},
        TRAINED: {turn.key: Answer(text, True) for turn, text in zip(turns, trained, strict=True)},
    }
    results = results_of(turns, said)
    (folder / "evaluation.json").write_text(json.dumps(summary(results, 9)), encoding="utf-8")
    lines = "".join(json.dumps(line) + "\n" for line in answer_lines(results))
    (folder / "answers.jsonl").write_text(lines, encoding="utf-8")
    samples = [{"question": HOSTILE, "before": HOSTILE, "after": HOSTILE}]
    (folder / "samples.json").write_text(json.dumps(samples), encoding="utf-8")
    environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    environment["versions"] = {HOSTILE: HOSTILE}
    environment["launches"][-1]["arguments"] = ["src/sft.py", f"training.run_name={HOSTILE}"]
    (folder / "environment.json").write_text(json.dumps(environment), encoding="utf-8")
    return folder


class Tags(HTMLParser):
    """The names of the tags and attributes of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found |= {tag, *(name for name, _ in attrs)}


def test_a_hostile_text_puts_no_markup_into_the_page(run):
    page = report([Run(run)])
    tags = Tags(page).found
    assert "img" not in tags and not [name for name in tags if name.startswith("on")]
    assert page.count("<script>") == 1 and "&lt;script&gt;" in page
    assert "{{ 7 * 7 }}" in page and "\x1b" not in page and "\u202e" not in page
    assert "http" not in re.sub(r"http-equiv", "", page)  # nothing is loaded from anywhere


def test_only_the_pages_own_script_may_run(run):
    page = report([Run(run)])
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page


def test_a_run_of_an_earlier_version_has_a_page(tmp_path):
    for name in ("finished", "stopped", "adapter"):
        folder = shutil.copytree(ROOT / "tests/old_runs" / name, tmp_path / name)
        write_report(folder)
        assert "<svg" in (folder / "report.html").read_text(encoding="utf-8")


def test_what_the_reference_has_not_is_marked():
    assert marked("The cat sat", "The dog sat") == "The <mark>cat</mark> sat"
    assert marked("東京です", "東京") == "東京<mark>です</mark>"
    assert marked("<b>", "<b>") == "&lt;b&gt;"
    assert marked("", "x") == ""


def test_several_runs_stand_on_one_page(run, tmp_path):
    other = shutil.copytree(ROOT / "tests/old_runs/adapter", tmp_path / "other")
    page = report([Run(run), Run(other)])
    assert page.count("<section>") == 2
    assert "Settings that differ" in page and "<th>lora.r</th>" in page


def test_a_browser_shows_it_in_both_languages_on_a_phone_too(run, browser):
    from selenium.webdriver.common.by import By

    write_report(run)
    browser.get(f"file://{run}/report.html")
    assert browser.title == "run"
    headings = {"en": "Before and after training", "ja": "学習前と学習後"}
    body = browser.find_element(By.TAG_NAME, "body")
    assert headings["en"] in body.text and headings["ja"] not in body.text
    browser.find_element(By.ID, "language").click()
    assert headings["ja"] in body.text and headings["en"] not in body.text

    assert not browser.find_elements(By.TAG_NAME, "img")
    scores = browser.find_element(By.CSS_SELECTOR, "table.scores").text
    assert "exact match" in scores and "50.0 [" in scores
    assert browser.title == "run"  # no hostile script has run
    said = [each.text for each in browser.find_elements(By.CSS_SELECTOR, ".said")]
    assert said[1] == "b" and "東京" in said[-1]
    assert browser.find_elements(By.CSS_SELECTOR, "svg circle title")

    browser.set_window_size(400, 800)
    width = browser.execute_script("return document.documentElement.scrollWidth")
    assert width <= browser.execute_script("return window.innerWidth")
