"""What a published model may consist of, by name and by content."""

import json

import pytest
from hub_server import OWNER

from finetuning.errors import UserError
from finetuning.hub import allowed_files


@pytest.mark.parametrize(
    "name",
    [
        *(
            "model.safetensors",
            "model-00001-of-00004.safetensors",
            "model.safetensors.index.json",
            "config.json",
        ),
        *(
            "adapter/adapter_config.json",
            "adapter/adapter_model.safetensors",
            "adapter_model.safetensors",
        ),
        *(
            "tokenizer.json",
            "tokenizer.model",
            "chat_template.jinja",
            "additional_chat_templates/tool_use.jinja",
        ),
        *("README.md", "manifest.json", "recipe.yaml", "samples.md", "metrics.jsonl", "loss.png"),
    ],
)
def test_what_belongs_to_a_model_may_be_published(name):
    assert allowed_files.is_publishable(name)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "training_args.bin",
            "pytorch_model.bin",
            "optimizer.pt",
            "scheduler.pt",
            "rng_state.pth",
            "modeling.py",
        ),
        *(
            ".env",
            ".lock",
            ".config.json",
            "environment.json",
            "published.json",
            "samples.json",
            "notes.md",
        ),
        *(
            "checkpoint-30/model.safetensors",
            "runs/events",
            "adapter/config.json",
            "a/b/config.json",
            "../config.json",
        ),
    ],
)
def test_nothing_else_may(name):
    assert not allowed_files.is_publishable(name)


@pytest.mark.parametrize("text", [f"x\n{OWNER}", "a hf_" + "Z9" * 17 + " b"])
def test_a_token_is_found_and_not_repeated(text, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", OWNER)
    with pytest.raises(UserError, match=r"line [12]: holds a token") as error:
        allowed_files.require_no_token("samples.md", text.encode())
    assert OWNER not in str(error.value) and "Z9Z9" not in str(error.value)


def test_a_token_of_another_form_is_known_by_its_being_ours(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "of-another-form")
    with pytest.raises(UserError):
        allowed_files.require_no_token("recipe.yaml", b"key: of-another-form")
    allowed_files.require_no_token("samples.md", b"hf_ is how a token begins, hf_hub too")
    allowed_files.require_no_token("model.safetensors", b"of-another-form")  # no text


@pytest.mark.parametrize("text", ["{", '{"auto_map": {"AutoConfig": "x.C"}}'])
def test_a_config_that_is_damaged_or_names_code_is_refused(text, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({}))
    allowed_files.require_no_remote_code(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(UserError, match=r"tokenizer_config\.json"):
        allowed_files.require_no_remote_code(tmp_path)
