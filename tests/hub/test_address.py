"""hub:owner/name/subfolder[@revision], read and written."""

import re

import pytest

from finetuning.hub.address import REPO, SUBFOLDER, Address, parse_address


@pytest.mark.parametrize(
    ("text", "address"),
    [
        (
            "hub:elith/llm-book-models/chapter05/sft_model",
            Address("elith/llm-book-models", "chapter05/sft_model"),
        ),
        ("hub:a/b/c@v1.0", Address("a/b", "c", "v1.0")),
        ("hub:a/b/c/d@refs/pr/1", Address("a/b", "c/d", "refs/pr/1")),
        ("a/b/日本語", Address("a/b", "日本語")),
    ],
)
def test_an_address_is_read_and_written_back(text, address):
    assert parse_address(text) == address
    assert str(address) == "hub:" + text.removeprefix("hub:")


@pytest.mark.parametrize(
    "text",
    [
        "a/b",
        "a/b/",
        "a",
        "hub:",
        "a/b//c",
        "a/b/./c",
        "a/b/../c",
        "../b/c",
        "a/b/c\\d",
        "a/b/c@",
        "a/b/" + "é" * 128,
    ],
)
def test_what_is_not_an_address_is_told_what_one_looks_like(text):
    with pytest.raises(ValueError, match="expected") as error:
        parse_address(text)
    assert len(str(error.value)) < 300


def test_no_two_subfolders_share_a_tag():
    """Nor does one's tag stand where another's must be a folder of tags."""
    subfolders = ["a", "a/b", "a_b", "a-b", "ab", "a/b/c"]
    prefixes = {Address("o/n", subfolder).tag_prefix for subfolder in subfolders}
    assert len(prefixes) == len(subfolders) and not [prefix for prefix in prefixes if "/" in prefix]


@pytest.mark.parametrize("name", ["a/v1", "chapter05/sft_model", "0/a-b_c"])
def test_what_is_published_can_be_pulled(name):
    assert re.fullmatch(SUBFOLDER, name) and parse_address(f"a/b/{name}").subfolder == name
    assert re.fullmatch(REPO, "elith/llm-book-models")
