"""What we override or touch of the libraries, and they call private or do not document, is there.

An upgrade that renames one of these fails here, by its name, and not in the middle of a run.
"""

import ast
import importlib.util
import inspect
import os
from pathlib import Path

import peft
import pytest
import torch
import transformers
from accelerate import Accelerator
from conftest import ROOT
from transformers import Trainer, TrainingArguments
from transformers.models.bloom.modeling_bloom import BloomAttention
from trl import SFTConfig

TRAINERS = {
    "ResumableTrainer": ROOT / "src" / "finetuning" / "training" / "resumable.py",
    "ResponseTrainer": ROOT / "src" / "finetuning" / "training" / "trainer.py",
}
# method of Trainer: the arguments it is called with or handed, in this order
CALLED = {
    "train": ["resume_from_checkpoint"],
    "create_optimizer": ["model"],
    "_run_epoch": ["model", "epoch", "train_dataloader", "steps_in_epoch"],
    "_evaluate": ["trial", "ignore_keys_for_eval", "skip_scheduler"],
    "_determine_best_metric": ["metrics", "trial"],
    "_get_output_dir": ["trial"],
    "_save_checkpoint": ["model", "trial"],
    "_save_rng_state": ["output_dir"],
    "_save": ["output_dir", "state_dict"],
    "_prepare_inputs": ["inputs"],
    "get_batch_samples": ["epoch_iterator", "num_batches", "device"],
    "_get_num_items_in_batch": ["batch_samples", "device"],
    "get_train_dataloader": [],
    "get_eval_dataloader": ["eval_dataset"],
    "training_step": ["model", "inputs", "num_items_in_batch"],
    "compute_loss": ["model", "inputs", "return_outputs", "num_items_in_batch"],
    "prediction_step": ["model", "inputs", "prediction_loss_only", "ignore_keys"],
    "evaluation_loop": ["dataloader", "description", "prediction_loss_only", "ignore_keys"],
    "log": ["logs", "start_time"],
    "floating_point_ops": ["inputs"],
    "save_model": ["output_dir"],
    "compute_loss_context_manager": [],
}
# attributes of Trainer, set by the method named
SET_IN = {
    "_tr_loss": "_inner_training_loop",
    "_total_loss_scalar": "_inner_training_loop",
    "_globalstep_last_logged": "_inner_training_loop",
    "_train_batch_size": "__init__",
    "model_accepts_loss_kwargs": "__init__",
    "model_wrapped": "__init__",
}


def parameters(function: object) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def overridden(name: str) -> set[str]:
    """Every method of our trainer that Trainer has too."""
    (trainer,) = (
        node
        for node in ast.parse(TRAINERS[name].read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name == name
    )
    own = {node.name for node in trainer.body if isinstance(node, ast.FunctionDef)}
    return own & set(dir(Trainer)) - {"__init__"}


@pytest.mark.parametrize("name", TRAINERS)
def test_every_method_that_is_overridden_is_listed(name):
    assert overridden(name) <= CALLED.keys()


@pytest.mark.parametrize("method", CALLED)
def test_trainer_has_the_method_with_these_arguments(method):
    wanted = CALLED[method]
    assert parameters(getattr(Trainer, method))[: len(wanted)] == wanted


@pytest.mark.parametrize("attribute", SET_IN)
def test_trainer_sets_the_attribute(attribute):
    source = inspect.getsource(getattr(Trainer, SET_IN[attribute]))
    assert f"self.{attribute} = " in source


def test_trainer_calls_what_we_override_where_it_counts():
    source = inspect.getsource(Trainer)
    for call in (
        "self.create_optimizer(",
        "self._run_epoch(",
        "self._evaluate(",
        "self._get_output_dir(",
        "self._save_rng_state(",
        "self._save(",
        "self._prepare_inputs(",
        "self.get_batch_samples(",
    ):
        assert call in source, call


def test_the_running_loss_is_taken_back_in_place():
    """restore_counters adds to the tensor that transformers passes on as tr_loss."""
    assert "tr_loss -= tr_loss" in inspect.getsource(Trainer._maybe_log_save_evaluate)


def test_arguments_have_what_is_set_on_them():
    assert "_n_gpu" in inspect.getsource(TrainingArguments)
    fields = SFTConfig.__dataclass_fields__
    for name in ("activation_offloading", "activation_checkpointing", "deepspeed"):
        assert name in fields, name
    assert "self.deepspeed_plugin = " in inspect.getsource(TrainingArguments)


def test_peft_makes_adapters_in_float32_when_asked_to():
    assert "autocast_adapter_dtype" in parameters(peft.get_peft_model)


def test_accelerate_has_what_is_called():
    assert parameters(Accelerator.unwrap_model)[:2] == ["model", "keep_fp32_wrapper"]
    assert parameters(Accelerator.no_sync) == ["model"]
    for name in ("reduce", "gather", "wait_for_everyone", "end_training"):
        assert callable(getattr(Accelerator, name))


def test_transformers_lets_an_attention_be_registered():
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import eager_mask, sdpa_mask

    assert parameters(sdpa_attention_forward)[:5] == [
        *("module", "query", "key", "value", "attention_mask"),
    ]
    assert callable(sdpa_mask) and callable(eager_mask)
    assert callable(AttentionInterface.register) and callable(AttentionMaskInterface.register)
    config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9)
    assert config._attn_implementation is None or isinstance(config._attn_implementation, str)


def test_bloom_s_attention_is_the_one_that_ours_replaces():
    forward = ["hidden_states", "residual", "alibi", "attention_mask"]
    assert parameters(BloomAttention.forward)[:4] == forward
    assert parameters(BloomAttention._reshape) == ["fused_qkv"]


def test_torch_has_the_private_modules_of_the_budget():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    assert issubclass(FakeTensorMode, TorchDispatchMode)
    assert callable(torch.utils._pytree.tree_map_only)
    assert {"_parameters", "_buffers"} <= vars(torch.nn.Module()).keys()


def test_datasets_have_a_fingerprint():
    import datasets

    assert isinstance(datasets.Dataset.from_dict({"a": [1]})._fingerprint, str)


def test_bitsandbytes_repacks_by_the_flag_that_we_clear():
    import bitsandbytes.nn.modules

    assert "support_avx512bf16_for_cpu" in Path(bitsandbytes.nn.modules.__file__).read_text()


def test_accelerate_s_launcher_can_be_asked_what_it_was_told():
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    assert isinstance(default_config_file, str) and callable(load_config_from_file)
    parsed, _ = launch_command_parser().parse_known_args(["--num_processes", "2", "x.py"])
    assert (parsed.num_processes, parsed.config_file, parsed.cpu) == (2, None, False)


def test_transformers_names_its_loggers():
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert {"tensorboard", "wandb"} <= INTEGRATION_TO_CALLBACK.keys()


@pytest.mark.cluster
def test_deepspeed_s_engine_has_what_strategy_and_checkpoints_ask_of_it():
    if importlib.util.find_spec("deepspeed") is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("deepspeed is not installed")
    from deepspeed import DeepSpeedEngine

    assert callable(DeepSpeedEngine.zero_optimization_stage)
    assert "ds_shape" in inspect.getsource(
        __import__("deepspeed.runtime.zero.partition_parameters", fromlist=["Init"])
    )
