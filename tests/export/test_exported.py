"""A run folder as a GGUF file: llama.cpp sees the trained prompt and gives the same answers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from conftest import ROOT
from run_folders import copied, error_of, run_folder
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import export
from finetuning.data.chat_template import ChatTemplate
from finetuning.errors import UserError
from finetuning.export import exported
from finetuning.export.gguf_file import Contents, write_gguf
from finetuning.export.llama_cpp import LlamaCpp, is_installed
from finetuning.export.vocabulary import CUTS
from finetuning.launch.software import installed
from finetuning.recipe.recipe import load_recipe
from finetuning.recipe.sections import Generation

gguf = pytest.importorskip("gguf") if "CI" not in os.environ else __import__("gguf")

FACTS = {
    "What is 2 + 3?": "five",
    "What is red?": "a colour",
    "Who is there?": "only me",
    "日本の首都は？": "東京",
    "Where is Oslo?": "in Norway",
    "When is noon?": "at twelve",
    "Why?": "because",
    "空は何色？": "青",
}
TARGETS = {"gpt2": "[c_attn, c_fc]", "llama": "[q_proj, v_proj, up_proj, down_proj]"}
# What tokenizers cut in different ways.
HOSTILE = [
    "Hello world, it's 12345 o'clock.\n\n  Two  spaces\tand a tab ",
    "日本の首都は東京です。 Ünïcödé — naïve… 😀🇯🇵",
    "### Question: Why?\n### Answer:",
    "a\r\nb \n c\u3000d\u00a0e",
    "DON'T I'LL we'Ve 3.14159 1,000,000",
]


@pytest.fixture
def llama_cpp():
    """What needs llama.cpp: fails in CI without it, and is skipped elsewhere."""
    if not is_installed() and "CI" not in os.environ:
        pytest.skip("llama.cpp is not installed (pip install xllamacpp)")


@pytest.fixture(scope="module", params=["gpt2", "bloom", "llama", "llama lora"])
def run(request, tmp_path_factory) -> Path:
    """A run folder that knows eight facts."""
    kind, *method = request.param.split()
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "_"))
    tokenizer = tiny.byte_level()
    tiny.model_of(kind, vocab_size=len(tokenizer)).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    rows = [{"prompt": question, "response": answer} for question, answer in FACTS.items()]
    text = "\n".join(map(json.dumps, rows * 4))
    (folder / "rows.jsonl").write_text(text, encoding="utf-8")
    lora = [f"lora={{r: 16, lora_alpha: 32, target_modules: {TARGETS[kind]}}}"] if method else []
    return run_folder(
        folder,
        "model.from_scratch=null",
        f"model.name={folder / 'base'}",
        f"data.path={folder / 'rows.jsonl'}",
        "data.eval=null",
        "training.max_steps=150",
        f"training.learning_rate={3e-2 if method else 1e-2}",
        "generation.max_new_tokens=8",
        "generation.repetition_penalty=1.05",
        f"generation.prompts={json.dumps(list(FACTS), ensure_ascii=False)}",
        "publish={repo: elith/llm-book-models, subfolder: facts, license: mit}",
        *lora,
    )


def record_of(folder: Path) -> dict:
    return json.loads((folder / "exported.json").read_text(encoding="utf-8"))


def test_llama_cpp_answers_as_the_run_folder(run, call, tmp_path, llama_cpp):
    done = call(export, run, tmp_path, "--type", "f32")
    assert done.code == 0, done.err
    assert f"8 of {len(FACTS)} greedy answers in llama.cpp are the run folder's" in done.out
    record = record_of(tmp_path)
    assert record["type"] == "f32" and record["file"] == "model-f32.gguf"
    assert [answer["question"] for answer in record["answers"]] == list(FACTS)
    right = [answer["llama.cpp"] == FACTS[answer["question"]] for answer in record["answers"]]
    assert sum(right) >= 6  # it has learnt them, whatever the processor's rounding


def test_smaller_types_are_asked_and_recorded_too(run, call, tmp_path, llama_cpp):
    sizes = []
    for kind in ("f32", "f16", "q8_0"):
        done = call(export, run, tmp_path / kind, "--type", kind)
        assert done.code == 0, done.err
        record = record_of(tmp_path / kind)
        assert (record["type"], len(record["answers"])) == (kind, len(FACTS))
        sizes.append(record["size"])
    assert sizes[0] > sizes[1] > sizes[2]


def test_a_file_holds_where_an_answer_ends_how_it_is_made_and_the_licence(run, call, tmp_path):
    assert call(export, run, tmp_path, "--type", "f32", "--unasked").code == 0
    fields = gguf.GGUFReader(tmp_path / "model-f32.gguf").fields
    end = tiny.byte_level().eos_token_id
    assert fields["tokenizer.ggml.eos_token_id"].contents() == end
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False
    assert fields["general.license"].contents() == "mit"
    assert fields["general.sampling.temp"].contents() == 0
    assert fields["general.sampling.penalty_repeat"].contents() == pytest.approx(1.05)
    assert record_of(tmp_path)["answers"] == []


def test_other_answers_are_an_error_where_nothing_was_rounded(run, call, tmp_path, llama_cpp):
    spoilt = copied(run, tmp_path / "run")
    assert call(export, spoilt, tmp_path / "out", "--type", "f32").code == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exported, "ask_greedily", lambda *_: ["something else"] * len(FACTS))
        line = error_of(call(export, spoilt, tmp_path / "out", "--type", "f32"))
    assert "llama.cpp answers otherwise" in line
    assert not any(answer["is_same"] for answer in record_of(tmp_path / "out")["answers"])


def test_a_file_in_which_llama_cpp_sees_other_tokens_is_refused(
    run, tmp_path, monkeypatch, llama_cpp
):
    add = gguf.GGUFWriter.add_token_merges
    monkeypatch.setattr(gguf.GGUFWriter, "add_token_merges", lambda self, all: add(self, all[:1]))
    recipe = load_recipe(run / "recipe.yaml")
    file = exported.export(run, recipe, "f32", tmp_path)
    with pytest.raises(UserError, match="sees other tokens than were trained in the prompt"):
        exported.compare(run, recipe, file)


# Tokenizers


def cut_by(pattern: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that cuts text by this pattern first."""
    backend = Tokenizer.from_str(tiny.byte_level().backend_tokenizer.to_str())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


TOKENIZERS = {
    "gpt-2": tiny.byte_level,
    **{name: lambda pattern=pattern: cut_by(pattern) for pattern, name in CUTS.items()},
    "sentencepiece": tiny.byte_fallback,
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_llama_cpp_tokenizes_as_the_tokenizer(kind, tmp_path, llama_cpp):
    tokenizer = TOKENIZERS[kind]()
    tiny.model_of("llama", vocab_size=len(tokenizer) + 3).save_pretrained(tmp_path)
    ends = [tokenizer.eos_token_id]
    contents = Contents("tiny", tokenizer, None, ends, Generation(), None)
    write_gguf(tmp_path, contents, "f32", tmp_path / "model.gguf")
    server = LlamaCpp(tmp_path / "model.gguf", 64, 1)
    for text in HOSTILE:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert server.tokens(text) == ids, text


def test_a_server_that_is_asked_nothing_ends(tmp_path, llama_cpp):
    """llama.cpp's would wait for ever for a loop that had not begun."""
    tokenizer = tiny.byte_level()
    tiny.model_of("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    contents = Contents("tiny", tokenizer, None, [0], Generation(), None)
    write_gguf(tmp_path, contents, "f32", tmp_path / "model.gguf")
    code = """
import os, sys
from finetuning.export.llama_cpp import LlamaCpp
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # its threads have to wait for each other
for _ in range(10):
    LlamaCpp(sys.argv[1], 64, 1)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model.gguf")],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        timeout=120,
    )
    assert done.returncode == 0


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "mistral"])
def test_relatives_of_llama_answer_as_transformers_does(kind, tmp_path, llama_cpp):
    tokenizer = tiny.byte_level()
    model = tiny.model_of(kind, vocab_size=len(tokenizer), head_dim=8)
    model.save_pretrained(tmp_path)
    contents = Contents("tiny", tokenizer, None, [0], Generation(), None)
    write_gguf(tmp_path, contents, "f32", tmp_path / "model.gguf")
    server = LlamaCpp(tmp_path / "model.gguf", 64, 1)
    ends = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])  # to llama.cpp, by name
    for text in HOSTILE[:3]:
        inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=6, do_sample=False, suppress_tokens=ends)
        asked = {"prompt": text, "n_predict": 6, "temperature": 0, "ignore_eos": True}
        said = server.post("/completion", **asked, return_tokens=True)["tokens"]
        assert said == ids[0, inputs["input_ids"].shape[1] :].tolist()


LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def test_the_scaled_rotary_frequencies_of_llama_3_are_llama_cpps(tmp_path, llama_cpp):
    tokenizer = tiny.byte_level()
    contents = Contents("tiny", tokenizer, None, [0], Generation(), None)
    ends = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    said = {}
    for kind, rope in {"scaled": LLAMA_3_ROPE, "plain": None}.items():
        model = tiny.model_of("llama", vocab_size=len(tokenizer), rope_parameters=rope)
        model.save_pretrained(tmp_path / kind)
        write_gguf(tmp_path / kind, contents, "f32", tmp_path / f"{kind}.gguf")
        server = LlamaCpp(tmp_path / f"{kind}.gguf", 128, 1)
        inputs = tokenizer(HOSTILE[0], add_special_tokens=False, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=24, do_sample=False, suppress_tokens=ends)
        asked = {"prompt": HOSTILE[0], "n_predict": 24, "temperature": 0, "ignore_eos": True}
        said[kind] = server.post("/completion", **asked, return_tokens=True)["tokens"]
        assert said[kind] == ids[0, inputs["input_ids"].shape[1] :].tolist()
    assert said["scaled"] != said["plain"]  # it is not for nothing


def test_a_file_has_the_trained_chat_template_without_marks_at_every_turn(tmp_path, llama_cpp):
    tokenizer = tiny.chat_tokenizer("byte_level", "chatml")
    template = ChatTemplate(tokenizer)
    tokenizer.chat_template = template.jinja
    tiny.model_of("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    plain = exported.plain_template(tokenizer.chat_template)
    ends = [tokenizer.convert_tokens_to_ids(end) for end in template.end_marks]
    contents = Contents("tiny", tokenizer, plain, ends, Generation(), None)
    write_gguf(tmp_path, contents, "f32", tmp_path / "model.gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == tiny.CHAT_TEMPLATES["chatml"]
    server = LlamaCpp(tmp_path / "model.gguf", 256, 1)
    chat = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi\n there "},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "日本の首都は？"},
    ]
    for messages in (chat[1:2], chat[:2], chat):
        asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert server.tokens(server.prompt(messages)) == asked
    answer = server.chat(chat, Generation(max_new_tokens=4))
    assert isinstance(answer, str)


# Refusals


def test_what_is_not_exported_here_is_named_with_who_may_know_it(tmp_path, call):
    sizes = "hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4"
    config = f"{{model_type: gpt_neox, {sizes}, max_position_embeddings: 128}}"
    folder = run_folder(tmp_path, f"model.from_scratch.config={config}", "generation.prompts=[]")
    line = error_of(call(export, folder))
    assert "gpt_neox is not exported here; exported are gpt2, bloom, llama" in line
    assert "python convert_hf_to_gguf.py FOLDER" in line and not (folder / "export").exists()


def test_a_tokenizer_that_llama_cpp_does_not_have_is_refused(tmp_path):
    tokenizer = tiny.metaspace()
    tiny.model_of("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    contents = Contents("tiny", tokenizer, None, [tokenizer.eos_token_id], Generation(), None)
    with pytest.raises(UserError, match=r"no tokenizer like this one here \(Unigram\)"):
        write_gguf(tmp_path, contents, "f32", tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


def test_without_the_library_it_is_named(run, call, monkeypatch):
    monkeypatch.setattr(exported, "installed", lambda name: None)
    assert "pip install -e '.[export]'" in error_of(call(export, run))
    assert installed("gguf")


def test_weights_that_are_not_finite_are_not_exported(call, tmp_path):
    run = copied(ROOT / "tests/old_runs/finished", tmp_path / "run")
    weights = load_file(run / "model.safetensors")
    weights["transformer.ln_f.bias"][0] = float("nan")
    save_file(weights, run / "model.safetensors", {"format": "pt"})
    assert "transformer.ln_f.bias is not finite" in error_of(call(export, run))
    assert not list(run.rglob("*.gguf"))
