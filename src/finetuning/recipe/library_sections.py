"""The fields of trl, peft and transformers that a recipe may set; written by `make schema`."""

from typing import Annotated, Any, Literal

from pydantic import Field

from finetuning.section import Section


class SFTConfigFields(Section):
    """Of trl.SFTConfig, those that no other section owns."""

    output_dir: str | None = None
    """The output directory where the model predictions and checkpoints will be written."""
    per_device_train_batch_size: int = Field(default=8, ge=1, le=1000000)
    """The batch size per device for training."""
    num_train_epochs: float = Field(default=3.0, gt=0, le=1000000)
    """Total number of training epochs to perform."""
    max_steps: int = Field(default=-1, ge=-1, le=1000000000)
    """Overrides `num_train_epochs`."""
    learning_rate: float = Field(default=2e-05, ge=0, le=10)
    """The initial learning rate for AdamW."""
    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
        "reduce_lr_on_plateau",
        "cosine_with_min_lr",
        "cosine_warmup_with_min_lr",
        "warmup_stable_decay",
        "greedy",
    ] = "linear"
    """The learning rate scheduler type to use."""
    lr_scheduler_kwargs: str | dict[str, Any] | None = None
    """Additional parameters for the lr_scheduler, such as {'num_cycles': 1} for cosine with hard
    restarts."""
    warmup_steps: float = Field(default=0, ge=0, le=1000000000)
    """Number of steps for a linear warmup from 0 to `learning_rate`."""
    optim: Literal[
        "adamw_torch",
        "adamw_torch_fused",
        "adamw_torch_xla",
        "adamw_torch_npu_fused",
        "adafactor",
        "adamw_anyprecision",
        "adamw_torch_4bit",
        "adamw_torch_8bit",
        "ademamix",
        "sgd",
        "adagrad",
        "adamw_bnb_8bit",
        "adamw_8bit",
        "ademamix_8bit",
        "lion_8bit",
        "lion_32bit",
        "paged_adamw_32bit",
        "paged_adamw_8bit",
        "paged_ademamix_32bit",
        "paged_ademamix_8bit",
        "paged_lion_32bit",
        "paged_lion_8bit",
        "rmsprop",
        "rmsprop_bnb",
        "rmsprop_bnb_8bit",
        "rmsprop_bnb_32bit",
        "galore_adamw",
        "galore_adamw_8bit",
        "galore_adafactor",
        "galore_adamw_layerwise",
        "galore_adamw_8bit_layerwise",
        "galore_adafactor_layerwise",
        "lomo",
        "adalomo",
        "grokadamw",
        "schedule_free_radam",
        "schedule_free_adamw",
        "schedule_free_sgd",
        "apollo_adamw",
        "apollo_adamw_layerwise",
        "stable_adamw",
    ] = "adamw_torch_fused"
    """The optimizer to use."""
    optim_args: str | None = None
    """Optional arguments supplied to optimizers such as AnyPrecisionAdamW, AdEMAMix, and GaLore."""
    weight_decay: float = Field(default=0.0, ge=0, le=10)
    """Weight decay coefficient applied by the optimizer."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """The exponential decay rate for the first moment estimates (momentum) in Adam-based
    optimizers."""
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    """The exponential decay rate for the second moment estimates (variance) in Adam-based
    optimizers."""
    adam_epsilon: float = Field(default=1e-08, gt=0, le=1)
    """Epsilon value for numerical stability in Adam-based optimizers."""
    optim_target_modules: str | list[Any] | None = None
    """The target modules to optimize."""
    gradient_accumulation_steps: int = Field(default=1, ge=1, le=1000000)
    """Number of update steps to accumulate gradients before performing a backward/update pass."""
    max_grad_norm: float = Field(default=1.0, ge=0, le=1000000000)
    """Maximum gradient norm for gradient clipping."""
    bf16: bool | None = None
    """Whether to use bf16 (mixed) precision instead of 32-bit."""
    fp16: bool = False
    """Enable float16 (FP16) mixed precision training."""
    bf16_full_eval: bool = False
    """Use full BF16 precision for evaluation (not just mixed precision)."""
    fp16_full_eval: bool = False
    """Use full FP16 precision for evaluation (not just mixed precision)."""
    tf32: bool | None = None
    """Enable TF32 mode on Ampere and newer GPUs."""
    activation_checkpointing: bool | None = None
    """Enable activation checkpointing to trade compute for memory."""
    activation_checkpointing_kwargs: str | dict[str, Any] | None = None
    """Keyword arguments passed to `activation_checkpointing_enable()`."""
    torch_compile: bool = False
    """Compile the model using `torch.compile()` for faster training."""
    torch_compile_backend: str | None = None
    """Backend for `torch.compile()`."""
    torch_compile_mode: str | None = None
    """Compilation mode for `torch.compile()`."""
    use_cache: bool = False
    """Whether or not to use cache for the model For training, this is usually not needed apart from
    some PEFT methods that uses `past_key_values`."""
    neftune_noise_alpha: float | None = Field(default=None, gt=0, le=1000)
    """If not None, activates NEFTune noise embeddings."""
    torch_empty_cache_steps: int | None = Field(default=None, ge=1, le=1000000000)
    """Number of steps to wait before calling `torch.<device>.empty_cache()`."""
    auto_find_batch_size: bool = False
    """Whether to find a training batch size that will fit into memory automatically through
    exponential decay, avoiding CUDA Out-of-Memory errors."""
    logging_strategy: Literal["no", "steps", "epoch"] = "steps"
    """The logging strategy to adopt during training."""
    logging_steps: float = Field(default=10, gt=0, le=1000000000)
    """Log every X updates steps."""
    logging_first_step: bool = False
    """Whether to log the first `global_step` or not."""
    log_on_each_node: bool = True
    """When doing a multinode distributed training, whether to log once per node or just once on the
    main node."""
    logging_nan_inf_filter: bool = True
    """Filter out NaN and Inf training and evaluation losses when logging."""
    include_num_input_tokens_seen: bool | str = "no"
    """Whether to track the number of input tokens seen."""
    log_level: Literal["detail", "debug", "info", "warning", "error", "critical", "passive"] = (
        "passive"
    )
    """Logging level for the main process."""
    log_level_replica: Literal[
        "detail", "debug", "info", "warning", "error", "critical", "passive"
    ] = "warning"
    """Logging level for replica processes in distributed training."""
    disable_tqdm: bool | None = None
    """Disable tqdm progress bars."""
    report_to: (
        Literal[
            "none",
            "azure_ml",
            "clearml",
            "codecarbon",
            "comet_ml",
            "dagshub",
            "dvclive",
            "flyte",
            "kubeflow",
            "mlflow",
            "neptune",
            "swanlab",
            "tensorboard",
            "trackio",
            "wandb",
        ]
        | list[
            Literal[
                "none",
                "azure_ml",
                "clearml",
                "codecarbon",
                "comet_ml",
                "dagshub",
                "dvclive",
                "flyte",
                "kubeflow",
                "mlflow",
                "neptune",
                "swanlab",
                "tensorboard",
                "trackio",
                "wandb",
            ]
        ]
        | None
    ) = "none"
    """The loggers to use."""
    run_name: str | None = None
    """An optional descriptor for the run."""
    project: str = "huggingface"
    """The name of the project to use for logging."""
    trackio_space_id: str | None = None
    """Hugging Face Space id for live Gradio-based Trackio logging (read/write Bucket access)."""
    trackio_bucket_id: str | None = None
    """Optional HF Bucket id when using a Trackio Space; if unset, Trackio picks a default."""
    trackio_static_space_id: Literal[False] | None = None
    """Static read-only Trackio Space over the Bucket (stable model-card links)."""
    eval_strategy: Literal["no", "steps", "epoch"] = "no"
    """When to run evaluation."""
    eval_steps: float | None = Field(default=None, gt=0, le=1000000000)
    """Number of update steps between evaluations if `eval_strategy='steps'`."""
    eval_delay: float = Field(default=0, ge=0, le=1000000000)
    """Number of epochs or steps to wait for before the first evaluation can be performed, depending
    on the eval_strategy."""
    per_device_eval_batch_size: int | None = Field(default=None, ge=1, le=1000000)
    """The batch size per device (GPU/TPU core/CPU) for evaluation."""
    prediction_loss_only: bool = False
    """When performing evaluation and generating predictions, only returns the loss."""
    eval_do_concat_batches: bool = True
    """Whether to recursively concat inputs/losses/labels/predictions across batches."""
    eval_use_gather_object: bool = False
    """Whether to run recursively gather object in a nested list/tuple/dictionary of objects from
    all devices."""
    eval_accumulation_steps: int | None = Field(default=None, ge=1, le=1000000000)
    """Number of predictions steps to accumulate the output tensors for, before moving the results
    to the CPU."""
    include_for_metrics: list[Any] | None = None
    """Include additional data in the `compute_metrics` function."""
    batch_eval_metrics: bool = False
    """Break eval metrics calculation into batches to save memory."""
    save_strategy: Literal["no", "steps", "epoch", "best"] = "steps"
    """The checkpoint save strategy to adopt during training."""
    save_steps: float = Field(default=500, gt=0, le=1000000000)
    """Save checkpoint every X updates steps."""
    save_total_limit: int | None = Field(default=None, ge=1, le=1000000000)
    """Maximum number of checkpoints to keep."""
    load_best_model_at_end: bool = False
    """Load the best checkpoint at the end of training."""
    metric_for_best_model: str | None = None
    """Metric to use for comparing models when `load_best_model_at_end=True`."""
    greater_is_better: bool | None = None
    """Whether higher metric values are better."""
    full_determinism: bool = False
    """Whether to call enable_full_determinism instead of set_seed for reproducibility in
    distributed training."""
    seed: int = Field(default=42, ge=0, lt=4294967296)
    """Random seed that will be set at the beginning of training."""
    data_seed: int | None = Field(default=None, ge=0, lt=4294967296)
    """Random seed to be used with data samplers."""
    use_cpu: bool = False
    """Whether or not to use cpu."""
    dataloader_num_workers: int = Field(default=0, ge=0, le=1000)
    """Number of subprocesses to use for data loading (PyTorch only)."""
    dataloader_pin_memory: bool = True
    """Whether or not to pin memory for DataLoader."""
    dataloader_persistent_workers: bool = False
    """If True, the data loader will not shut down the worker processes after a dataset has been
    consumed once."""
    dataloader_prefetch_factor: int | None = Field(default=None, ge=1, le=1000)
    """Number of batches loaded in advance by each worker."""
    dataloader_multiprocessing_context: Literal["fork", "spawn", "forkserver"] | None = None
    """The multiprocessing start method to use for data loading workers ('fork', 'spawn', or
    'forkserver')."""
    dataloader_in_order: bool = True
    """If True (default), the data loader yields batches in the order workers were dispatched."""
    ddp_find_unused_parameters: bool | None = None
    """When using distributed training, the value of the flag `find_unused_parameters` passed to
    `DistributedDataParallel`."""
    ddp_bucket_cap_mb: int | None = Field(default=None, ge=1, le=1000000)
    """When using distributed training, the value of the flag `bucket_cap_mb` passed to
    `DistributedDataParallel`."""
    ddp_broadcast_buffers: bool | None = None
    """When using distributed training, the value of the flag `broadcast_buffers` passed to
    `DistributedDataParallel`."""
    ddp_static_graph: bool | None = None
    """When using distributed training, the value of the flag `static_graph` passed to
    `DistributedDataParallel`."""
    ddp_backend: Literal["nccl", "gloo", "mpi", "xccl", "hccl", "cncl", "mccl"] | None = None
    """The backend to use for distributed training."""
    ddp_timeout: int = Field(default=1800, ge=1, le=10000000)
    """The timeout for `torch.distributed.init_process_group` calls (in seconds)."""
    debug: str | list[Any] = ""
    """Enable one or more debug features."""
    skip_memory_metrics: bool = True
    """Whether to skip adding memory profiler reports to metrics."""
    activation_offloading: bool = False
    """Whether to offload the activations to the CPU."""


class LoraConfigFields(Section):
    """Of peft.LoraConfig, those that no other section owns."""

    r: int = Field(default=8, ge=1, le=65536)
    """Lora attention dimension"""
    target_modules: str | list[Any] | None = None
    """List of module names of the module names to replace with LoRA."""
    exclude_modules: str | list[Any] | None = None
    """List of module names or regex expression of the module names to exclude from Lora."""
    lora_alpha: int = Field(default=8, ge=1, le=1000000)
    """Lora alpha"""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Lora dropout"""
    fan_in_fan_out: bool = False
    """Set this to True if the layer to replace stores weight like (fan_in, fan_out)"""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Bias type for Lora."""
    use_rslora: bool = False
    """When set to True, uses [Rank-Stabilized LoRA](https://huggingface.co/papers/2312.03732) which
    sets the adapter scaling factor to `lora_alpha/math.sqrt(r)`, since it was proven to work
    better."""
    modules_to_save: list[Any] | None = None
    """List of modules apart from LoRA layers to be set as trainable and saved in the final
    checkpoint."""
    init_lora_weights: bool | str = True
    """How to initialize the weights of the LoRA layers."""
    layers_to_transform: Annotated[int, Field(ge=0, le=10000)] | list[Any] | None = None
    """The layer indexes to transform, is this argument is specified, PEFT will transform only the
    layers indexes that are specified inside this list."""
    layers_pattern: str | list[Any] | None = None
    """The layer pattern name, used only if `layers_to_transform` is different to None and if the
    layer pattern is not in the common layers pattern.This only works when target_modules is a list
    of str."""
    rank_pattern: dict[str, Any] | None = None
    """The mapping from layer names or regexp expression to ranks which are different from the
    default rank specified by `r`."""
    alpha_pattern: dict[str, Any] | None = None
    """The mapping from layer names or regexp expression to alphas which are different from the
    default alpha specified by `lora_alpha`."""
    megatron_config: dict[str, Any] | None = None
    """The TransformerConfig from Megatron."""
    megatron_core: str | None = "megatron.core"
    """The core module from Megatron, it is used to create LoRA's parallel linear layer."""
    trainable_token_indices: list[Any] | dict[str, Any] | None = None
    """Lets you specify which token indices to selectively fine-tune without requiring to re-train
    the whole embedding matrix using the `peft.TrainableTokensModel` method."""
    loftq_config: dict[str, Any] | None = None
    """The configuration of LoftQ."""
    eva_config: dict[str, Any] | None = None
    """The configuration of EVA."""
    corda_config: dict[str, Any] | None = None
    """The configuration of CorDA."""
    lora_ga_config: dict[str, Any] | None = None
    """The configuration of LoRA-GA."""
    use_dora: bool = False
    """Enable <a href='https://huggingface.co/papers/2402.09353'>'Weight-Decomposed Low-Rank
    Adaptation' (DoRA)</a>."""
    velora_config: dict[str, Any] | None = None
    """Enable VeLoRA as a LoRA variant by providing a VeloraConfig."""
    alora_invocation_tokens: list[Any] | None = None
    """If not None, enable <a href='https://huggingface.co/papers/2504.12397'>'Activated LoRA'
    (aLoRA)</a>, with alora_invocation_tokens being the tokenized invocation string for the adapter
    (must be present in all model input strings)."""
    use_qalora: bool = False
    """It is only implemented in GPTQ for now."""
    qalora_group_size: int = Field(default=16, ge=1, le=1000000000)
    """Group size parameter for QALoRA pooling, controlling the dimension reduction factor."""
    monteclora_config: dict[str, Any] | None = None
    """The configuration of Monteclora (Monte Carlo Low-Rank Adaptation)."""
    layer_replication: list[Any] | None = None
    """This enables using LoRA to effectively expand a transformer model to a larger size by
    repeating some layers."""
    lora_bias: bool = False
    """Whether to enable the bias term for the LoRA B parameter."""
    target_parameters: list[Any] | None = None
    """List of parameter names or regex expression of the parameter names to replace with LoRA."""
    use_bdlora: dict[str, Any] | None = None
    """Enable BD-LoRA (Block-Diagonal LoRA) by providing a BdLoraConfig."""
    arrow_config: dict[str, Any] | None = None
    """The necessary config to apply arrow routing on the model."""
    kasa_config: dict[str, Any] | None = None
    """Enable KaSA (Knowledge-aware Singular-value Adaptation) as a LoRA variant by providing a
    `KasaConfig`."""
    ensure_weight_tying: bool = False
    """Whether to tie weights or not after peft initialization."""


class GenerationConfigFields(Section):
    """Of transformers.GenerationConfig, those that no other section owns."""

    max_new_tokens: int | None = Field(default=None, ge=1, le=1000000)
    min_length: int | None = Field(default=None, ge=0, le=1000000000)
    min_new_tokens: int | None = Field(default=None, ge=0, le=1000000000)
    early_stopping: bool | str | None = None
    max_time: float | None = Field(default=None, gt=0, le=1000000000)
    do_sample: bool | None = None
    num_beams: int | None = Field(default=None, ge=1, le=1000)
    use_mtp: bool | None = None
    use_cache: bool | None = None
    cache_implementation: str | None = None
    cache_config: dict[str, Any] | None = None
    max_cache_len: int | None = Field(default=None, ge=1, le=1000000000)
    temperature: float | None = Field(default=None, gt=0, le=1000)
    top_k: int | None = Field(default=None, ge=0, le=1000000000)
    top_p: float | None = Field(default=None, gt=0, le=1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    top_h: float | None = Field(default=None, gt=0, le=1)
    typical_p: float | None = Field(default=None, gt=0, le=1)
    epsilon_cutoff: float | None = Field(default=None, ge=0, lt=1)
    eta_cutoff: float | None = Field(default=None, ge=0, lt=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=1000)
    encoder_repetition_penalty: float | None = Field(default=None, gt=0, le=1000)
    length_penalty: float | None = Field(default=None, ge=-1000, le=1000)
    no_repeat_ngram_size: int | None = Field(default=None, ge=0, le=1000000000)
    bad_words_ids: list[Any] | None = None
    renormalize_logits: bool | None = None
    forced_bos_token_id: int | None = Field(default=None, ge=0, lt=2147483648)
    forced_eos_token_id: Annotated[int, Field(ge=0, lt=2147483648)] | list[Any] | None = None
    remove_invalid_values: bool | None = None
    exponential_decay_length_penalty: list[Any] | None = None
    suppress_tokens: list[Any] | None = None
    begin_suppress_tokens: list[Any] | None = None
    sequence_bias: dict[str, Any] | None = None
    guidance_scale: float | None = Field(default=None, gt=0, le=1000)
    watermarking_config: dict[str, Any] | None = None
    pad_token_id: int | None = Field(default=None, ge=0, lt=2147483648)
    bos_token_id: int | None = Field(default=None, ge=0, lt=2147483648)
    eos_token_id: Annotated[int, Field(ge=0, lt=2147483648)] | list[Any] | None = None
    encoder_no_repeat_ngram_size: int | None = Field(default=None, ge=0, le=1000000000)
    decoder_start_token_id: Annotated[int, Field(ge=0, lt=2147483648)] | list[Any] | None = None
    num_assistant_tokens: int | None = Field(default=None, ge=1, le=1000000000)
    num_assistant_tokens_schedule: str | None = None
    assistant_confidence_threshold: float | None = Field(default=None, ge=0, le=1)
    prompt_lookup_num_tokens: int | None = Field(default=None, ge=1, le=1000000000)
    max_matching_ngram_size: int | None = Field(default=None, ge=1, le=1000000000)
    assistant_early_exit: int | None = Field(default=None, ge=1, le=1000000000)
    assistant_lookbehind: int | None = Field(default=None, ge=1, le=1000000000)
    target_lookbehind: int | None = Field(default=None, ge=1, le=1000000000)
    assistant_ensemble_weight: float | None = Field(default=None, ge=0, le=1)
    speculation_type: str | None = None
