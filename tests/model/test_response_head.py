"""A head that scores gives the loss of its logits; models whose logits are more are refused."""

import pytest
import tiny
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from finetuning.errors import UserError
from finetuning.model.response_head import ResponseHead, Targets, require_plain_head
from finetuning.recipe.sections import Lora


@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_a_scoring_head_gives_the_loss_and_otherwise_logits(kind):
    model = tiny.model_of(kind)
    ids = torch.randint(5, 500, (2, 9), generator=torch.Generator().manual_seed(1))
    logits = model(input_ids=ids, use_cache=False).logits
    head = ResponseHead(model)
    positions, tokens = torch.tensor([3, 4, 9, 16]), ids.flatten()[[4, 5, 10, 17]]
    with head.scoring(Targets(positions, tokens)):
        total = model(input_ids=ids, use_cache=False).logits
    wanted = F.cross_entropy(logits.flatten(0, 1)[positions], tokens, reduction="sum")
    assert total.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, logits)


@pytest.mark.parametrize("field", ["target_modules", "modules_to_save"])
def test_an_adapter_on_the_head_is_refused(field):
    with pytest.raises(UserError, match="lm_head"):
        require_plain_head(tiny.model_of("llama"), Lora(**{field: ["lm_head"]}))


@pytest.mark.parametrize(
    ("kind", "fields", "complaint"),
    [
        (
            "gpt2",
            {"target_modules": ["c_attn", "c_porj"]},
            "target_modules: no module .* is called c_porj; did .* c_proj?",
        ),
        (
            "gpt2",
            {"target_modules": ["attn"], "exclude_modules": ["mpl.c_fc"]},
            "exclude_modules: .* did you mean c_fc?",
        ),
        ("llama", {"target_modules": ["proj"]}, "called proj; did you mean [a-z]+_proj?"),
        (
            "gpt2",
            {"trainable_token_indices": [5, 6]},
            "trainable_token_indices: the gpt2 model's output layer has",
        ),
        (
            "bloom",
            {"trainable_token_indices": {"word_embeddings": [5]}},
            "trainable_token_indices: the bloom model",
        ),
        ("llama", {"trainable_token_indices": {"lm_head": [5]}}, "lm_head cannot be adapted"),
    ],
)
def test_an_adapter_that_would_not_be_the_requested_one_is_refused(kind, fields, complaint):
    with pytest.raises(UserError, match=f"^lora.*{complaint}"):
        require_plain_head(tiny.model_of(kind), Lora(**fields))


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (
            "gpt2",
            {
                "target_modules": ["c_attn", "mlp.c_proj", "transformer.h.0.mlp.c_fc"],
                "exclude_modules": ["h.1.attn"],
            },
        ),
        ("llama", {"target_modules": "all-linear"}),
        ("llama", {"target_modules": r".*\.(q|k)_proj", "trainable_token_indices": [5, 6]}),
        ("bloom", {}),
    ],
)
def test_modules_are_named_by_the_end_of_their_path_or_by_a_pattern(kind, fields):
    require_plain_head(tiny.model_of(kind), Lora(**fields))


def test_the_old_names_of_a_mixture_s_experts_are_left_to_peft():
    config = AutoConfig.for_model(
        "mixtral", num_local_experts=4, vocab_size=300, **tiny.CONFIGS["llama"]
    )
    model, names = AutoModelForCausalLM.from_config(config), ["q_proj", "w1", "w2", "w3"]
    require_plain_head(model, Lora(target_modules=names))
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=names))
    assert any(
        "experts" in name for name, weight in adapted.named_parameters() if weight.requires_grad
    )


@pytest.mark.parametrize("kind", ["qwen3_moe", "olmoe", "mixtral"])
def test_a_config_that_asks_for_balanced_experts_is_refused(kind):
    experts = "num_local_experts" if kind == "mixtral" else "num_experts"
    model = tiny.model_of(kind, **{experts: 4}, output_router_logits=True)
    with pytest.raises(UserError, match=rf"^model\.name: .* {kind} .*output_router_logits: false$"):
        require_plain_head(model, None)
    model.config.output_router_logits = False
    require_plain_head(model, None)


@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_models_that_return_the_logits_of_their_head_unmodified_pass(kind):
    model = tiny.model_of(kind)
    ResponseHead(model).require_unmodified_logits(model)  # it raises otherwise


def test_a_model_that_changes_what_its_head_returns_is_refused():
    """Gradients would be those of a capped loss: zero where it is large."""
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }
    config = AutoConfig.for_model("recurrent_gemma", vocab_size=300, lru_width=32, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match="logits_soft_cap"):
        require_plain_head(model, None)
    with pytest.raises(UserError, match="recurrent_gemma models scale, cap or cut their logits"):
        ResponseHead(model).require_unmodified_logits(model)


def test_a_factor_that_the_model_does_not_apply_is_noticed():
    model = tiny.model_of("llama")
    model.config.logit_scale = 0.5
    with pytest.raises(UserError, match="llama models scale, cap or cut their logits"):
        ResponseHead(model).require_unmodified_logits(model)
