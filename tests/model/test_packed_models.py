"""What models attend by when nothing is packed, and which models cannot be packed."""

import pytest
import tiny
import torch
from packed_batches import LENGTHS, flat

from finetuning.errors import UserError
from finetuning.model.packed_models import use_packed_attention


def test_a_model_whose_attention_is_more_than_sdpa_is_refused():
    model = tiny.model_of("gpt_oss", num_local_experts=4, head_dim=8)
    with pytest.raises(
        UserError, match=r"^data\.layout: packed, but gpt_oss .*eager.*sinks.*data\.layout=padded$"
    ):
        use_packed_attention(model)


def test_packing_by_transformers_in_the_same_process_is_what_it_was():
    """Restarting positions without a mask: it has to look at them, which ours need not."""
    model = tiny.model_of("llama")
    ids, positions = flat()
    with torch.no_grad():
        alone = [model(input_ids=part).logits for part in ids.split(LENGTHS, dim=1)]
        together = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(together, torch.cat(alone, dim=1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_generation_is_what_it_was(kind):
    model = tiny.model_of(kind)
    ids = torch.tensor([[0, 0, 7, 8, 9], [11, 12, 13, 14, 15]])
    mask = (ids != 0).long()
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    before = model.generate(input_ids=ids, attention_mask=mask, **settings)
    use_packed_attention(model)
    assert torch.equal(before, model.generate(input_ids=ids, attention_mask=mask, **settings))
