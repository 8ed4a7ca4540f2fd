"""Which chat template a recipe names, what is set in it, and what a broken one says."""

import pytest
from tiny import CHAT_TEMPLATES, chat_tokenizer
from transformers import PreTrainedTokenizerFast

from finetuning.data.chat_template import ChatTemplate
from finetuning.data.chosen_template import load_template
from finetuning.data.named_templates import chat_template_of, set_chat_template, shipped_templates
from finetuning.data.row import BadRow
from finetuning.data.section import Data
from finetuning.errors import UserError

OWN = CHAT_TEMPLATES["chatml"]
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{{ '<think></think>' }}{% endif %}"
    "{{ m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{{ '<think></think>' if enable_thinking is false else '<think>\n' }}{% endif %}"
)
TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def chat_data(**settings):
    return Data(path="a", reader="messages", template="chat", **settings)


def tokenizer_with(template):
    tokenizer = chat_tokenizer("byte_level", "chatml")
    tokenizer.chat_template = template
    return tokenizer


def trained_with(template, **settings):
    """The template of a recipe with these settings, on a tokenizer with this chat template."""
    tokenizer = tokenizer_with(template)
    set_chat_template(chat_data(**settings), tokenizer)
    return load_template(chat_data(**settings), tokenizer)


def test_without_a_name_it_is_the_tokenizers_own():
    assert chat_template_of(OWN, None, {}) == OWN
    assert chat_template_of({"default": OWN, "tool_use": "b"}, None, {}) == OWN
    assert chat_template_of(None, None, {"a": 1}) is None


def test_a_name_is_one_of_the_tokenizers_or_of_trls_or_a_file(tmp_path):
    (tmp_path / "mine.jinja").write_text("mine")
    named = {"default": OWN, "tool_use": "b"}
    assert chat_template_of(named, "tool_use", {}) == "b"
    assert chat_template_of(OWN, "qwen3_training", {}) == shipped_templates()["qwen3_training"]
    assert chat_template_of(OWN, str(tmp_path / "mine.jinja"), {}) == "mine"


def test_named_templates_without_a_default_are_chosen_by_name():
    with pytest.raises(UserError, match=r"rag, tool_use; choose one with data\.chat_template"):
        chat_template_of({"rag": OWN, "tool_use": OWN}, None, {})
    assert trained_with({"rag": "b", "chat": OWN}, chat_template="chat").render(TALK)


def test_a_name_that_there_is_not_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"data\.chat_template: qwen3_trainig is no file.*qwen3_t"):
        chat_template_of(OWN, "qwen3_trainig", {})


def test_settings_are_asked_with_and_travel_with_the_saved_tokenizer(tmp_path):
    template = trained_with(THINKING, chat_template_kwargs={"enable_thinking": False})
    text = "".join(segment.text for segment in template.render(TALK))
    assert text.endswith("<|im_start|>assistant\n<think></think>a<|im_end|>")
    template.tokenizer.chat_template = template.jinja
    template.tokenizer.save_pretrained(tmp_path)
    saved = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    prompt = saved.apply_chat_template(TALK[:1], tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("assistant\n<think></think>")
    asked = saved.apply_chat_template(
        TALK[:1], tokenize=False, add_generation_prompt=True, enable_thinking=True
    )
    assert asked.endswith("assistant\n<think>\n")
    assert load_template(chat_data(), saved).render(TALK) == template.render(TALK)


def test_a_response_that_does_not_follow_the_prompt_is_refused_with_the_way_out():
    with pytest.raises(BadRow, match=r"turn 1: .*where the prompt of generation ends.*_kwargs"):
        trained_with(THINKING).render(TALK)


@pytest.mark.parametrize("name", ["chat_template", "chat_template_kwargs"])
def test_a_template_of_markers_has_no_chat_template(name):
    value = {"a": 1} if name.endswith("kwargs") else "a"
    with pytest.raises(ValueError, match=f"{name} belongs to template: chat"):
        Data(path="a", reader="dolly", template="plain_chat", **{name: value})


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}", "Unexpected end of template"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[0].content.index('nowhere') }}", "substring not found"),
        ("{{ messages[7].content }}", "list object has no element 7"),
        ("{{ raise_exception('no') }}", "no"),
        ("{{ messages | nothing }}", "No filter named 'nothing'"),
    ],
)
def test_a_broken_template_is_found_before_any_row(template, reason):
    with pytest.raises(UserError, match=f"^data.template: chat: .*{reason}.*; use another"):
        load_template(chat_data(), tokenizer_with(template))


def test_whatever_a_template_raises_for_a_row_is_told_with_the_row():
    template = OWN + "{% if messages | length > 2 %}{{ 1 / (messages | length - 3) }}{% endif %}"
    loaded = load_template(chat_data(), tokenizer_with(template))
    with pytest.raises(BadRow, match="refuses the conversation: division by zero"):
        loaded.render([*TALK, TALK[0]])


@pytest.mark.parametrize("role", ["system", "tool"])
def test_a_message_that_the_template_leaves_out_is_refused_with_turn_and_role(role):
    known = "for message in messages if message.role in ('user', 'assistant')"
    template = OWN.replace("for message in messages", known)
    loaded = load_template(chat_data(), tokenizer_with(template))
    [*_] = loaded.render(TALK)
    turns = [TALK[0], {"role": role, "content": "rules"}, TALK[1]]
    with pytest.raises(BadRow, match=f"turn 1: .* leaves out the content of the role {role}"):
        loaded.render(turns)


def test_a_thought_and_a_call_that_the_template_does_not_know_are_refused():
    thinking = {**TALK[1], "reasoning_content": "why"}
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    calling = {"role": "assistant", "content": "", "tool_calls": [call]}
    chat = ChatTemplate(tokenizer_with(OWN))
    with pytest.raises(BadRow, match=r"turn 1: .* leaves out the reasoning of the role assistant"):
        chat.render([TALK[0], thinking])
    with pytest.raises(BadRow, match=r"turn 1: .* no place for tool calls"):
        chat.render([TALK[0], calling])
    with pytest.raises(BadRow, match="no place for tools"):
        chat.render(TALK, [{"type": "function", "function": {"name": "f"}}])
    plain = load_template(Data(path="a", reader="messages", template="plain_chat"), chat.tokenizer)
    with pytest.raises(BadRow, match="turn 1: the template has no place for reasoning_content"):
        plain.render([TALK[0], thinking])
    with pytest.raises(BadRow, match="turn 1: the template has no place for tool_calls"):
        plain.render([TALK[0], calling])
    with pytest.raises(BadRow, match="the template has no place for tools"):
        plain.render(TALK, [{"type": "function", "function": {"name": "f"}}])


def test_a_thought_in_the_content_is_trained_as_it_is_where_the_template_does_not_know_thoughts():
    content = "<think>\nwhy\n</think>\n\na"
    [*_, content_segment, _, _] = ChatTemplate(tokenizer_with(OWN)).render(
        [TALK[0], {"role": "assistant", "content": content}]
    )
    assert (content_segment.text, content_segment.is_response) == (content, True)
