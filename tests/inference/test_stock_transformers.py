"""A run folder answers in stock transformers, without any argument, as it does here."""

import json
from pathlib import Path

import pytest
import tiny
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import sft
from finetuning.inference.trained_model import load_asker
from finetuning.recipe.recipe import load_recipe

FACTS = {
    "What is red?": "an apple",
    "What is green?": "grass",
    "What is blue?": "the sky",
    "What is yellow?": "the sun",
    "What is white?": "snow",
    "What is black?": "coal",
    "What is brown?": "the earth",
    "What is grey?": "a mouse",
}
GLM = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' }}"
    "{% if m.role == 'assistant' %}{{ '<think></think>\n' }}{% endif %}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
LINES = (
    "{% for m in messages %}{{ '### ' + m.role + ':\n' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)
PHI = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# (data.template, the base's chat template, the token that ends an answer, text before the content)
KINDS = {
    "question_answer": ("question_answer", tiny.CHAT_TEMPLATES["chatml"], "</s>", ""),
    "chatml": ("chat", tiny.CHAT_TEMPLATES["chatml"], "<|im_end|>", ""),
    "glm": ("chat", GLM, "<|user|>", "<think></think>\n"),
    "lines": ("chat", LINES, "</s>", ""),
    "phi": ("chat", PHI, "<|end|>", ""),
}


def write_base(folder: Path, chat_template: str, takes_white_space: bool) -> None:
    """A random Llama whose tokenizer puts a space in front of texts and after special tokens."""
    tokenizer = tiny.byte_fallback()
    tokenizer.add_tokens(tiny.CHAT_TOKENS, special_tokens=True)
    for name in ("user", "assistant", "end"):
        token = AddedToken(f"<|{name}|>", rstrip=takes_white_space, special=True)
        tokenizer.add_tokens([token], special_tokens=True)
    tokenizer.add_tokens(["<think>", "</think>"])  # ordinary ones, as in GLM and Qwen
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    tiny.model_of("llama", vocab_size=len(tokenizer), width=64).save_pretrained(folder)


def trained(folder: Path, kind: str) -> Path:
    """The run folder of a run that learned FACTS by heart."""
    template, chat_template, _, _ = KINDS[kind]
    write_base(folder / "base", chat_template, takes_white_space=kind == "phi")
    rows = [{"prompt": prompt, "response": response} for prompt, response in FACTS.items()]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = {
        "model": {"name": str(folder / "base")},
        "data": {
            "path": str(folder / "rows.jsonl"),
            "reader": "prompt_response",
            "template": template,
        },
        "training": {
            "output_dir": str(folder / "run"),
            "max_steps": 60,
            "learning_rate": 5e-3,
            "lr_scheduler_type": "cosine",
            "save_strategy": "no",
            "report_to": "none",
        },
        "generation": {"max_new_tokens": 20},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    sft.main([str(folder / "recipe.yaml")])
    return folder / "run"


@pytest.fixture(scope="module", params=KINDS)
def run(request, tmp_path_factory):
    return request.param, trained(tmp_path_factory.mktemp(request.param), request.param)


def test_stock_transformers_asks_with_the_trained_ids_and_answers_token_for_token(run):
    kind, folder = run
    _, _, end, before = KINDS[kind]
    asker = load_asker(folder, load_recipe(folder / "recipe.yaml"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    chat = pipeline("text-generation", model=str(folder))
    assert asker(list(FACTS)) == list(FACTS.values())
    for question, answer in FACTS.items():
        messages = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        assert inputs["input_ids"][0].tolist() == asker.prompt(messages)
        generated = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :].tolist()
        assert generated == asker.respond([asker.prompt(messages)])[0]
        assert tokenizer.convert_ids_to_tokens(generated)[-1] == end
        said = chat(messages)[0]["generated_text"][-1]["content"]
        assert said.replace(" ", "") == (before + answer).replace(" ", "")


def test_the_saved_files_say_nothing_of_this_machine_or_of_training(run):
    kind, folder = run
    config, settings = (
        json.loads((folder / name).read_text()) for name in ("config.json", "tokenizer_config.json")
    )
    assert config["use_cache"] is True
    assert not {"is_local", "local_files_only"} & settings.keys()
    generation = json.loads((folder / "generation_config.json").read_text())
    ends = AutoTokenizer.from_pretrained(folder).convert_ids_to_tokens(generation["eos_token_id"])
    assert KINDS[kind][2] in ends and "</s>" in ends
    assert (generation["max_new_tokens"], generation["do_sample"]) == (20, False)
