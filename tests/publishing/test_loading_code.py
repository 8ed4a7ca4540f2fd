"""What a reader loads, with the code of the book, of the cards and of the libraries' manuals."""

import json
import runpy
import subprocess
import sys

import pytest
import torch
from hub_server import REPO
from publications import BOTH, KINDS, LORA, published
from run_folders import S, copied
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

BOOK = """
from transformers import AutoModelForCausalLM, AutoTokenizer

place = {"subfolder": "chapter05/sft_model"}
model = AutoModelForCausalLM.from_pretrained("elith/llm-book-models", **place)
tokenizer = AutoTokenizer.from_pretrained("elith/llm-book-models", **place)
inputs = tokenizer("### Question: What is 3 + 1?", return_tensors="pt")
logits = model(**inputs).logits
print(logits.sum().item())
"""


@pytest.fixture
def book(tmp_path):
    """The book's loading code as a script."""
    script = tmp_path / "book.py"
    script.write_text(BOOK)
    return script


@pytest.mark.parametrize("kind", ["full", "sharded", "merged"])
def test_the_books_loading_code_gives_the_run_folders_model(kind, book, hub, runs, call, tmp_path):
    run, arguments, _ = KINDS[kind]
    published(call, copied(runs[run], tmp_path / "run"), *arguments)
    loaded = runpy.run_path(str(book))
    tokenizer = AutoTokenizer.from_pretrained(runs[run])
    inputs = tokenizer("### Question: What is 3 + 1?", return_tensors="pt")
    assert torch.equal(inputs.input_ids, loaded["inputs"].input_ids)
    # Of an adapter: on its base.
    logits = AutoModelForCausalLM.from_pretrained(runs[run])(**inputs).logits
    assert torch.allclose(loaded["logits"], logits, atol=0 if kind != "merged" else 1e-4)


def test_the_books_loading_code_works_in_a_process_of_its_own(book, crowded):
    """Which reads the libraries' variables anew, as a reader's does."""
    done = subprocess.run([sys.executable, book], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    expected = runpy.run_path(str(book))["logits"].sum().item()
    assert float(done.stdout) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "place", [("lora", LORA, S), ("lora", BOTH, f"{S}/adapter")], ids=["alone", "beside"]
)
def test_an_adapter_loads_the_documented_way(place, hub, runs, call, tmp_path):
    from peft import PeftModel

    run, arguments, subfolder = place
    published(call, copied(runs[run], tmp_path / "run"), *arguments)
    config = json.loads(hub.read(REPO, f"{subfolder}/adapter_config.json"))
    assert (config["base_model_name_or_path"], config["revision"]) == ("elith/tiny-base", None)
    base = AutoModelForCausalLM.from_pretrained(runs["full"].parents[1] / "llama")
    ids = torch.tensor([[5, 6, 7]])
    plain = base(ids).logits
    loaded = PeftModel.from_pretrained(base, REPO, subfolder=subfolder)
    logits = AutoModelForCausalLM.from_pretrained(runs[run])(ids).logits
    assert torch.allclose(loaded(ids).logits, logits, atol=1e-5) and not torch.allclose(
        plain, logits, atol=1e-2
    )


def test_tied_weights_are_sent_once_and_are_tied_again(hub, runs, call, tmp_path):
    published(call, copied(runs["full"], tmp_path / "run"))
    model = AutoModelForCausalLM.from_pretrained(REPO, subfolder=S)
    assert model.lm_head.weight.data_ptr() == model.transformer.wte.weight.data_ptr()
    (tmp_path / "sent").write_bytes(hub.read(REPO, f"{S}/model.safetensors"))
    assert "lm_head.weight" not in load_file(tmp_path / "sent")
