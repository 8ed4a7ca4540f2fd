"""Keys of the libraries that a recipe does not take, with their owner or new name."""

# Fields of trl.DPOConfig that SFTConfig does not have, or another meaning of.
PREFERENCE_KEYS = (
    *("beta", "loss_type", "loss_weights", "label_smoothing", "ld_alpha", "discopop_tau"),
    *("f_divergence_type", "f_alpha_divergence_coef", "disable_dropout"),
)

# Values of training.loss_type that are not supported, and why.
REFUSED_LOSSES = {
    **dict.fromkeys(
        ("aot", "aot_unpaired"),
        "sorts the pairs of a micro-batch, so that it depends on how a step is divided",
    ),
    "kto": "compares with other prompts of a micro-batch, so that it depends on how a step is "
    "divided",
}

# Fields of the libraries that another section owns (or that nobody may set), with the owner.
OWNED = {
    "training": {
        **dict.fromkeys(("max_length", "truncation_mode"), "data.max_length and data.overflow"),
        **dict.fromkeys(
            ("packing", "packing_strategy", "padding_free", "eval_packing"), "data.layout"
        ),
        **dict.fromkeys(("completion_only_loss", "assistant_only_loss"), "data.loss_on"),
        **dict.fromkeys(
            ("dataset_text_field", "dataset_kwargs", "chat_template_path", "eos_token"),
            "data.template",
        ),
        **dict.fromkeys(
            ("dataset_num_proc", "shuffle_dataset", "remove_unused_columns"), "the data section"
        ),
        **dict.fromkeys(("label_names", "pad_token", "pad_to_multiple_of"), "data.layout"),
        **dict.fromkeys(("train_sampling_strategy", "length_column_name"), "data.order"),
        **dict.fromkeys(("model_init_kwargs", "trust_remote_code"), "the model section"),
        **dict.fromkeys(
            ("push_to_hub", "hub_model_id", "hub_strategy", "hub_always_push"),
            "the publish section",
        ),
        **dict.fromkeys(("hub_private_repo", "hub_revision"), "the publish section"),
        "hub_token": "the environment variable HF_TOKEN",
        **dict.fromkeys(
            ("fsdp", "fsdp_config", "deepspeed", "parallelism_config"), "accelerate_configs/"
        ),
        **dict.fromkeys(("local_rank", "accelerator_config"), "accelerate_configs/"),
        **dict.fromkeys(
            ("label_smoothing_factor", "router_aux_loss_coef"),
            "the loss: plain cross-entropy",
        ),
        **dict.fromkeys(PREFERENCE_KEYS, "recipes of src/dpo.py, whose data.reader reads pairs"),
        **dict.fromkeys(
            ("precompute_ref_log_probs", "precompute_ref_batch_size"),
            "the reference: its log-probabilities are always computed once, before training",
        ),
        **dict.fromkeys(
            ("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"),
            "the reference, which stays as it is: TR-DPO is not supported",
        ),
        "use_weighting": "the loss, which is of log-probabilities alone: WPO is not supported",
        "average_tokens_across_devices": "the loss: every trained token of a step weighs the same, "
        "on all processes",
        **dict.fromkeys(("use_liger_kernel", "liger_kernel_config"), "the loss: fused without it"),
        "dataloader_drop_last": "data.order: an epoch has every example once",
        **dict.fromkeys(
            (
                "resume_from_checkpoint",
                "save_only_model",
                "ignore_data_skip",
                "enable_jit_checkpoint",
            ),
            "the run folder: the same command again resumes exactly where the run stopped",
        ),
        **dict.fromkeys(
            ("restore_callback_states_from_checkpoint", "save_on_each_node"),
            "the run folder: one, that every machine sees",
        ),
        **dict.fromkeys(("do_train", "do_eval", "do_predict"), "the script that is run"),
        "eval_on_start": "data.eval: the evaluation set is evaluated before the first step, to "
        "compare with",
    },
    "lora": {
        **dict.fromkeys(("base_model_name_or_path", "revision"), "model.name and model.revision"),
        **dict.fromkeys(
            ("task_type", "peft_type", "peft_version", "inference_mode", "auto_mapping"),
            "src/sft.py",
        ),
        "runtime_config": "src/sft.py",
    },
    "generation": {
        "max_length": "generation.max_new_tokens",
        **dict.fromkeys(
            ("num_return_sequences", "return_dict_in_generate"),
            "src/generate.py: an answer a question",
        ),
        "is_assistant": "src/generate.py: the model answers by itself",
        **dict.fromkeys(
            ("stop_strings", "token_healing"), "data.template: answers end where its responses end"
        ),
        **dict.fromkeys(
            ("output_attentions", "output_hidden_states", "output_scores", "output_logits"),
            "src/generate.py: an answer is its text",
        ),
        **dict.fromkeys(
            ("compile_config", "disable_compile", "continuous_batching_config"),
            "src/generate.py: a question at a time, nothing is compiled",
        ),
    },
}


# Keys that the libraries renamed or dropped, or that live here under another name, with what to
# write instead.
RENAMED = {
    "torch_dtype": "model.dtype",
    "model_name_or_path": "model.name",
    "model_revision": "model.revision",
    "load_in_8bit": "model.quantization: 8bit",
    "load_in_4bit": "model.quantization: 4bit",
    "use_peft": "a lora section",
    "lora_r": "lora.r",
    "dataset_name": "data.path",
    "max_seq_length": "data.max_length",
    "warmup_ratio": "training.warmup_steps (a number below 1 is a share of all steps)",
    "evaluation_strategy": "training.eval_strategy",
    "group_by_length": "data.order: by_length",
    "gradient_checkpointing": "training.activation_checkpointing",
    "gradient_checkpointing_kwargs": "training.activation_checkpointing_kwargs",
    "no_cuda": "training.use_cpu",
    "per_gpu_train_batch_size": "training.per_device_train_batch_size",
    "per_gpu_eval_batch_size": "training.per_device_eval_batch_size",
    "overwrite_output_dir": "another training.output_dir (the key is gone: a run folder is never "
    "overwritten)",
    "save_safetensors": "nothing (the key is gone: weights are always safetensors)",
    "logging_dir": "nothing (the key is gone: logs go to <training.output_dir>/runs)",
    "push_to_hub_model_id": "publish.repo",
    **dict.fromkeys(
        (
            "constraints",
            "diversity_penalty",
            "dola_layers",
            "force_words_ids",
            "low_memory",
            "num_beam_groups",
            "penalty_alpha",
            "prefill_chunk_size",
        ),
        "nothing (the key is gone: transformers no longer has what it was for)",
    ),
}
