"""The base model: what its config says, and what of it learns."""

import json
import pickle
from pathlib import Path

import pytest
import tiny
import torch
from hub_server import REPO
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

from finetuning.errors import UserError
from finetuning.model.loading import load_model
from finetuning.model.tokenizer import load_tokenizer
from finetuning.recipe.sections import FromScratch, Model

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
    base = load_model(
        Model(name=str(tmp_path)), tokenizer.train_new_from_iterator(tiny.TEXTS, 260), seed=0
    )
    torch.testing.assert_close(base.get_input_embeddings().weight[end], row, rtol=0, atol=0)
    assert gradient_of_the_end_mark(base, end).norm() > 0


def test_a_process_that_has_a_model_attends_without_cudnn():
    """Be it to train or to answer."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    from_scratch()
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_the_config_of_a_model_from_scratch_can_be_saved_and_loaded(kind, tmp_path: Path):
    settings = Model(
        from_scratch=FromScratch(config={"model_type": kind, **tiny.CONFIGS[kind]}, vocab_size=300)
    )
    tokenizer = load_tokenizer(settings, tiny.TEXTS)
    model = load_model(settings, tokenizer, seed=0)
    model.save_pretrained(tmp_path)
    again = load_model(Model(name=str(tmp_path)), tokenizer, seed=0)
    assert (again.config.eos_token_id, again.config.pad_token_id) == (
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name


def test_a_tokenizer_whose_files_name_no_special_tokens_has_those_of_its_class(tmp_path: Path):
    """As openai-community/gpt2 is published."""
    tiny.byte_level().save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 1024}')
    tiny.model_of("gpt2").config.save_pretrained(tmp_path)
    tokenizer, theirs = (
        load_tokenizer(Model(name=str(tmp_path)), []),
        AutoTokenizer.from_pretrained(tmp_path),
    )
    assert tokenizer.eos_token == tokenizer.pad_token == theirs.eos_token == "<|endoftext|>"
    for text in tiny.TEXTS:
        assert (
            tokenizer(text).input_ids == tiny.byte_level()(text).input_ids == theirs(text).input_ids
        )


# Weights that are not what they should be

FIRST = "transformer.h.0.mlp.c_fc.weight"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A GPT-2 on disk, to be damaged."""
    tiny.model_of("gpt2").save_pretrained(tmp_path)
    return tmp_path


def refusal(base: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_model(Model(name=str(base)), tiny.byte_level(), seed=0)
    return str(caught.value).removeprefix(f"model.name: {base} ")


@pytest.mark.parametrize("is_there", [False, True], ids=["missing", "of another shape"])
def test_a_weight_that_would_be_random_is_refused(base, is_there):
    weights = load_file(base / "model.safetensors")
    weight = weights.pop(FIRST)
    save_file(
        weights | ({FIRST: weight[:, :5].contiguous()} if is_there else {}),
        base / "model.safetensors",
    )
    expected = (
        f"lacks 1 of its weights, such as {FIRST}, or has them in a shape that is not in its config"
    )
    assert refusal(base) == expected


@pytest.mark.parametrize("size", [0, 5000], ids=["empty", "cut off"])
def test_weights_that_were_not_downloaded_to_their_end_are_refused_in_one_line(base, size):
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    said = refusal(base)
    assert "model.safetensors is damaged: Error while deserializing header" in said
    assert "\n" not in said


def test_a_base_whose_weights_are_pickles_only_is_told_what_to_do(base):
    """Before, --check found it right, and training then said not to set use_safetensors."""
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    assert refusal(base).startswith("has its weights only as a pickle (.bin), which can run code; ")


def test_no_shard_is_a_pickle(base):
    (base / "model.safetensors").rename(base / "part.bin")
    index = {"weight_map": {FIRST: "part.bin"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    (base / "part.bin").write_bytes(pickle.dumps({FIRST: 0}))
    assert "part.bin is damaged" in refusal(base)


def test_no_pull_request_of_a_stranger_gives_the_weights_of_a_base(hub):
    """Where a repository has pickles only, transformers looks for one and loads what is in it."""
    hub.put(REPO, {"config.json": b'{"model_type": "gpt2"}', "pytorch_model.bin": b"pickle"})
    with pytest.raises(UserError, match="has its weights only as a pickle"):
        load_model(Model(name=REPO, revision="main"), tiny.byte_level(), seed=0)
    assert not hub.sent("discussions")
