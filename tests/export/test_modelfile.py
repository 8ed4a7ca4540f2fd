"""Ollama's Modelfile: the trained prompt in Go's text/template, derived from renderings."""

import pytest
from tiny import CHAT_TEMPLATES, chat_tokenizer

from finetuning.data.chat_template import ChatTemplate
from finetuning.data.templates import TEMPLATES, MarkerTemplate
from finetuning.export.modelfile import modelfile, turns_of
from finetuning.recipe.sections import Generation

MESSAGES = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Who?"},
]


def prompt_of(template):
    return lambda messages: "".join(part.text for part in template.render_prompt(messages))


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Be brief."}]])
def test_a_marker_template_s_prompt_is_what_ollama_makes(name, system):
    render = prompt_of(MarkerTemplate(TEMPLATES[name], eos="<eos>", bos="<bos>"))
    turns = turns_of(render)
    system = system if TEMPLATES[name].system else []
    assert turns.text([*system, *MESSAGES]) == render([*system, *MESSAGES])


def test_a_template_is_written_in_go():
    turns = turns_of(prompt_of(MarkerTemplate(TEMPLATES["question_answer"], eos="<eos>")))
    assert turns.template == (
        '{{ range .Messages }}{{ if eq .Role "system" }}{{ .Content }}\n'
        '{{ else if eq .Role "user" }}### Question: {{ .Content }}'
        '{{ else if eq .Role "assistant" }}\n### Answer: {{ .Content }}<eos>\n'
        "{{ end }}{{ end }}\n### Answer:"
    )


@pytest.mark.parametrize("name", ["chatml", "llama_3"])
def test_a_chat_template_s_prompt_is_what_ollama_makes(name):
    render = prompt_of(ChatTemplate(chat_tokenizer("byte_level", name)))
    if name == "llama_3":  # it trims content, which Ollama's template cannot
        assert turns_of(render) is None
    else:
        assert turns_of(render).text(MESSAGES) == render(MESSAGES)


def test_what_cannot_be_said_is_left_out():
    newlines = MarkerTemplate(TEMPLATES["question_answer"], eos="<eos>", newline="<NL>")
    assert turns_of(prompt_of(newlines)) is None
    assert "# No TEMPLATE" in modelfile("m.gguf", None, ["<eos>"], Generation(), None)
    assert set(CHAT_TEMPLATES) >= {"chatml", "llama_3"}


def test_a_modelfile_has_end_tokens_settings_and_licence():
    generation = Generation(
        max_new_tokens=64, do_sample=True, temperature=0.7, top_k=40, repetition_penalty=1.1
    )
    lines = modelfile("m.gguf", None, ["<eos>", '<"end">'], generation, "mit").splitlines()
    assert lines[0] == "FROM ./m.gguf"
    assert lines[2:] == [
        'PARAMETER stop "<eos>"',
        'PARAMETER stop "<\\"end\\">"',
        "PARAMETER num_predict 64",
        "PARAMETER temperature 0.7",
        "PARAMETER repeat_penalty 1.1",
        "PARAMETER repeat_last_n -1",
        "PARAMETER top_k 40",
        'LICENSE """mit"""',
    ]
    greedy = modelfile("m.gguf", None, ["<eos>"], Generation(), None)
    assert "PARAMETER temperature 0\n" in greedy


def test_a_licence_cannot_begin_an_instruction():
    """It stands in the recipe, which may be a stranger's."""
    evil = 'mit"""\nFROM evil/model\nSYSTEM """x'
    text = modelfile("m.gguf", None, [], Generation(), evil)
    assert text.count('"""') == 2 and text.endswith('"""\n')
