"""The base model's tokenizer is the one that other programs load, before and after it is saved."""

import json

import pytest
import tiny
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from finetuning.data.templates import TEMPLATES, MarkerTemplate
from finetuning.data.tokenization import encode_prompts
from finetuning.errors import UserError
from finetuning.model.tokenizer import read_tokenizer, require_same_when_saved


@pytest.fixture
def llama(tmp_path):
    """A folder with a tokenizer of a class that does not do what its tokenizer.json says."""
    plain = tiny.byte_fallback()
    model = json.loads(plain.backend_tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    LlamaTokenizer(vocab=model["vocab"], merges=merges).save_pretrained(tmp_path)
    saved = tmp_path / "tokenizer.json"
    settings = json.loads(saved.read_text())
    settings["normalizer"] = json.loads(plain.backend_tokenizer.to_str())["normalizer"]
    settings["pre_tokenizer"] = None
    saved.write_text(json.dumps(settings))
    return tmp_path


def test_a_tokenizer_is_of_the_class_that_stock_transformers_makes_of_it(llama, tmp_path):
    tokenizer = read_tokenizer(str(llama))
    assert type(tokenizer) is LlamaTokenizer
    require_same_when_saved(tokenizer)
    tokenizer.save_pretrained(tmp_path / "run")
    saved = AutoTokenizer.from_pretrained(tmp_path / "run")
    assert type(saved) is LlamaTokenizer
    template = MarkerTemplate(TEMPLATES["plain_chat"], tokenizer.eos_token, tokenizer.bos_token)
    segments = template.render_prompt([{"role": "user", "content": "a b"}])
    text = "".join(segment.text for segment in segments)
    ids = saved(text, add_special_tokens=False).input_ids
    assert encode_prompts([segments], tokenizer) == [ids]
    other = PreTrainedTokenizerFast.from_pretrained(llama)
    assert other(text, add_special_tokens=False).input_ids != ids


def test_a_tokenizer_that_is_another_one_when_it_is_saved_is_refused(llama):
    tokenizer = read_tokenizer(str(llama))
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(UserError, match="the tokenizer, a LlamaTokenizer, changes when"):
        require_same_when_saved(tokenizer)
