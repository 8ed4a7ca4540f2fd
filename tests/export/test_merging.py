"""Merged weights are base plus adapter, in the base's own number format."""

import json

import pytest
import torch
from run_folders import LORA, copied, train
from safetensors.torch import load_file
from tiny import write_base
from transformers import AutoModelForCausalLM

from finetuning.export.merging import merge
from finetuning.publishing.publishable import merged_if_wanted
from finetuning.recipe.recipe import load_recipe
from finetuning.runs.folder import RunFolder


def test_merged_weights_are_base_and_adapter(runs, tmp_path):
    from peft import PeftModel

    run = runs["lora"]
    merge(RunFolder(run), load_recipe(run / "recipe.yaml"), tmp_path)
    base = AutoModelForCausalLM.from_pretrained(run.parents[1] / "llama")
    ids = torch.tensor([[5, 6, 7, 8]])
    plain = base(ids).logits
    adapted = PeftModel.from_pretrained(base, run)(ids).logits
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits
    assert torch.allclose(merged, adapted, atol=1e-5, rtol=1e-5) and not torch.allclose(
        merged, plain, atol=1e-2
    )
    settings = json.loads((tmp_path / "config.json").read_text())
    assert (
        str(run.parents[1]) not in json.dumps(settings)
        and not (tmp_path / "adapter_config.json").exists()
    )


def test_merged_weights_are_asked_as_the_recipe_says(runs, tmp_path):
    run, changed = (
        runs["lora"],
        ["generation.max_new_tokens=7", "generation.repetition_penalty=1.3"],
    )
    merge(RunFolder(run), load_recipe(run / "recipe.yaml", changed), tmp_path)
    settings = json.loads((tmp_path / "generation_config.json").read_text())
    assert (settings["max_new_tokens"], settings["repetition_penalty"]) == (7, 1.3)
    assert settings["eos_token_id"] == [RunFolder(run).tokenizer.eos_token_id]
    assert settings["do_sample"] is False


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_bases_number_format_is_kept(dtype, tmp_path):
    base = write_base(tmp_path / "base", "llama")
    AutoModelForCausalLM.from_pretrained(base).to(dtype).save_pretrained(base)
    run = train(tmp_path / "trained" / "run", base, LORA, "training.max_steps=2")
    merge(RunFolder(run), load_recipe(run / "recipe.yaml"), tmp_path / "merged")
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {dtype}


def test_only_what_is_wanted_is_merged_and_nothing_stays(runs, tmp_path):
    run = copied(runs["lora"], tmp_path / "run")
    before = sorted(path.name for path in run.iterdir())
    with merged_if_wanted(RunFolder(run), load_recipe(run / "recipe.yaml")) as weights:
        assert weights is None
    with merged_if_wanted(
        RunFolder(run), load_recipe(run / "recipe.yaml", ["publish.merged=true"])
    ) as weights:
        assert (weights / "model.safetensors").exists()
    assert sorted(path.name for path in run.iterdir()) == before
