"""What the libraries would refuse, or silently ignore, is one line before a model is loaded."""

import pytest
from commands import RECIPE, ROWS, write_files

from finetuning.errors import UserError
from finetuning.launch.strategy import Strategy
from finetuning.recipe.recipe import load_recipe
from finetuning.recipe.without_effect import settings_without_effect
from finetuning.training.argument_checks import trial_arguments
from finetuning.training.library_checks import require_library_settings
from finetuning.training.prepared_run import prepare_run

LLAMA = (
    "{model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 2, "
    "num_attention_heads: 2, max_position_embeddings: 64}"
)
GPT2 = "model_type: gpt2, n_layer: 1, n_embd: 8, n_head: 2, n_positions: 64"


@pytest.fixture
def ask(tmp_path):
    """Asks the libraries what they say to the recipe with these overrides."""
    write_files(tmp_path, {"recipe.yaml": RECIPE, "rows.jsonl": ROWS})

    def ask(*overrides):
        recipe = load_recipe(tmp_path / "recipe.yaml", overrides)
        run = prepare_run(recipe, Strategy("single", 1), trains_here=False)
        return require_library_settings(run, trial_arguments(recipe))

    return ask


@pytest.mark.parametrize(
    "overrides",
    [
        ["training.optim=adafactor"],
        ["training.optim=rmsprop", "training.optim_args=momentum=0.1"],
        [
            "training.lr_scheduler_type=cosine_with_min_lr",
            "training.lr_scheduler_kwargs={min_lr: 1e-6}",
        ],
        ["training.lr_scheduler_type=constant_with_warmup", "training.warmup_steps=3"],
        [
            "training.activation_checkpointing=true",
            "training.activation_checkpointing_kwargs={use_reentrant: true}",
        ],
        ["lora={r: 4, target_modules: [c_attn], rank_pattern: {c_attn: 2}}"],
        ["lora={r: 4, modules_to_save: [wpe]}"],
        ["lora={init_lora_weights: pissa}"],
        [f"model.from_scratch.config={LLAMA}", "lora={target_modules: all-linear}"],
        [
            f"model.from_scratch.config={LLAMA}",
            "lora={layer_replication: [[0, 2], [0, 2]], layers_to_transform: [1]}",
        ],
        ["generation={do_sample: true, min_p: 0.1, typical_p: 0.9}"],
        ["generation={num_beams: 3, early_stopping: true, use_cache: false}"],
        ["generation={eos_token_id: [1, 2], suppress_tokens: [3]}"],
        ["training.dataloader_num_workers=2", "training.dataloader_prefetch_factor=2"],
    ],
)
def test_what_the_libraries_can_do_passes(ask, overrides):
    weights = list(ask(*overrides).parameters())
    assert weights
    assert all(weight.is_meta for weight in weights)  # nothing was loaded


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.optim_args=nonsense"], r"^training\.optim: adamw_torch_fused: "),
        (["training.optim_args=a=b"], r"^training\.optim_args: a=b changes nothing"),
        (["training.optim=galore_adamw"], r"^training\.optim: galore_adamw: .*install `galore"),
        (["training.optim=lomo"], r"^training\.optim: lomo: .*install"),
        (["training.metric_for_best_model=los"], r"^training\.metric.* did you mean loss\?"),
        (
            [
                "training.activation_checkpointing=true",
                "training.activation_checkpointing_kwargs={nonsense: 1}",
            ],
            r"^training\.activation_checkpointing_kwargs: .*nonsense",
        ),
        (
            ["training.lr_scheduler_type=cosine_with_min_lr"],
            r"^training\.lr_scheduler_type: .*min_lr",
        ),
        (["training.lr_scheduler_type=greedy"], r"^training: .*requires an eval strategy"),
        (
            ["training.lr_scheduler_kwargs={nonsense: 1}"],
            r"^training\.lr_scheduler_kwargs: the schedule linear has no nonsense",
        ),
        (
            ["training.lr_scheduler_type=polynomial", "training.lr_scheduler_kwargs={powr: 2}"],
            r"did you mean power\?",
        ),
        (
            ["training.lr_scheduler_type=polynomial", "training.lr_scheduler_kwargs={power: x}"],
            r"^training\.lr_scheduler_type: polynomial: ",
        ),
        (
            ["training.lr_scheduler_type=constant", "training.warmup_steps=3"],
            r"^training\.warmup_steps has no effect .* constant_with_warmup",
        ),
        (["training.logging_steps=2.5"], r"^training: .*logging_steps must be an integer"),
        (["training.dataloader_prefetch_factor=2"], r"^training: .*dataloader_num_workers"),
        (["training.debug=x"], r"^training: x is not a valid DebugOption"),
        (["lora.layer_replication=[1]"], r"^lora: "),
        (["lora={layer_replication: [[0, 10000]]}"], "makes 10,000 layers; at most 1,000"),
        (
            ["model.from_scratch.config={model_type: llama, num_hidden_layers: 100000000}"],
            "num_hidden_layers is 100,000,000; at most 1,000",
        ),
        (
            ["model.from_scratch.config={model_type: gpt2, n_layer: 5000}"],
            "num_hidden_layers is 5,000; at most 1,000",
        ),
        (
            ["lora.modules_to_save=[nonsense]"],
            r"^lora\.modules_to_save: no module .* it has c_attn",
        ),
        (["lora.target_modules=[c_atn]"], r"^lora\.target_modules: .*did you mean c_attn\?"),
        (["lora.target_modules=nope"], r"^lora: Target modules nope not found"),
        (["lora.rank_pattern={nonsense: 1}"], r"^lora: .*rank_pattern.* nonsense|'nonsense'"),
        (["lora.alpha_pattern={nonsense: 1}"], r"^lora: .*alpha_pattern"),
        (["lora.layers_to_transform=[5]"], r"there is no layer 5; the model has 1, from 0"),
        (["lora.init_lora_weights=nonsense"], r"^lora: Unknown initialization"),
        (["lora.loftq_config={a: 1}"], r"^lora: .*will be ignored"),
        (["lora.target_parameters=[x]"], r"^lora: .*no parameter was matched"),
        (
            [f"model.from_scratch.config={{{GPT2}, n_head: 0}}".replace("n_head: 2, ", "")],
            "config: ",
        ),
        (
            [f"model.from_scratch.config={{{GPT2}}}".replace("n_layer: 1", "n_layer: 0")],
            "a model has at least one layer",
        ),
        (
            ["model.from_scratch.config={model_type: t5}"],
            "t5 models are not causal language models",
        ),
        (["model.from_scratch.config={model_type: gtp2}"], "gtp2"),
        (
            [f"model.from_scratch.config={{{GPT2}}}".replace("n_positions: 64", "n_positions: 8")],
            r"^data\.max_length: the longest example has 11 tokens, the model reads at most 8",
        ),
        (["generation.cache_implementation=quantized"], r"^generation: .*optimum-quanto"),
        (["generation.eos_token_id=1000000"], r"^generation\.eos_token_id is 1000000; .* below 2"),
        (["generation.suppress_tokens=[999999]"], r"^generation\.suppress_tokens is \[999999\]"),
        (["generation.watermarking_config={a: 1}"], r"^generation: "),
        (["generation.early_stopping=nonsense"], r"^generation: .*early_stopping"),
        (["generation.bad_words_ids=[1]"], r"^generation: .*bad_words_ids"),
        (["generation.exponential_decay_length_penalty=[1]"], r"^generation: "),
    ],
)
def test_what_a_library_refuses_or_ignores_is_one_line(ask, overrides, message):
    with pytest.raises(UserError, match=message) as caught:
        ask(*overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.eval_steps=5", "training.eval_steps has no effect without "),
        ("training.num_train_epochs=5", "training.num_train_epochs has no effect without "),
        ("generation.temperature=0.5", "generation.temperature has no effect without "),
        ("generation.length_penalty=0.5", "generation.length_penalty has no effect without "),
        ("training.save_steps=5", None),
        ("generation.max_new_tokens=5", None),
    ],
)
def test_a_setting_that_another_one_switches_off_is_said(tmp_path, override, said):
    write_files(tmp_path, {"recipe.yaml": RECIPE})
    lines = settings_without_effect(load_recipe(tmp_path / "recipe.yaml", [override]))
    assert [line[: len(said or "")] for line in lines] == ([said] if said else [])
