"""docs/training_step.md: its code computes the real step, and its links lead to where it
happens."""

import ast
import re

import numpy as np
import pytest
import torch
from conftest import ROOT
from transformers import GPT2LMHeadModel

from finetuning.data.collator import Collator
from finetuning.model.packed_models import use_packed_attention
from finetuning.model.packing import Packing, packed_as
from finetuning.model.response_head import ResponseHead, Targets

PAGES = ["docs/training_step.md", "docs/training_step.ja.md"]


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def code_of(page: str) -> str:
    (block,) = re.findall(r"^```python\n(.*?)^```$", text_of(page), re.M | re.S)
    return block


def links_of(page: str) -> list[tuple[str, str]]:
    """(qualified name, file) of every link to code."""
    return re.findall(r"\[`([\w.]+)`\]\(\.\./(src/[\w/]+\.py)\)", text_of(page))


def names_in(file: str) -> set[str]:
    """Functions and classes of a file, and methods as Class.method."""
    names = set()
    for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.ClassDef):
            methods = [part.name for part in node.body if isinstance(part, ast.FunctionDef)]
            names |= {node.name, *(f"{node.name}.{method}" for method in methods)}
    return names


@pytest.fixture(scope="module")
def step() -> dict:
    """The page's names, after its code has run."""
    names: dict = {}
    exec(code_of(PAGES[0]), names)
    return names


def test_its_loss_gradients_and_accuracy_are_those_of_the_real_step(step):
    """The model as it was before: made anew from the same seed."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(step["config"]).train()
    use_packed_attention(model)
    head = ResponseHead(model)
    batch = Collator("packed", 0)(
        [
            {"input_ids": np.array(tokens), "labels": np.array(labels)}
            for tokens, labels in step["examples"]
        ]
    )
    assert torch.equal(batch["targets"], step["targets"])
    assert batch["input_ids"].numel() == step["ids"].numel() - len(step["examples"])
    packing = Packing.of(batch)
    with packed_as(packing), head.scoring(Targets(batch["positions"], batch["targets"])):
        inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
        loss = model(**inputs, use_cache=False).logits / len(batch["targets"])
        loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0).step()
    assert loss.item() == pytest.approx(step["loss"].item(), rel=1e-5)
    assert norm.item() == pytest.approx(step["norm"].item(), rel=1e-4)
    assert head.scores.correct.item() == step["accuracy"] * len(batch["targets"])
    for mine, theirs in zip(model.parameters(), step["model"].parameters(), strict=True):
        assert (mine - theirs).abs().mean() < 1e-4


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_function_that_is_there(page):
    links = links_of(page)
    assert len(links) > 10
    for name, file in links:
        assert name in names_in(file), f"{page}: {file} has no {name}"


def test_every_numbered_line_is_in_the_table():
    numbers = set(re.findall(r"# (\d+)\b", code_of(PAGES[0])))
    rows = re.findall(r"^\| ([\d, ]+) \|", text_of(PAGES[0]), re.M)
    assert numbers == {number for row in rows for number in row.split(", ")}


def test_both_pages_have_the_same_code_and_links():
    assert code_of(PAGES[0]) == code_of(PAGES[1])
    assert links_of(PAGES[0]) == links_of(PAGES[1])
