"""Tokens whose embeddings are trained beside an adapter: some rows by peft, or the whole matrix."""

import pytest
import tiny
import torch
from peft import PeftModel
from trainings import LORA_TARGETS, losses_of, recipe_of, trained, write_rows
from transformers import AutoModelForCausalLM

TOKENS = tiny.byte_level()("t is")["input_ids"]  # in every response
KINDS = {
    "some": f"trainable_token_indices: {TOKENS}",
    "all": "modules_to_save: [embed_tokens]",
}


@pytest.mark.parametrize("kind", KINDS)
def test_trained_embeddings_are_saved_loaded_and_merged(kind, tmp_path):
    base, tokenizer = tmp_path / "base", tiny.byte_level()
    tiny.model_of("llama", vocab_size=len(tokenizer)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    rows = write_rows(tmp_path)
    lora = f"lora={{r: 4, target_modules: {LORA_TARGETS['llama']}, {KINDS[kind]}}}"
    runs = {}
    for layout in ("packed", "padded"):
        recipe = recipe_of(("llama", base), rows, tmp_path / layout, f"data.layout={layout}", lora)
        runs[layout] = trained(recipe)
    assert losses_of(runs["packed"]) == pytest.approx(losses_of(runs["padded"]), rel=1e-5)

    trainer, run = runs["packed"], tmp_path / "packed"
    trainer.save_model(str(run))
    ids = torch.tensor([[7, *TOKENS, 9]])
    expected = trainer.model.eval()(input_ids=ids, use_cache=False).logits
    stock = AutoModelForCausalLM.from_pretrained(base)
    before = stock.get_input_embeddings().weight.clone()
    merged = PeftModel.from_pretrained(stock, run).merge_and_unload()
    torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=0, atol=1e-5)
    changed = (merged.get_input_embeddings().weight != before).any(1).nonzero()[:, 0].tolist()
    assert {*TOKENS} <= {*changed}
    assert kind == "all" or {*TOKENS} == {*changed}
