"""A base model that names code of its own: nothing asks whether to run it, and nothing runs it."""

import ast
import json
import os
import pty
import subprocess
import sys

import pytest
import tiny
from conftest import ROOT


@pytest.fixture
def base(tmp_path):
    """A model and a tokenizer whose configs want a file of the folder to be imported."""
    folder = tmp_path / "base"
    tokenizer = tiny.byte_level()
    tiny.model_of("gpt2", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    code = f"open({str(tmp_path / 'marker')!r}, 'w')\n"
    (folder / "conf.py").write_text(code)
    for name, auto_map in (
        ("config.json", {"AutoConfig": "conf.C", "AutoModelForCausalLM": "conf.M"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["conf.T", "conf.T"]}),
    ):
        settings = json.loads((folder / name).read_text())
        settings |= {"auto_map": auto_map, "model_type": "elith-own", "tokenizer_class": "Own"}
        (folder / name).write_text(json.dumps(settings))
    (folder / "tokenizer.json").unlink()
    return folder


@pytest.mark.usefixtures("warm_python")
@pytest.mark.parametrize("command", [["src/preview.py"], ["src/sft.py", "--check"]])
def test_no_terminal_is_asked_whether_to_run_it(command, base, tmp_path):
    """On a terminal transformers asked `Do you wish to run the custom code? [y/N]`; y ran it."""
    script, *flags = command
    arguments = [
        "recipes/quickstart.yaml",
        "model.from_scratch=null",
        f"model.name={base}",
        f"training.output_dir={tmp_path / 'run'}",
    ]
    ours, theirs = pty.openpty()
    os.write(ours, b"y\ny\ny\n")
    done = subprocess.run(
        [sys.executable, script, *flags, *arguments],
        cwd=ROOT,
        stdin=theirs,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "custom code?" not in done.stdout + done.stderr
    assert done.returncode == 2 and not (tmp_path / "marker").exists()


LOADERS = {"AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"}


def calls_of_loaders():
    for file in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            function = getattr(node, "func", None)
            if getattr(function, "attr", "") != "from_pretrained":
                continue
            if getattr(function.value, "id", "") in LOADERS:
                values = {word.arg: getattr(word.value, "value", None) for word in node.keywords}
                yield file.name, function.value.id, values


def test_no_loader_may_ask_for_code_or_read_a_pickle():
    """Without the argument, transformers asks at a terminal whether to run a folder's code."""
    calls = list(calls_of_loaders())
    assert len(calls) >= 6
    for file, loader, values in calls:
        assert values.get("trust_remote_code") is False, file
        assert loader != "AutoModelForCausalLM" or values.get("use_safetensors") is True, file
