"""Every file in accelerate_configs/ says what accelerate understands, and nothing that the recipe
owns.

accelerate takes a misspelt key inside deepspeed_config or fsdp_config silently; here its own
parser is asked.
"""

import os
from pathlib import Path

import pytest
import yaml
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import (
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)
from conftest import ROOT

from finetuning.launch.strategy import Strategy, launch_environment, requested_strategy

CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
ONE_PROCESS = {"cpu", "single_gpu", "t4"}
# The recipe's: how much is in a step, how long its gradient may be, in which number format it is
# computed.
OWNED = {
    "gradient_accumulation_steps",
    "gradient_clipping",
    "mixed_precision",
    "downcast_bf16",
    "fp16",
    "bf16",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
}
NESTED = {"deepspeed_config": "DeepSpeed Arguments", "fsdp_config": "FSDP Arguments"}


def settings_of(config: Path) -> dict:
    return yaml.safe_load(config.read_text(encoding="utf-8"))


def known_names(section: str) -> set[str]:
    """What `accelerate launch` takes as flags for a section; of fsdp_config also without the
    prefix."""
    (group,) = [
        group for group in launch_command_parser()._action_groups if group.title == NESTED[section]
    ]
    names = {action.dest for action in group._group_actions}
    return names | {name.removeprefix("fsdp_") for name in names}


def unknown_keys(settings: dict) -> list[str]:
    """Keys at any depth that accelerate would refuse or, worse, take and forget."""
    unknown = [name for name in settings if name not in ClusterConfig.__dataclass_fields__]
    for section, content in settings.items():
        if isinstance(content, dict):
            known = known_names(section) if section in NESTED else set()
            unknown += [f"{section}.{name}" for name in content if name not in known]
    return unknown


def keys_of(settings: dict) -> set[str]:
    return {
        *settings,
        *(name for content in settings.values() if isinstance(content, dict) for name in content),
    }


def environment_of(config: Path) -> dict[str, str]:
    """What `accelerate launch` gives to the processes that it starts."""
    several = [] if config.stem in ONE_PROCESS else ["--num_processes", "2"]
    command = ["--config_file", str(config), "--main_process_port", "0", *several, "src/sft.py"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ""
        return {**prepare_deepspeed_cmd_env(args)[1], "WORLD_SIZE": "2"}
    if args.multi_gpu or args.use_fsdp:
        return {**prepare_multi_gpu_env(args), "WORLD_SIZE": "2"}
    return prepare_simple_launcher_cmd_env(args)[1]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_accelerate_knows_every_key_at_every_depth(config):
    ClusterConfig.from_yaml_file(config)
    assert unknown_keys(settings_of(config)) == []


@pytest.mark.parametrize(
    ("name", "section", "key"),
    [
        ("zero3", "deepspeed_config", "zero_stge"),
        ("zero3", "deepspeed_config", "num_processes"),
        ("zero3", "deepspeed_config", "fsdp_version"),
        ("fsdp2", "fsdp_config", "fsdp_autowrap_policy"),
        ("fsdp2", "fsdp_config", "zero_stage"),
        ("fsdp2", "parallelism", "tp_size"),
    ],
)
def test_a_misspelt_nested_key_is_found_though_accelerate_takes_it(name, section, key, tmp_path):
    settings = settings_of(ROOT / "accelerate_configs" / f"{name}.yaml")
    settings.setdefault(section, {})[key] = 2
    assert f"{section}.{key}" in unknown_keys(settings)
    if section in NESTED:
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
        environment_of(tmp_path / "config.yaml")


def test_a_misspelt_key_at_the_top_is_found():
    assert unknown_keys({"distributed_type": "NO", "num_procesess": 2}) == ["num_procesess"]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_nothing_in_it_is_the_recipe_s(config):
    assert keys_of(settings_of(config)) & OWNED == set()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_it_is_short_and_begins_with_what_it_is_for(config):
    text = config.read_text(encoding="utf-8")
    assert text.startswith("# ") and len(text.splitlines()) <= 20


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_several_machines_are_a_matter_of_flags(config):
    settings = settings_of(config)
    assert settings["num_machines"] == 1
    machines = {
        "machine_rank",
        "main_process_ip",
        "main_process_port",
        "rdzv_backend",
        "deepspeed_hostfile",
    }
    assert keys_of(settings) & machines == set()


STRATEGIES = {
    "cpu": Strategy("single", 1),
    "single_gpu": Strategy("single", 1),
    "t4": Strategy("single", 1),
    "cpu_ddp": Strategy("ddp", 2),
    "ddp": Strategy("ddp", 2),
    "fsdp2": Strategy("fsdp", 2),
    "zero1": Strategy("zero1", 2),
    "zero2": Strategy("zero2", 2),
    "zero3": Strategy("zero3", 2),
    "zero3_offload": Strategy("zero3", 2, offload=True),
}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_accelerate_makes_of_it_what_its_name_says(config, launched):
    launched(environment_of(config))
    assert requested_strategy() == STRATEGIES[config.stem]
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "no"
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS" not in os.environ


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_preview_reads_in_it_what_accelerate_does(config, launched):
    theirs = environment_of(config)
    ours = launch_environment(str(config), theirs.get("WORLD_SIZE"))
    launched(ours)
    assert requested_strategy() == STRATEGIES[config.stem]
    shared = ours.keys() & theirs.keys()
    assert {name: ours[name].lower() for name in shared} == {
        name: theirs[name].lower() for name in shared
    }
    read = {
        "cpu": "ACCELERATE_USE_CPU",
        "fsdp2": "FSDP_VERSION",
        "zero3": "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL",
    }
    assert config.stem not in read or read[config.stem] in shared


def test_fsdp2_is_what_accelerate_s_plugin_makes_of_it(launched):
    launched(environment_of(ROOT / "accelerate_configs" / "fsdp2.yaml"))
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert plugin.state_dict_type.name == "SHARDED_STATE_DICT"
    assert (
        type(plugin.cpu_offload).__name__ == "OffloadPolicy"
        and not plugin.cpu_ram_efficient_loading
    )


def test_the_configs_for_the_cpu_keep_processes_off_the_gpus():
    environments = {
        name: environment_of(ROOT / "accelerate_configs" / f"{name}.yaml") for name in STRATEGIES
    }
    assert environments["cpu"]["ACCELERATE_USE_CPU"] == "True"
    # CUDA counts devices up to the first that does not exist.
    hidden = {
        name
        for name, found in environments.items()
        if found.get("CUDA_VISIBLE_DEVICES", "").startswith("-1")
    }
    assert hidden == {"cpu_ddp"}


@pytest.mark.cluster
@pytest.mark.parametrize("name", [name for name in STRATEGIES if name.startswith("zero")])
def test_deepspeed_reads_what_accelerate_makes_of_it(name, launched):
    from accelerate import DeepSpeedPlugin
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    launched(environment_of(ROOT / "accelerate_configs" / f"{name}.yaml"))
    plugin = DeepSpeedPlugin()
    zero = DeepSpeedZeroConfig(**plugin.deepspeed_config["zero_optimization"])
    expected = STRATEGIES[name]
    assert zero.stage == int(expected.name.removeprefix("zero"))
    devices = {part.device for part in (zero.offload_optimizer, zero.offload_param) if part}
    assert devices <= ({"cpu"} if expected.offload else {"none"}) and (
        devices or not expected.offload
    )
    assert zero.gather_16bit_weights_on_model_save == (zero.stage == 3)
    assert plugin.zero3_init_flag == (zero.stage == 3)
    for own in (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
    ):
        assert plugin.deepspeed_config.get(own, "auto") == "auto"
    assert plugin.deepspeed_config.get("gradient_clipping", "auto") == "auto"
