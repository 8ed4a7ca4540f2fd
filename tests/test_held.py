"""What a security audit tried and could not do: it stays so.

Whatever ran would leave a marker; none is left.
"""

import base64
import json
import os
import pickle
import shutil
import struct
from contextlib import suppress

import pytest
import tiny
from conftest import ROOT
from hub_server import REPO
from run_folders import error_of, files_below
from safetensors.numpy import save

import generate
import pull
import sft
from finetuning.data.chat_template import ChatTemplate
from finetuning.data.row import message
from finetuning.errors import UserError
from finetuning.files import write_text
from finetuning.hub.allowed_files import MODEL, require_weights
from finetuning.model.loading import load_model
from finetuning.model.tokenizer import load_tokenizer
from finetuning.recipe.sections import Model
from finetuning.runs.checkpoints import damage_of, seal

OLD = ROOT / "tests/old_runs"


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """A file that is there when code of a stranger has run; a module `stranger` makes it."""
    (tmp_path / "path").mkdir()
    file = tmp_path / "marker"
    code = f"open({str(file)!r}, 'w').close()\n"
    (tmp_path / "path/stranger.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path / "path")
    return file


class Code:
    """A pickle of it makes the marker when it is read without care."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


# Code in what describes a model

ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('touch MARKER').read() }}",
    "{{ lipsum.__globals__['os'].system('touch MARKER') }}",
    "{{ namespace.__init__.__globals__['__builtins__'].open('MARKER', 'w') }}",
    "{{ ('{0.__class__.__init__.__globals__}').format(messages) }}",
    "{{ (messages | map(attribute='__class__') | list)[0].__base__.__subclasses__() }}",
    "{{ raise_exception.__globals__['__builtins__']['open']('MARKER', 'w') }}",
    "{{ strftime_now.__closure__[0].cell_contents.__init__.__globals__ }}",
    "{% set x = messages.__init__.__globals__ %}{{ x.os.system('touch MARKER') }}",
    "{% import 'os' as os %}{{ os.system('touch MARKER') }}",
    "{% include '/etc/passwd' %}",
]


@pytest.mark.parametrize("escape", ESCAPES)
def test_a_chat_template_does_not_leave_its_sandbox(escape, marker):
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    text = template + escape.replace("MARKER", str(marker))
    tokenizer = tiny.byte_level()
    tokenizer.chat_template = text
    try:
        found = ChatTemplate(tokenizer).render([message("user", "x")])
    except ValueError as error:
        found = error
    assert not marker.exists() and "root:" not in str(found) and "subclasses" not in str(found)


CONFIGS = {
    "code of the config": {"config.json": {"auto_map": {"AutoConfig": "stranger.C"}}},
    "code of another repository": {
        "config.json": {"auto_map": {"AutoModelForCausalLM": "elith/evil--stranger.M"}}
    },
    "code below the top": {
        "config.json": {"text_config": {"auto_map": {"AutoConfig": "stranger.C"}}}
    },
    "generation": {"generation_config.json": {"custom_generate": "elith/evil"}},
    "kernel": {"config.json": {"attn_implementation": "elith/evil"}},
    "kernel, private": {"config.json": {"_attn_implementation": "elith/evil"}},
    "weights elsewhere": {"config.json": {"transformers_weights": "../evil.safetensors"}},
    "weights as a pickle": {"config.json": {"transformers_weights": "pytorch_model.bin"}},
    "quantizer": {"config.json": {"quantization_config": {"quant_method": "stranger"}}},
    "tokenizer": {"tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["stranger.T", None]}}},
    "tokenizer elsewhere": {"tokenizer_config.json": {"tokenizer_file": "../evil.json"}},
    "template elsewhere": {
        "tokenizer_config.json": {"chat_template": [{"name": "../../x", "template": "x"}]}
    },
}


@pytest.mark.parametrize("case", CONFIGS)
def test_no_file_of_a_model_runs_code_or_writes_elsewhere(case, marker, tmp_path):
    folder = tmp_path / "models/base"
    tokenizer = tiny.byte_level()
    model = tiny.model_of("gpt2", vocab_size=len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shutil.copy(tmp_path / "path/stranger.py", folder)
    (folder / "custom_generate").mkdir()
    shutil.copy(tmp_path / "path/stranger.py", folder / "custom_generate/generate.py")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Code(marker)))
    for name, changes in CONFIGS[case].items():
        settings = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps(settings))
    before = {name for name in files_below(tmp_path) if "models/base/" not in name}
    try:
        found = load_tokenizer(Model(name=str(folder)), [])
        found.save_pretrained(tmp_path / "models/base/saved")
        load_model(Model(name=str(folder)), found, seed=0)
    except UserError:
        pass
    assert not marker.exists()
    assert {name for name in files_below(tmp_path) if "models/base/" not in name} == before


ADAPTERS = [
    {"megatron_config": {"x": 1}, "megatron_core": "stranger"},
    {"auto_mapping": {"base_model_class": "C", "parent_library": "stranger"}},
    {"peft_type": "stranger"},
    {"peft_type": ["LORA"]},
    {"base_model_name_or_path": "elith/evil"},
    {"init_lora_weights": "stranger"},
    {"revision": "../../x"},
    {"task_type": "stranger"},
    {"runtime_config": {"stranger": 1}},
    {"corda_config": {"cache_file": "/dev/null"}},
]


@pytest.mark.parametrize("changes", ADAPTERS)
def test_no_adapter_runs_code(changes, marker, call, tmp_path, monkeypatch):
    folder = tmp_path / "runs"
    shutil.copytree(OLD, folder)
    monkeypatch.chdir(folder)
    file = folder / "adapter/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    done = call(generate, "adapter", "What is red?")
    assert not marker.exists()
    if done.code:
        error_of(done)


PICKLES = [
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "scaler.pt",
    "training_args.bin",
    "pytorch_model.bin",
]


@pytest.mark.parametrize("name", PICKLES)
def test_no_checkpoint_runs_code_though_it_is_sealed(name, marker, call, tmp_path, monkeypatch):
    folder = tmp_path / "runs"
    shutil.copytree(OLD, folder)
    monkeypatch.chdir(folder)
    checkpoint = folder / "stopped/checkpoint-20"
    (checkpoint / name).write_bytes(pickle.dumps(Code(marker)))
    if name == "pytorch_model.bin":
        (checkpoint / "model.safetensors").unlink()
    seal(checkpoint)
    assert damage_of(checkpoint) is None
    settings = [
        "training.output_dir=stopped",
        "training.save_strategy=steps",
        "training.save_steps=20",
        "training.logging_steps=1",
    ]
    with suppress(Exception):  # torch refuses it, or what is missing in it fails
        call(sft, "recipe.yaml", *settings)
    assert not marker.exists()


# Names and places


@pytest.mark.parametrize(
    "subfolder", ["m@--upload-pack=x", "m@../../x", "m@refs/pr/1", "m\x1b[2J", "../m", "m@\x1b]0;x"]
)
def test_an_odd_address_leads_nowhere(subfolder, hub, call, tmp_path):
    hub.put(REPO, {"m/config.json": b"{}", "m/model.safetensors": save({})})
    line = error_of(call(pull, REPO, subfolder))
    assert line.isprintable()
    assert not [name for name in files_below(tmp_path) if not name.startswith(("home/", "hub/"))]


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "config.json\x1b[2J", "x.py"])
def test_a_manifest_or_an_index_names_files_of_its_folder_only(name, hub, call, tmp_path):
    index = {"weight_map": {"w": f"{name}.safetensors"}}
    manifest = json.loads((OLD / "published/old/manifest.json").read_text())
    manifest["files"][name] = {"sha256": "0" * 64, "size": 1}
    files = {"config.json": b"{}", "model.safetensors": save({})}
    hub.put(REPO, {f"m/{n}": c for n, c in files.items()})
    hub.put(REPO, {"m/manifest.json": json.dumps(manifest).encode()})
    assert error_of(call(pull, REPO, "m")).isprintable()
    hub.put(REPO, {"n/config.json": b"{}", "n/model-1-of-1.safetensors": save({})})
    hub.put(REPO, {"n/model.safetensors.index.json": json.dumps(index).encode()})
    assert error_of(call(pull, REPO, "n")).isprintable()
    assert not [path for path in files_below(tmp_path) if not path.startswith(("home/", "hub/"))]


HEADERS = {
    "too long": struct.pack("<Q", 2**63) + b"{}",
    "beyond the file": struct.pack("<Q", 1000) + b"{}",
    "not JSON": struct.pack("<Q", 2) + b"xx",
    "deep": struct.pack("<Q", 10**5) + b"[" * 10**5,
    "offsets": struct.pack("<Q", 60)
    + b'{"w": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}'.ljust(60)[:60],
    "shape": struct.pack("<Q", 80)
    + b'{"w": {"dtype": "F32", "shape": [9999999999], "data_offsets": [0, 4]}}'.ljust(80)
    + b"0000",
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_lying_header_of_safetensors_is_one_line(case, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(HEADERS[case])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        require_weights(tmp_path, MODEL)


def test_files_are_as_private_as_the_person_says(tmp_path):
    before = os.umask(0o077)
    try:
        write_text(tmp_path / "recipe.yaml", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "recipe.yaml").stat().st_mode & 0o777 == 0o600


# Rows

ROWS = {
    "deep": b'{"prompt": ' + b"[" * 10**5,
    "number": b'{"prompt": ' + b"9" * 5000 + b', "response": "x"}',
    "not a number": b'{"prompt": NaN, "response": "x"}',
    "doubled": b'{"prompt": "a", "prompt": "b", "response": "x"}',
    "binary": base64.b64decode("/9j/4AAQ"),
    "null": b"null",
}


@pytest.mark.parametrize("case", ROWS)
@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_an_odd_row_is_one_line_or_read(case, suffix, call, tmp_path):
    text = ROWS[case] if suffix == "jsonl" else b"[" + ROWS[case] + b"]"
    (tmp_path / f"rows.{suffix}").write_bytes(text + b"\n")
    recipe = ROOT / "recipes/quickstart.yaml"
    place = f"training.output_dir={tmp_path / 'run'}"
    done = call(sft, "--check", recipe, f"data.path={tmp_path / f'rows.{suffix}'}", place)
    assert done.code in (0, 2)
    if done.code:
        assert error_of(done).isprintable()
