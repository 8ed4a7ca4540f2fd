"""The page about the data is looked at in a browser, without a network."""

import re

import numpy as np
import pytest

from finetuning.runs.doctor import KINDS, Shown, diagnose
from finetuning.runs.report_page import report_page

LONG = "A long answer that nobody writes twice by chance."
HOSTILE = "</script><script>document.title='taken'</script><img src=x onerror=alert(1)>&lt;\u2028"
REPORT = {
    "rows": {"loaded": 9, "where": 8, "kept": 6, "train": 5, "eval": 1},
    "dropped": {"overflow": 2},
    "tokens": {"prompt": 30, "response": 10, "total": 40, "max": 12},
}


@pytest.fixture
def page(tmp_path):
    pairs = [("a?", LONG), ("b?", "yes it is"), (HOSTILE, HOSTILE), ("c?", LONG), ("d?", "no no")]
    examples = [
        Shown(n, n + 10, "eval" if n == 3 else "train", [(prompt, False), (response, True)])
        for n, (prompt, response) in enumerate(pairs)
    ]
    text = report_page(REPORT, np.array([4, 5, 9, 12]), examples, diagnose(examples, []))
    file = tmp_path / "report.html"
    file.write_text(text, encoding="utf-8")
    return file


def test_a_row_is_no_markup_of_the_page(page):
    text = page.read_text(encoding="utf-8")
    assert HOSTILE not in text
    assert len(re.findall("</script>", text)) == 2


def test_a_kind_of_finding_has_a_name_in_both_languages(page):
    text = page.read_text(encoding="utf-8")
    japanese = text[text.index("ja: {") :]
    assert all(f"{kind}:" in japanese for kind in KINDS)


def test_the_page_shows_a_leak_beside_what_it_leaks_from(page, browser):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.select import Select

    def texts(selector):
        return [
            element.get_property("textContent")
            for element in browser.find_elements(By.CSS_SELECTOR, selector)
        ]

    browser.get(page.as_uri())
    assert texts("#flow b") == ["9", "8", "-2", "6", "5", "1"]
    assert texts("#share div") == ["prompt 30 (75.0 %)", "response 10 (25.0 %)"]
    assert len(texts("#histogram div")) == 9

    assert texts("#place") == ["1 of 5"]
    browser.find_element(By.ID, "next").click()
    browser.find_element(By.ID, "next").click()
    assert texts("article pre") == [HOSTILE * 2]
    assert texts("article pre .trained") == [HOSTILE]

    choice = Select(browser.find_element(By.ID, "filter"))
    assert [option.text for option in choice.options] == [
        "all examples",
        f"{KINDS['leaked']} (1)",
        f"{KINDS['same_response']} (1)",
    ]
    choice.select_by_value("leaked")
    assert texts("article header") == ["row 10 · training", "row 13 · evaluation"]
    assert texts("article pre") == [f"a?{LONG}", f"c?{LONG}"]

    browser.find_element(By.ID, "language").click()
    assert browser.find_element(By.TAG_NAME, "html").get_attribute("lang") == "ja"
    assert texts("article header") == ["行 10 · 学習", "行 13 · 評価"]
    assert texts("h2")[0] == "行"

    assert browser.title == "Data report"
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
