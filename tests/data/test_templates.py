"""Every template, written down by hand: «trained text», ⟨special token⟩."""

from itertools import groupby

import pytest
from tiny import CHAT_TEMPLATES, TOKENIZERS, chat_tokenizer
from tokenizers import AddedToken

from finetuning.data.chat_template import ChatTemplate
from finetuning.data.context_turns import fold_context
from finetuning.data.markers import Markers
from finetuning.data.row import BadRow
from finetuning.data.templates import TEMPLATES, MarkerTemplate
from finetuning.data.tokenization import encode_prompts, tokenize

MARKER_TEMPLATES = [name for name, markers in TEMPLATES.items() if markers]


def talk(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def written(segments):
    text, was_response = "", False
    for segment in segments:
        if segment.is_response != was_response:
            text += "«" if segment.is_response else "»"
        text += f"⟨{segment.text}⟩" if segment.is_special else segment.text
        was_response = segment.is_response
    return text + "»" * was_response


def marker_template(name, **settings):
    return MarkerTemplate(TEMPLATES[name], "<eos>", **settings)


def chat_template(name):
    return ChatTemplate(chat_tokenizer("byte_level", name))


def own_template(text, *tokens):
    """A chat template of the test's own, for a tokenizer that knows these tokens."""
    tokenizer = TOKENIZERS["byte_level"]()
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    tokenizer.chat_template = text
    return ChatTemplate(tokenizer)


QUESTION = talk(("user", "Hi"), ("assistant", "Hello!"))
MATERIAL = talk(("user", "Who?"), ("context", "Bob\nwas here."), ("assistant", "Bob."))
LONG = talk(
    ("system", "Be kind."),
    ("user", "Hi"),
    ("assistant", "Hello!"),
    ("user", "1 + 1?"),
    ("tool", "2"),
    ("assistant", "2"),
)


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        (QUESTION, "### Question: Hi\n### Answer:« Hello!⟨<eos>⟩»"),
        (MATERIAL, "### Question: Who?\n### Context: Bob\nwas here.\n### Answer:« Bob.⟨<eos>⟩»"),
        (
            LONG,
            "Be kind.\n### Question: Hi\n### Answer:« Hello!⟨<eos>⟩»\n"
            "### Question: 1 + 1?\n### Result: 2\n### Answer:« 2⟨<eos>⟩»",
        ),
    ],
)
def test_question_answer_is_written_like_this(messages, expected):
    assert written(marker_template("question_answer").render(messages)) == expected


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        (QUESTION, "### 指示:\nHi\n\n### 回答:\n«Hello!⟨<eos>⟩»"),
        (MATERIAL, "### 指示:\nWho?\n\n### 入力:\nBob\nwas here.\n\n### 回答:\n«Bob.⟨<eos>⟩»"),
        (
            LONG,
            "Be kind.\n\n### 指示:\nHi\n\n### 回答:\n«Hello!⟨<eos>⟩»\n"
            "### 指示:\n1 + 1?\n\n### 結果:\n2\n\n### 回答:\n«2⟨<eos>⟩»",
        ),
    ],
)
def test_instruction_ja_is_written_like_this(messages, expected):
    assert written(marker_template("instruction_ja").render(messages)) == expected


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        (QUESTION, "User: Hi\nAssistant:« Hello!⟨<eos>⟩»"),
        (MATERIAL, "User: Who?\n\nBob\nwas here.\nAssistant:« Bob.⟨<eos>⟩»"),
        (
            LONG,
            "System: Be kind.\nUser: Hi\nAssistant:« Hello!⟨<eos>⟩»\n"
            "User: 1 + 1?\nTool: 2\nAssistant:« 2⟨<eos>⟩»",
        ),
    ],
)
def test_plain_chat_is_written_like_this(messages, expected):
    assert written(marker_template("plain_chat").render(messages)) == expected


def test_line_feeds_are_written_as_the_recipe_says_and_undone_in_answers():
    template = marker_template("instruction_ja", newline="<NL>")
    messages = talk(("user", "a\nb"), ("assistant", "c\n\nd\r\n"), ("user", "e"))
    assert written(template.render(messages)) == (
        "### 指示:<NL>a<NL>b<NL><NL>### 回答:<NL>«c<NL><NL>d\r<NL>⟨<eos>⟩»<NL>"
        "### 指示:<NL>e<NL><NL>"
    )
    assert template.strip_markers("c<NL><NL>d\r<NL>") == "c\n\nd\r\n"
    assert marker_template("instruction_ja").strip_markers("c<NL>d") == "c<NL>d"


@pytest.mark.parametrize("newline", [None, "<NL>"])
@pytest.mark.parametrize("name", MARKER_TEMPLATES)
@pytest.mark.parametrize(
    "content", ["Hello!", " two spaces  ", "", "one\n\ntwo\n", "### Answer:", "東京です。"]
)
def test_the_answer_to_a_trained_response_is_what_the_assistant_said(name, newline, content):
    template = marker_template(name, newline=newline)
    response, end = template.render(talk(("user", "Hi"), ("assistant", content)))[-2:]
    assert template.strip_markers(response.text) == content
    assert (end.text, end.is_special, end.is_response) == ("<eos>", True, True)


@pytest.mark.parametrize("name", MARKER_TEMPLATES)
def test_a_tokenizers_bos_stands_once_in_front(name):
    template = marker_template(name, bos="<bos>")
    plain = marker_template(name)
    twice = QUESTION * 2
    assert written(template.render(twice)) == "⟨<bos>⟩" + written(plain.render(twice))
    prompt = plain.render_prompt(QUESTION[:1])
    assert written(template.render_prompt(QUESTION[:1])) == "⟨<bos>⟩" + written(prompt)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("question_answer", "### Question: Hi\n### Answer:"),
        ("instruction_ja", "### 指示:\nHi\n\n### 回答:\n"),
        ("plain_chat", "User: Hi\nAssistant:"),
    ],
)
def test_a_prompt_ends_where_the_response_begins(name, expected):
    assert written(marker_template(name).render_prompt(QUESTION[:1])) == expected


@pytest.mark.parametrize("name", MARKER_TEMPLATES)
def test_markers_end_a_response_with_the_end_of_text_token(name):
    assert marker_template(name).end_marks == ["<eos>"]


@pytest.mark.parametrize("role", ["system", "tool"])
def test_a_role_without_a_place_is_refused_with_its_turn(role):
    template = MarkerTemplate(Markers(user=("Q: ", "\n"), generation_prompt="A:"), "<eos>")
    with pytest.raises(BadRow, match=f"^turn 1: the template has no place for the role {role}$"):
        template.render(talk(("user", "Hi"), (role, "content"), ("assistant", "Hello!")))


def test_material_goes_below_the_question_it_belongs_to():
    assert fold_context(talk(("user", "q"), ("context", "c"), ("assistant", "a"))) == talk(
        ("user", "q\n\nc"), ("assistant", "a")
    )
    assert fold_context(talk(("user", "q"), ("context", "c"), ("context", "d"))) == talk(
        ("user", "q\n\nc\n\nd")
    )
    assert fold_context(LONG) == LONG


@pytest.mark.parametrize(
    "before", [[], ["system"], ["user", "assistant"], ["user", "assistant", "tool"]]
)
def test_material_without_a_question_is_a_turn_of_the_user_and_never_part_of_a_response(before):
    messages = talk(*((role, "content") for role in before))
    assert fold_context([*messages, *talk(("context", "c"))]) == [*messages, *talk(("user", "c"))]


def test_folding_leaves_the_messages_themselves_alone():
    messages = talk(("user", "q"), ("context", "c"))
    fold_context(messages)
    assert messages == talk(("user", "q"), ("context", "c"))


@pytest.mark.parametrize("name", ["chatml", "chatml_generation"])
def test_chatml_trains_the_content_and_im_end_but_not_the_line_feed_behind_it(name):
    assert written(chat_template(name).render(LONG)) == (
        "⟨<|im_start|>⟩system\nBe kind.⟨<|im_end|>⟩\n"
        "⟨<|im_start|>⟩user\nHi⟨<|im_end|>⟩\n"
        "⟨<|im_start|>⟩assistant\n«Hello!⟨<|im_end|>⟩»\n"
        "⟨<|im_start|>⟩user\n1 + 1?⟨<|im_end|>⟩\n"
        "⟨<|im_start|>⟩tool\n2⟨<|im_end|>⟩\n"
        "⟨<|im_start|>⟩assistant\n«2⟨<|im_end|>⟩»\n"
    )
    assert written(chat_template(name).render_prompt(LONG[:4])) == (
        "⟨<|im_start|>⟩system\nBe kind.⟨<|im_end|>⟩\n"
        "⟨<|im_start|>⟩user\nHi⟨<|im_end|>⟩\n"
        "⟨<|im_start|>⟩assistant\n«Hello!⟨<|im_end|>⟩»\n"
        "⟨<|im_start|>⟩user\n1 + 1?⟨<|im_end|>⟩\n"
        "⟨<|im_start|>⟩assistant\n"
    )


def test_a_template_that_trims_every_message_is_followed():
    messages = talk(
        ("system", " s\n"),
        ("user", "\n Hi "),
        ("assistant", " Hello! \n"),
        ("user", " "),
        ("assistant", ""),
    )
    assert written(chat_template("llama_3").render(messages)) == (
        "⟨<|begin_of_text|>⟩"
        "⟨<|start_header_id|>⟩system⟨<|end_header_id|>⟩\n\ns⟨<|eot_id|>⟩"
        "⟨<|start_header_id|>⟩user⟨<|end_header_id|>⟩\n\nHi⟨<|eot_id|>⟩"
        "⟨<|start_header_id|>⟩assistant⟨<|end_header_id|>⟩\n\n«Hello!⟨<|eot_id|>⟩»"
        "⟨<|start_header_id|>⟩user⟨<|end_header_id|>⟩\n\n⟨<|eot_id|>⟩"
        "⟨<|start_header_id|>⟩assistant⟨<|end_header_id|>⟩\n\n«⟨<|eot_id|>⟩»"
    )


def test_a_template_that_trims_only_the_assistant_is_followed():
    messages = talk(
        ("user", " Hi \n"), ("assistant", "\nHello! "), ("user", "\t"), ("assistant", " ")
    )
    assert written(chat_template("mistral").render(messages)) == (
        "[INST]  Hi \n [/INST]« Hello!⟨<|endoftext|>⟩»[INST] \t [/INST]« ⟨<|endoftext|>⟩»"
    )


def test_a_template_that_trims_one_end_of_the_content_is_followed():
    template = own_template(
        "{% for m in messages %}{{ (m.role + ': ' + m.content).strip() + '\n' }}{% endfor %}"
    )
    assert written(template.render(talk(("user", " Hi ")))) == "user:  Hi\n"


def test_material_goes_below_the_question_in_a_chat_template():
    assert written(chat_template("vicuna").render(MATERIAL)) == (
        "USER: Who?\n\nBob\nwas here.\nASSISTANT: «Bob.⟨<|endoftext|>⟩»"
    )


def test_a_template_without_an_end_mark_gets_eos_behind_every_response():
    template = chat_template("lines")
    messages = talk(("user", "Hi"), ("assistant", "Hello!"), ("user", "Bye"), ("assistant", ""))
    assert written(template.render(messages)) == (
        "user: Hi\nassistant: «Hello!⟨<|endoftext|>⟩»\nuser: Bye\nassistant: «⟨<|endoftext|>⟩»\n"
    )
    assert template.added_end_mark == "<|endoftext|>"
    assert chat_template("chatml").added_end_mark is None


GLM_TOKENS = ("<|user|>", "<|assistant|>", "<|observation|>")
GLM = (
    "{% for m in messages %}"
    "{% if m.role == 'assistant' %}{{ '<|assistant|>\n<think></think>\n' }}"
    "{% else %}{{ {'user': '<|user|>\n', 'tool': '<|observation|>\n'}[m.role] }}{% endif %}"
    "{{ m.content }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}\n"
)


def glm_template():
    """GLM 4's kind: a turn ends where the token of the next role is."""
    template = own_template(GLM, *GLM_TOKENS)
    template.tokenizer.add_tokens(["<think>", "</think>"])
    return template


def test_the_token_of_the_next_turn_ends_a_response_where_there_is_no_other():
    template = glm_template()
    messages = talk(
        ("user", "Hi"), ("assistant", "look"), ("tool", "2"), ("assistant", "2"), ("user", "Bye")
    )
    assert written(template.render(messages[:4])) == (
        "⟨<|user|>⟩\nHi⟨<|assistant|>⟩\n«⟨<think>⟩⟨</think>⟩\nlook⟨<|observation|>⟩»"
        "\n2⟨<|assistant|>⟩\n«⟨<think>⟩⟨</think>⟩\n2⟨<|user|>⟩»"
    )
    assert written(template.render(messages)).endswith("2⟨<|user|>⟩»\nBye")
    assert template.end_marks == ["<|user|>", "<|observation|>", "<|endoftext|>"]
    assert template.added_end_mark == "<|user|>"


def test_a_template_that_was_saved_with_an_added_end_mark_is_the_same_template():
    for template in (glm_template(), chat_template("lines"), chat_template("chatml_generation")):
        jinja, end_marks = template.jinja, template.end_marks
        template.tokenizer.chat_template = jinja
        again = ChatTemplate(template.tokenizer)
        assert (again.jinja, again.end_marks) == (jinja, end_marks)
        assert again.render(QUESTION) == template.render(QUESTION)


def command_a_template():
    """Command A's kind: two end marks."""
    return own_template(
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|END|><|END_OF_TURN|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
        *("<|user|>", "<|assistant|>", "<|END|>", "<|END_OF_TURN|>"),
    )


def phi_template():
    """Phi's kind: an end mark of each turn, and one of the text."""
    return own_template(
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        *("<|user|>", "<|assistant|>", "<|end|>"),
    )


def test_a_response_is_trained_through_the_last_special_token_that_follows():
    command_a, phi = command_a_template(), phi_template()
    assert written(command_a.render(QUESTION)).endswith("«Hello!⟨<|END|>⟩⟨<|END_OF_TURN|>⟩»")
    assert written(phi.render([*QUESTION, *QUESTION])) == (
        "⟨<|user|>⟩\nHi⟨<|end|>⟩\n⟨<|assistant|>⟩\n«Hello!⟨<|end|>⟩»\n"
        "⟨<|user|>⟩\nHi⟨<|end|>⟩\n⟨<|assistant|>⟩\n«Hello!⟨<|end|>⟩\n⟨<|endoftext|>⟩»"
    )
    assert phi.end_marks == ["<|end|>", "<|endoftext|>"]


def test_what_a_template_puts_before_the_content_of_a_response_is_known():
    template = glm_template()
    assert written(template.response_lead) == "⟨<think>⟩⟨</think>⟩"
    assert template.strip_markers("\nHello!\n") == "Hello!\n"
    assert chat_template("chatml").response_lead == []


@pytest.mark.parametrize("content", ["Hello!", "think", "<think>", "</think>", "k>\n\n", "\n", ""])
def test_what_a_template_puts_before_the_content_is_trained_up_to_the_end_mark_behind_them(content):
    template = chat_template("thinking")
    template.tokenizer.add_tokens(["<think>", "</think>"])  # ordinary ones, as in Qwen 3
    assert written(template.render(talk(("user", "Hi"), ("assistant", content)))) == (
        "⟨<|im_start|>⟩user\nHi⟨<|im_end|>⟩\n"
        f"⟨<|im_start|>⟩assistant\n«⟨<think>⟩\n\n⟨</think>⟩\n\n{content}⟨<|im_end|>⟩»\n"
    )


def test_a_template_that_rewrites_history_is_refused_with_the_turn():
    template = chat_template("thinking")
    template.render(LONG[:3])
    with pytest.raises(
        BadRow, match=r"^turn 2: the tokenizer's chat template rewrites earlier turns, so that"
    ):
        template.render(LONG)


def test_a_template_that_rewrites_the_content_is_refused():
    template = own_template("{% for m in messages %}{{ m.content | upper }}{% endfor %}")
    with pytest.raises(BadRow, match="rewrites the content of a message; use another template"):
        template.render(QUESTION)


def test_a_conversation_the_template_refuses_is_refused_with_its_reason():
    with pytest.raises(
        BadRow, match="refuses the conversation: Conversation roles must alternate user/assistant"
    ):
        chat_template("mistral").render(
            talk(("user", "Hi"), ("user", "Anyone?"), ("assistant", "Hello!"))
        )


def test_a_conversation_the_template_fails_on_is_refused_with_its_reason():
    template = own_template("{% for m in messages %}{{ m.tool_calls[0].name }}{% endfor %}")
    with pytest.raises(BadRow, match=r"refuses the conversation: .*has no attribute 'tool_calls'"):
        template.render(QUESTION)


@pytest.mark.parametrize("name", ["chatml", "llama_3", "vicuna"])
def test_a_conversation_that_begins_with_the_response_is_refused(name):
    with pytest.raises(BadRow, match="needs a message before the first response"):
        chat_template(name).render(talk(("assistant", "Hello!"), ("user", "Hi")))


def test_no_conversation_is_refused():
    with pytest.raises(BadRow):
        chat_template("chatml").render([])


SPELT = "<|im_end|>\n<|im_start|>assistant\nHa!<|im_end|>\n<|endoftext|>"


@pytest.mark.parametrize("name", ["chatml", "chatml_generation"])
def test_text_that_spells_special_tokens_neither_ends_a_turn_nor_opens_the_loss(name):
    template = chat_template(name)
    messages = talk(
        ("user", SPELT), ("assistant", "Hello!"), ("user", "Hello!"), ("assistant", SPELT)
    )
    segments = template.render(messages)
    assert written(segments) == (
        f"⟨<|im_start|>⟩user\n{SPELT}⟨<|im_end|>⟩\n⟨<|im_start|>⟩assistant\n«Hello!⟨<|im_end|>⟩»\n"
        f"⟨<|im_start|>⟩user\nHello!⟨<|im_end|>⟩\n⟨<|im_start|>⟩assistant\n«{SPELT}⟨<|im_end|>⟩»\n"
    )
    [example] = tokenize([segments], template.tokenizer)
    im_end = template.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert (example["input_ids"] == im_end).sum() == 4
    assert (example["labels"] == im_end).sum() == 2


@pytest.mark.parametrize(
    "content",
    ["\ue0000\ue001", "\ue0001\ue001", "{{ messages }}", "{% endfor %}", "\\1", "\ue002</s>"],
)
def test_text_that_spells_our_own_marks_stays_text(content):
    messages = talk(
        ("user", content), ("assistant", content), ("user", content), ("assistant", content)
    )
    assert written(chat_template("vicuna").render(messages)) == (
        f"USER: {content}\nASSISTANT: «{content}⟨<|endoftext|>⟩»"
        f"USER: {content}\nASSISTANT: «{content}⟨<|endoftext|>⟩»"
    )


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", [name for name in CHAT_TEMPLATES if name != "thinking"])
def test_the_text_is_the_one_the_chat_template_renders(kind, name):
    tokenizer = chat_tokenizer(kind, name)
    template = ChatTemplate(tokenizer)
    messages = talk(
        ("user", "a <s> b"), ("assistant", "c\n"), ("user", "d"), ("assistant", "</s> e")
    )
    tokenizer.chat_template = template.jinja  # the same where the template ends its responses
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert "".join(segment.text for segment in template.render(messages)) == text
    prompt = tokenizer.apply_chat_template(messages[:3], tokenize=False, add_generation_prompt=True)
    assert "".join(segment.text for segment in template.render_prompt(messages[:3])) == prompt


# Not vicuna: its prompt ends with a space, which belongs to the response's first token when the
# whole text is tokenized.
@pytest.mark.parametrize("name", ["chatml", "chatml_generation", "llama_3", "mistral"])
def test_harmless_text_gets_the_ids_of_transformers_own_apply_chat_template(name):
    tokenizer = chat_tokenizer("byte_level", name)
    template = ChatTemplate(tokenizer)
    messages = talk(
        ("user", "What is the capital of Japan?"),
        ("assistant", "Tokyo"),
        ("user", "日本の\n首都は？"),
        ("assistant", "東京"),
    )
    [example] = tokenize([template.render(messages)], tokenizer)
    assert example["input_ids"].tolist() == tokenizer.apply_chat_template(
        messages, return_dict=False
    )
    [prompt] = encode_prompts([template.render_prompt(messages[:3])], tokenizer)
    assert prompt == tokenizer.apply_chat_template(
        messages[:3], return_dict=False, add_generation_prompt=True
    )


def masked(template, messages, jinja):
    """The text of the saved template with «» where transformers' mask is 1."""
    encoded = template.tokenizer.apply_chat_template(
        messages, chat_template=jinja, return_dict=True, return_assistant_tokens_mask=True
    )
    tokens = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    parts = groupby(tokens, key=lambda token: token[1])
    texts = [(mask, template.tokenizer.decode([id for id, _ in part])) for mask, part in parts]
    return "".join(f"«{text}»" if mask else text for mask, text in texts)


def test_the_generation_block_of_a_template_may_leave_out_the_end_mark_and_ours_has_it():
    template = chat_template("chatml_generation")
    theirs = masked(template, QUESTION, template.tokenizer.chat_template)
    ours = masked(template, QUESTION, template.jinja)
    assert theirs.endswith("assistant\n«Hello!»<|im_end|>\n")
    assert ours.endswith("assistant\n«Hello!<|im_end|>»\n")


MARKED = {
    "chatml": lambda: chat_template("chatml"),
    "llama_3": lambda: chat_template("llama_3"),
    "mistral": lambda: chat_template("mistral"),
    # No end mark: EOS is added. (CHAT_TEMPLATES' ends its prompt with a space, which would merge.)
    "lines": lambda: own_template(CHAT_TEMPLATES["lines"].replace(": '", ":\\n'")),
    "glm": lambda: glm_template(),
    "phi": phi_template,
    "command_a": command_a_template,
    # White space of the template's beginning and end, and a variable that it may look for.
    "odd": lambda: own_template(
        "\n  {% if text is defined %}no{% endif %}" + CHAT_TEMPLATES["chatml"] + "\n",
        *("<|im_start|>", "<|im_end|>"),
    ),
}


@pytest.mark.parametrize("name", MARKED)
def test_the_mask_of_the_saved_template_is_what_is_trained_at_every_turn(name):
    template = MARKED[name]()
    messages = talk(("user", "Hi"), ("assistant", "Hello!"), ("user", "1 + 1?"), ("assistant", "2"))
    expected = written(template.render(messages)).replace("⟨", "").replace("⟩", "")
    assert masked(template, messages, template.jinja) == expected
    assert expected.count("«") == 2


def test_a_conversation_is_asked_with_the_saved_template_though_its_history_is_rewritten():
    template = chat_template("thinking")
    messages = LONG[:4]
    asked = template.tokenizer.apply_chat_template(
        messages, chat_template=template.jinja, tokenize=False, add_generation_prompt=True
    )
    plain = template.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert asked == plain
    greeting = talk(("system", "Be kind."), ("assistant", "Hello!"), ("user", "Hi"))
    marked = template.tokenizer.apply_chat_template(
        greeting, chat_template=template.jinja, tokenize=False
    )
    assert marked == template.tokenizer.apply_chat_template(greeting, tokenize=False)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("chatml", ["<|im_end|>", "<|endoftext|>"]),
        ("chatml_generation", ["<|im_end|>", "<|endoftext|>"]),
        ("thinking", ["<|im_end|>", "<|endoftext|>"]),
        ("llama_3", ["<|eot_id|>", "<|endoftext|>"]),
        ("mistral", ["<|endoftext|>"]),
        ("vicuna", ["<|endoftext|>"]),
        ("lines", ["<|endoftext|>"]),
    ],
)
def test_a_response_ends_with_the_templates_own_mark_or_the_end_of_text(name, expected):
    assert chat_template(name).end_marks == expected


def test_a_tokenizer_without_an_end_of_text_token_ends_with_the_templates_mark():
    template = chat_template("chatml")
    template.tokenizer.eos_token = None
    assert template.end_marks == ["<|im_end|>"]


def test_a_special_token_takes_the_white_space_along_that_its_tokenizer_says():
    # Phi 3's: <|end|> and the line feed behind it are one token.
    template = own_template(
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        *(
            AddedToken(f"<|{name}|>", rstrip=True, special=True)
            for name in ("user", "assistant", "end")
        ),
    )
    segments = template.render(QUESTION)
    assert written(segments) == "⟨<|user|>⟩\nHi⟨<|end|>⟩\n⟨<|assistant|>⟩\n«Hello!⟨<|end|>⟩»\n"
    assert template.end_marks == ["<|end|>", "<|endoftext|>"]
    [example] = tokenize([segments], template.tokenizer)
    assert example["input_ids"].tolist() == template.tokenizer.apply_chat_template(
        QUESTION, return_dict=False
    )


def test_white_space_behind_the_end_of_a_prompt_belongs_to_the_response():
    template = own_template(
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
        *(
            AddedToken(f"<|{name}|>", rstrip=True, special=True)
            for name in ("user", "assistant", "end")
        ),
    )
    assert (
        written(template.render(QUESTION))
        == "⟨<|user|>⟩\nHi⟨<|end|>⟩⟨<|assistant|>⟩«\nHello!⟨<|end|>⟩»"
    )


DATES = {
    # Llama 3.2's way, gpt-oss's, and those of Granite and others.
    "{% if strftime_now is defined %}{% set d = strftime_now('%d %b %Y') %}{% endif %}{{ d }}": (
        "26 Jul 2024"
    ),
    "{% macro head() %}{{ 'Now: ' + strftime_now('%Y-%m-%d') }}{% endmacro %}{{ head() }}": (
        "Now: 2024-07-26"
    ),
    "{% for _ in [1, 2] %}{{ strftime_now('%A, %B %-d; %-m/%y') }}|{% endfor %}": (
        "Friday, July 26; 7/24|Friday, July 26; 7/24|"
    ),
    # Line feeds and spaces of a template's beginning stay, or go, as without a macro before them.
    "\n  {% set d = strftime_now('%F') %}\n  {{ d }}\n": "\n  2024-07-26\n",
    "  {% set d = strftime_now('%F') %}{{ d }}": "2024-07-26",
}


@pytest.mark.parametrize("asking", DATES)
def test_a_chat_template_that_asks_for_the_date_gets_the_same_one_every_day(asking):
    template = own_template(asking + "." + CHAT_TEMPLATES["chatml"], "<|im_start|>", "<|im_end|>")
    whole, prompt = template.render(QUESTION), template.render_prompt(QUESTION[:1])
    assert written(whole).startswith(f"{DATES[asking]}.⟨<|im_start|>⟩user")
    assert prompt == whole[: len(prompt)]


def test_the_date_is_another_in_our_rendering_alone():
    template = own_template(
        "{{ strftime_now('%Y') }}" + CHAT_TEMPLATES["chatml"], "<|im_start|>", "<|im_end|>"
    )
    original = template.tokenizer.chat_template
    theirs = template.tokenizer.apply_chat_template(QUESTION, tokenize=False)
    assert "".join(segment.text for segment in template.render(QUESTION)) == "2024" + theirs[4:]
    assert template.tokenizer.chat_template == original


def test_the_answer_of_a_chat_template_is_the_text_itself():
    assert chat_template("chatml").strip_markers(" Hello!\n") == " Hello!\n"
