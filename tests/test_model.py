"""The base model: what its config says, and what of it learns."""

from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoConfig

from finetuning.model import load_model, load_tokenizer
from finetuning.sections import FromScratch, Model

LLAMA = {"model_type": "llama", **tiny.CONFIGS["llama"]}


def gradient_of_the_end_mark(model: torch.nn.Module, end: int) -> torch.Tensor:
    """(C,) of its input embedding alone: the output layer's is not tied to it."""
    model(input_ids=torch.tensor([[5, end, 7]]), labels=torch.tensor([[5, end, 7]])).loss.backward()
    return model.get_input_embeddings().weight.grad[end]


def from_scratch() -> tuple[torch.nn.Module, int]:
    settings = Model(from_scratch=FromScratch(config=LLAMA, vocab_size=300))
    tokenizer = load_tokenizer(settings, tiny.TEXTS)
    return load_model(settings, tokenizer, seed=0), tokenizer.eos_token_id


def test_the_end_mark_of_a_model_from_scratch_is_an_input_that_learns():
    model, end = from_scratch()
    assert model.get_input_embeddings().weight[end].norm() > 0.01
    assert gradient_of_the_end_mark(model, end).norm() > 0


def test_the_end_mark_learns_where_it_is_the_pad_token_of_the_base_model_too(tmp_path: Path):
    """A run folder is such a base."""
    model, end = from_scratch()
    row = model.get_input_embeddings().weight[end].clone()
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).pad_token_id == end
    tokenizer = tiny.byte_level()
    base = load_model(Model(name=str(tmp_path)), tokenizer.train_new_from_iterator(tiny.TEXTS, 260), seed=0)
    torch.testing.assert_close(base.get_input_embeddings().weight[end], row, rtol=0, atol=0)
    assert gradient_of_the_end_mark(base, end).norm() > 0


@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_the_config_of_a_model_from_scratch_can_be_saved_and_loaded(kind, tmp_path: Path):
    settings = Model(from_scratch=FromScratch(config={"model_type": kind, **tiny.CONFIGS[kind]}, vocab_size=300))
    tokenizer = load_tokenizer(settings, tiny.TEXTS)
    model = load_model(settings, tokenizer, seed=0)
    model.save_pretrained(tmp_path)
    again = load_model(Model(name=str(tmp_path)), tokenizer, seed=0)
    assert (again.config.eos_token_id, again.config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
