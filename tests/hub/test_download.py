"""What a pulled folder may hold: nothing that leads elsewhere, or that no machine could follow."""

import json

import pytest
from hub_server import REPO
from run_folders import error_of
from safetensors.numpy import save

import pull
from finetuning.errors import UserError
from finetuning.hub.checksums import require_modest

WEIGHTS = save({})


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"model.safetensors": WEIGHTS}, "has no config.json"),
        (
            {"model.safetensors": WEIGHTS, "config.json": b"{}", "adapter_config.json": b"{}"},
            "has no adapter_model.safetensors",
        ),
        ({"adapter_model.safetensors": WEIGHTS}, "has no model.safetensors"),
        ({"model.safetensors": WEIGHTS, "config.json": b"[" * 10**5}, "config.json is damaged"),
        ({"model.safetensors": WEIGHTS, "config.json": b"[1]"}, "holds no JSON object"),
        (
            {"model.safetensors": WEIGHTS, "config.json": b'{"n_layer": 1000000000}'},
            "n_layer is 1,000,000,000; at most 1,000",
        ),
    ],
)
def test_a_folder_from_which_libraries_would_go_elsewhere_is_refused(files, expected, hub, call):
    hub.put(REPO, {f"m/{name}": content for name, content in files.items()})
    assert expected in error_of(call(pull, REPO, "m"))


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "(a+)+$"},
        {"target_modules": "(a|a)*b"},
        {"target_modules": ".*.*.*.*.*x"},
        {"exclude_modules": "x" * 1000},
        {"rank_pattern": {"(a+)+$": 4}},
        {"layer_replication": [[0, 2000]]},
    ],
)
def test_an_adapter_that_could_take_for_ever_is_refused(settings, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        require_modest(tmp_path / "adapter_config.json")


@pytest.mark.parametrize(
    "modules",
    [
        "all-linear",
        ["q_proj", "v_proj"],
        r".*\.(q_proj|v_proj)",
        r".*layers\.\d+\.self_attn.*",
        None,
    ],
)
def test_the_patterns_that_people_write_are_taken(modules, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"target_modules": modules}))
    require_modest(tmp_path / "adapter_config.json")
