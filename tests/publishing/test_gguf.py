"""publish.gguf: a GGUF file and a Modelfile beside the weights, asked in llama.cpp."""

import json
import os

import pytest
from hub_server import REPO
from run_folders import S, copied, files_below

import publish
import pull
from finetuning.export.llama_cpp import is_installed


@pytest.fixture(autouse=True)
def llama_cpp():
    """Fails in CI without llama.cpp, and is skipped elsewhere."""
    if not is_installed() and "CI" not in os.environ:
        pytest.skip("llama.cpp is not installed (pip install xllamacpp)")


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_gguf_file_is_published_beside_the_weights_and_asked(hub, runs, call, tmp_path, kind):
    run = copied(runs[kind], tmp_path / "run")
    changes = ["publish.gguf=true", *(["publish.merged=true"] if kind == "lora" else [])]
    done = call(publish, run, *changes)
    assert done.code == 0, done.err
    names = {path.removeprefix(f"{S}/") for path in hub.tree(REPO)}
    assert names >= {"model.safetensors", "model-f16.gguf", "Modelfile"}
    assert not list(run.glob(".gguf-*"))

    forms = json.loads((run / "published.json").read_text())["forms"]
    assert forms["llama.cpp"]["asked"] == 2 and "answers of llama.cpp" in done.out
    card = hub.read(REPO, f"{S}/README.md").decode()
    assert f"llama-server --model model/{S}/model-f16.gguf --jinja" in card
    assert f"ollama create sft_model --file model/{S}/Modelfile" in card
    assert hub.read(REPO, f"{S}/Modelfile").decode().startswith("FROM ./model-f16.gguf\n")

    assert call(pull, REPO, S, tmp_path / "pulled").code == 0
    assert "model-f16.gguf" in files_below(tmp_path / "pulled")


def test_the_root_readme_shows_how_a_model_is_loaded(hub, runs, call, tmp_path):
    assert call(publish, copied(runs["full"], tmp_path / "run"), "--unasked").code == 0
    readme = hub.read(REPO, "README.md").decode()
    code = readme.partition("```python\n")[2].partition("```")[0].replace('"..."', f'"{S}"')
    namespace = {}
    exec(code, namespace)
    assert namespace["model"].config.model_type == "gpt2" and namespace["tokenizer"].eos_token
    assert "llama-server" not in hub.read(REPO, f"{S}/README.md").decode()
