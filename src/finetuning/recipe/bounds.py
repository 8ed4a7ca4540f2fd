"""Between which numbers a setting of the libraries makes sense, as arguments of pydantic.Field.

The libraries check few of them: a learning rate of 1e9, a beta of 2 or a negative clip norm trains
NaN, fails in the optimizer or is silently ignored. NaN and infinity are refused everywhere, see
`section.Section`. A test holds that every number of the libraries has its line here.
"""

COUNT = {"ge": 1, "le": 10**9}
COUNT_OR_NONE = {"ge": 0, "le": 10**9}
STEPS = {"gt": 0, "le": 10**9}  # below 1: a share of all steps
SHARE = {"gt": 0, "le": 1}
SHARE_OR_NONE = {"ge": 0, "le": 1}
SHARE_BELOW_ONE = {"ge": 0, "lt": 1}
FACTOR = {"gt": 0, "le": 1000}
SEED = {"ge": 0, "lt": 2**32}  # what numpy takes
TOKEN = {"ge": 0, "lt": 2**31}

BOUNDS: dict[str, dict[str, dict[str, int]]] = {
    "training": {
        "num_train_epochs": {"gt": 0, "le": 10**6},
        "max_steps": {"ge": -1, "le": 10**9},  # -1: as many as num_train_epochs has
        "learning_rate": {"ge": 0, "le": 10},
        "warmup_steps": COUNT_OR_NONE,
        "weight_decay": {"ge": 0, "le": 10},
        "adam_beta1": SHARE_BELOW_ONE,
        "adam_beta2": SHARE_BELOW_ONE,
        "adam_epsilon": SHARE,
        "max_grad_norm": {"ge": 0, "le": 10**9},  # 0: gradients are not clipped
        "neftune_noise_alpha": {"gt": 0, "le": 1000},
        "torch_empty_cache_steps": COUNT,
        "logging_steps": STEPS,
        "eval_steps": STEPS,
        "save_steps": STEPS,
        "eval_delay": COUNT_OR_NONE,
        "eval_accumulation_steps": COUNT,
        "save_total_limit": COUNT,
        "seed": SEED,
        "data_seed": SEED,
        "per_device_train_batch_size": {"ge": 1, "le": 10**6},
        "per_device_eval_batch_size": {"ge": 1, "le": 10**6},
        "gradient_accumulation_steps": {"ge": 1, "le": 10**6},
        "dataloader_num_workers": {"ge": 0, "le": 1000},
        "dataloader_prefetch_factor": {"ge": 1, "le": 1000},
        "ddp_bucket_cap_mb": {"ge": 1, "le": 10**6},
        "ddp_timeout": {"ge": 1, "le": 10**7},  # seconds
    },
    "lora": {
        "r": {"ge": 1, "le": 2**16},
        "lora_alpha": {"ge": 1, "le": 10**6},
        "lora_dropout": SHARE_BELOW_ONE,
        "layers_to_transform": {"ge": 0, "le": 10**4},
        "qalora_group_size": COUNT,
    },
    "generation": {
        "min_length": COUNT_OR_NONE,
        "max_new_tokens": {"ge": 1, "le": 10**6},
        "min_new_tokens": COUNT_OR_NONE,
        "max_time": STEPS,  # seconds
        "num_beams": {"ge": 1, "le": 1000},
        "max_cache_len": COUNT,
        "temperature": FACTOR,
        "top_k": COUNT_OR_NONE,
        "top_p": SHARE,
        "min_p": SHARE_OR_NONE,
        "top_h": SHARE,
        "typical_p": SHARE,
        "epsilon_cutoff": SHARE_BELOW_ONE,
        "eta_cutoff": SHARE_BELOW_ONE,
        "repetition_penalty": FACTOR,
        "encoder_repetition_penalty": FACTOR,
        "length_penalty": {"ge": -1000, "le": 1000},
        "no_repeat_ngram_size": COUNT_OR_NONE,
        "encoder_no_repeat_ngram_size": COUNT_OR_NONE,
        "forced_bos_token_id": TOKEN,
        "forced_eos_token_id": TOKEN,
        "pad_token_id": TOKEN,
        "bos_token_id": TOKEN,
        "eos_token_id": TOKEN,
        "decoder_start_token_id": TOKEN,
        "guidance_scale": {"gt": 0, "le": 1000},
        "num_assistant_tokens": COUNT,
        "assistant_confidence_threshold": SHARE_OR_NONE,
        "prompt_lookup_num_tokens": COUNT,
        "max_matching_ngram_size": COUNT,
        "assistant_early_exit": COUNT,
        "assistant_lookbehind": COUNT,
        "target_lookbehind": COUNT,
        "assistant_ensemble_weight": SHARE_OR_NONE,
    },
}
