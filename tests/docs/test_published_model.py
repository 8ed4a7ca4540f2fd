"""docs/published_model.md: every command, against the tests' Hub, without code of ours."""

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import OWNER, REPO
from pages import PAGES, sections
from run_folders import S, copied

import publish
import pull
from finetuning.export.exported import Trained
from finetuning.export.llama_cpp import LlamaCpp, is_installed
from finetuning.publishing.stock_transformers import can_serve, post, serving
from finetuning.runs.folder import RunFolder

PAGE = "docs/published_model.md"
TWIN = "docs/published_model.ja.md"


def blocks(page: str, language: str) -> list[str]:
    return [text for part in sections(page) for name, text in part.blocks if name == language]


@pytest.fixture
def published(hub, runs, call, tmp_path):
    """The Hub with a model of the page's name, published as GGUF as well."""
    gguf = ["publish.gguf=true"] if is_installed() else []
    done = call(publish, copied(runs["full"], tmp_path / "run"), "--unasked", *gguf)
    assert done.code == 0, done.err
    return hub


def test_the_python_runs_and_answers(published):
    namespace, said = {}, io.StringIO()
    with contextlib.redirect_stdout(said):
        for code in blocks(PAGE, "python"):
            exec(code, namespace)
    assert said.getvalue() and namespace["model"].config.model_type == "gpt2"


def test_the_files_come_as_a_folder_that_llama_cpp_loads(published, tmp_path):
    commands = [line for text in blocks(PAGE, "bash") for line in text.splitlines()]
    (download,) = [shlex.split(line) for line in commands if line.startswith("hf ")]
    environment = {**os.environ, **published.environment(OWNER, tmp_path / "another")}
    program = Path(sys.executable).with_name("hf")
    subprocess.run([program, *download[1:]], cwd=tmp_path, env=environment, check=True, timeout=300)
    named = {word for line in commands for word in re.findall(r"(?<!\w)model/[\w./-]+", line)}
    assert named == {f"model/{S}", f"model/{S}/model-f16.gguf", f"model/{S}/Modelfile"}
    if "CI" not in os.environ and not is_installed():
        pytest.skip("llama.cpp is not installed (pip install xllamacpp)")
    assert all((tmp_path / name).exists() for name in named)
    server = LlamaCpp(tmp_path / "model" / S / "model-f16.gguf", 64, 1)
    assert server.post("/completion", **request_to(commands, "/completion"))["content"]


def request_to(commands: list[str], place: str) -> dict:
    """What the page's curl sends to the address that ends so."""
    (curl,) = [
        words
        for line in commands
        if (words := shlex.split(line))[0] == "curl" and words[1].endswith(place)
    ]
    return json.loads(curl[curl.index("--json") + 1])


def test_the_folder_answers_in_transformers_serve(published, call, tmp_path, monkeypatch):
    if "CI" not in os.environ and not can_serve():
        pytest.skip("transformers serve is not installed (pip install 'transformers[serving]')")
    monkeypatch.chdir(tmp_path)
    assert call(pull, f"hub:{REPO}/{S}", f"model/{S}").code == 0
    commands = [line for text in blocks(PAGE, "bash") for line in text.splitlines()]
    run = RunFolder(Path("model", S))
    with serving(Trained(run, run.recipe)) as address:
        asked = request_to(commands, "/v1/chat/completions")
        said = post(f"{address}/v1/chat/completions", asked)
    assert said["choices"][0]["message"]["content"]


def test_both_languages_have_the_same_commands():
    assert {PAGE, TWIN} <= set(PAGES)
    for language in ("python", "bash", "text"):
        assert blocks(PAGE, language) == blocks(TWIN, language) != []
