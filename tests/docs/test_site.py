"""The site builds from the pages as they stand, in both languages, and fetches nothing."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from commands import ROOT
from pages import ENGLISH, JAPANESE

CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
TABS = {language: pages for tab in CONFIG["nav"] for language, pages in tab.items()}


def pages_of(tab: str) -> list[str]:
    return [page for entry in TABS[tab] for page in entry.values()]


def test_the_navigation_has_every_page_in_both_languages():
    english, japanese = pages_of("English"), pages_of("日本語")
    assert set(ENGLISH) <= set(english) and set(JAPANESE) == set(japanese)
    assert [page.replace(".md", ".ja.md") for page in english if page in ENGLISH] == japanese


def test_a_search_finds_japanese_words_inside_a_sentence():
    (search,) = [plugin["search"] for plugin in CONFIG["plugins"] if "search" in plugin]
    sentence = "または学習率が、勾配累積のステップ数 (training.max_steps)"
    words = re.split(search["separator"], sentence)
    assert {"学習率", "勾配累積", "ステップ", "training", "max"} <= set(words)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """What the recipe of `make docs` builds, in a copy of the repository."""
    folder = tmp_path_factory.mktemp("site")
    ignored = shutil.ignore_patterns(".*", "outputs", "wandb", "build", "__pycache__")
    shutil.copytree(ROOT, folder, ignore=ignored, dirs_exist_ok=True)
    (folder / ".venv").mkdir()
    (folder / ".venv" / "bin").symlink_to(Path(sys.executable).parent)
    for stamp in (".base", ".docs"):  # what is installed here is enough
        (folder / ".venv" / stamp).touch()
    command = ["make", "docs", "PYTHON=false"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No issues found" in done.stdout + done.stderr
    return folder / "build" / "site"


needs_zensical = pytest.mark.skipif(
    not shutil.which("zensical", path=Path(sys.executable).parent) and "CI" not in os.environ,
    reason="zensical is not installed: make docs",
)


@needs_zensical
def test_make_docs_builds_every_page_without_warnings(site):
    for page in [*pages_of("English"), *pages_of("日本語")]:
        built = re.sub(r"README\.md$", "index.md", page).replace(".md", ".html")
        assert (site / built).is_file(), page
    search = (site / "search.json").read_text(encoding="utf-8")
    assert "accelerate_configs" in search and "終端トークン" in search


@needs_zensical
def test_a_page_of_the_site_fetches_nothing(site):
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert re.findall(r"<(?:script|img|iframe)[^>]*\ssrc=\"(?:https?:)?//", text) == []
        assert re.findall(r"<link[^>]*rel=\"stylesheet\"[^>]*href=\"(?:https?:)?//", text) == []


@needs_zensical
def test_a_broken_link_ends_the_build(site):
    project = site.parents[1]
    page = project / "build" / "pages" / "docs" / "data.md"
    page.write_text(page.read_text(encoding="utf-8") + "\n[nowhere](nowhere.md)\n")
    command = [Path(sys.executable).parent / "zensical", "build", "--strict"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "page does not exist" in done.stdout + done.stderr
