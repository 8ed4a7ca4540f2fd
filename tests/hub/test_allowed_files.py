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


SECRETS = {
    "Hugging Face": "hf_" + "Z9" * 17,
    "short Hugging Face": "hf_" + "Z9" * 9,
    "organisation": "api_org_" + "Z9" * 17,
    "GitHub": "ghp_" + "Z9" * 18,
    "fine-grained GitHub": "github_pat_" + "Z9" * 20,
    "AWS": "AKIA" + "Z9" * 8,
    "OpenAI": "sk-proj-" + "Z9" * 20,
    "wandb": "WANDB_API_KEY=" + "09" * 20,
    "private key": "-----BEGIN OPENSSH PRIVATE KEY-----",
    "URL": "https://ada:Z9Z9Z9Z9@a.example/x",
    "Slack": "xoxb-" + "1" * 12 + "-" + "Z9" * 10,
    "environment": "correct-horse-battery",
    "ours": OWNER,
    "home": "/home/ada/client/rows.jsonl",
}


@pytest.mark.parametrize("kind", SECRETS)
@pytest.mark.parametrize("name", ["samples.md", "metrics.jsonl", "README.md", "recipe.yaml"])
def test_a_secret_of_any_vendor_is_found_and_not_repeated(kind, name, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", OWNER)
    monkeypatch.setenv("A_VENDORS_PASSWORD", "correct-horse-battery")
    monkeypatch.setenv("HOME", "/home/ada")
    with pytest.raises(UserError, match=rf"^{name}, line 2: holds a ") as error:
        allowed_files.require_no_secret(name, f"fine\nx {SECRETS[kind]} y".encode())
    assert "Z9" not in str(error.value) and "horse" not in str(error.value)


def test_what_only_begins_like_a_secret_is_published(monkeypatch):
    monkeypatch.setenv("SOME_KEY", "/etc/keys/a.pem")
    text = (
        b"hf_ is how a token begins, hf_hub too; ghp_; /etc/keys/a.pem; a@b.example; " + b"0a" * 20
    )
    allowed_files.require_no_secret("samples.md", text)
    allowed_files.require_no_secret("model.safetensors", OWNER.encode())  # no text


@pytest.mark.parametrize("text", ["{", '{"auto_map": {"AutoConfig": "x.C"}}'])
def test_a_config_that_is_damaged_or_names_code_is_refused(text, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({}))
    allowed_files.require_no_remote_code(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(UserError, match=r"tokenizer_config\.json"):
        allowed_files.require_no_remote_code(tmp_path)


@pytest.mark.parametrize(
    "index",
    [
        "[1]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": 1}}',
        "[" * 10**5,
    ],
)
def test_a_damaged_index_is_one_line(index, tmp_path):
    (tmp_path / allowed_files.INDEX).write_text(index)
    with pytest.raises(UserError, match="is damaged"):
        allowed_files.require_weights(tmp_path, allowed_files.MODEL)
