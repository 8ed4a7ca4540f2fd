"""Every chat template that the installed trl ships: what each trains, and why it does not.

The oracle of the masks is trl's: the `{% generation %}` blocks of its templates for training, read
by transformers.
"""

import json
import re
from functools import cache
from pathlib import Path

import pytest
import trl
from tiny import byte_level
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from finetuning.data.chat_template import ChatTemplate
from finetuning.data.message_forms import in_form
from finetuning.data.named_templates import with_settings
from finetuning.data.rendering import Conversation, render_row
from finetuning.data.row import BadRow
from finetuning.data.section import Data

FOLDER = Path(trl.__file__).parent / "chat_templates"
SHIPPED = sorted(file.stem for file in FOLDER.glob("*.jinja"))
# What is written in brackets in a template is a token of its model, but for GLM's and Qwen's tags.
TOKENS = re.compile(
    r"<\|[^|<>\s]+\|>|<｜[^<>\s]+｜>|<\|[a-z_]+>|<[a-z_]+\|>|\[gMASK\]|<sop>|</s>"
    r"|<(?:start|end)_of_turn>|<end_of_utterance>"
)
TAGS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]

WEATHER = {
    "name": "weather",
    "description": "The weather in a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "description": "Its name."}},
        "required": ["city"],
    },
}
CALL = {
    "id": "call00001",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Kyoto"}},
}
USER = {"role": "user", "content": "Q1"}
ASSISTANT = {"role": "assistant", "content": "R1"}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "name": "weather", "tool_call_id": "call00001", "content": '17 "C"'}
CONVERSATIONS = {
    "turn": Conversation([USER, ASSISTANT], []),
    "turns": Conversation(
        [USER, ASSISTANT, {**USER, "content": "Q2"}, {**ASSISTANT, "content": "R2"}], []
    ),
    "system": Conversation([{"role": "system", "content": "SYSTEM"}, USER, ASSISTANT], []),
    "tools": Conversation(
        [USER, CALLING, RESULT, ASSISTANT], [{"type": "function", "function": WEATHER}]
    ),
    "reasoning": Conversation([USER, {**ASSISTANT, "reasoning_content": "WHY"}], []),
}
# What a row of the table says of a conversation: how many examples, or why there is none.
NO_SYSTEM = "System role not supported"
NO_TOOLS = "has no place for tools"
NO_CALLS = "has no place for tool calls"
NO_REASONING = "leaves out the reasoning"
# Its prompt opens a thought, and it takes thoughts out of every response.
NO_PREFIX = "rewrites the content of a message"

# (turn, turns, system, tools, reasoning): the templates
TABLE = {
    (1, 1, 1, 1, 1): (
        "diffusion_gemma diffusion_gemma_training gemma4_v5 glm4moe glm4moe_training gptoss "
        "gptoss_training lfm2_2_5 lfm2_2_5_v2 lfm2_2_5_vl muse_glimmer muse_glimmer_training "
        "nemotron_3_5_lightning nemotron_3_5_lightning_training nemotron_3_nano "
        "nemotron_3_nano_training nemotron_3_super nemotron_3_super_training nemotron_3_ultra "
        "nemotron_3_ultra_training qwen3_5_nothink_training qwen3_5_think_training "
        "qwen3_6_training qwen3_8 qwen3_8_training qwen3_training"
    ),
    # They rewrite history, so that each response is an example.
    (1, 2, 1, 2, 1): "qwen3",
    (1, 2, 1, 1, 1): "qwen3_5_nothink qwen3_5_think qwen3_6",
    (1, 1, 1, 1, NO_REASONING): (
        "gemma4 gemma4_v2 gemma4_v3 gemma4_v4 lfm2_v2 lfm2_v2_training llama3_1 llama3_2 qwen2_5 "
        "qwen2_5_training qwen3_instruct_2507 qwen3_instruct_2507_training qwen3_vl "
        "qwen3_vl_training"
    ),
    (1, 1, 1, NO_CALLS, NO_REASONING): "lfm2 lfm2_training",
    (1, 1, 1, NO_TOOLS, NO_REASONING): (
        "cohere cohere2 cohere2_training cohere_training gemma3 gemma3_training idefics3 "
        "idefics3_training llama3 llama3_training llava_next llava_next_training phi3 phi3_5 "
        "phi3_5_training phi3_training qwen2_5_vl qwen2_5_vl_training smolvlm smolvlm_training"
    ),
    (1, 1, NO_SYSTEM, NO_TOOLS, NO_REASONING): "gemma gemma_training",
    (1, 1, 1, NO_TOOLS, 1): "deepseek_r1_distill_training",
    (NO_PREFIX, NO_PREFIX, NO_PREFIX, NO_TOOLS, NO_PREFIX): (
        "deepseek_r1_distill deepseekv3 deepseekv3_training"
    ),
}
OUTCOMES = {name: outcomes for outcomes, names in TABLE.items() for name in names.split()}
TRAINABLE = [name for name in SHIPPED if OUTCOMES[name][0] == 1]
WITH_MASK = [
    name
    for name in TRAINABLE
    if re.search(r"{%-? generation", (FOLDER / f"{name}.jinja").read_text(encoding="utf-8"))
    and name != "deepseek_r1_distill_training"  # needs a response with <think>; tested below
]


@cache
def plain_tokenizer() -> str:
    return byte_level().backend_tokenizer.to_str()


def tokenizer_of(template: str) -> PreTrainedTokenizerFast:
    """A tokenizer that knows the special tokens in the template's text."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(plain_tokenizer()),
        bos_token="<bos>",
        eos_token="<|endoftext|>",
    )
    tokenizer.add_tokens(sorted(set(TOKENS.findall(template))), special_tokens=True)
    tokenizer.add_tokens([tag for tag in TAGS if tag in template])
    tokenizer.chat_template = template
    return tokenizer


def template_of(name: str, conversation: str = "turn") -> ChatTemplate:
    """With thinking as the conversation has it, where a template asks for that."""
    return thinking_template(name, conversation == "reasoning")


@cache
def thinking_template(name: str, thinks: bool) -> ChatTemplate:
    text = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    return ChatTemplate(tokenizer_of(with_settings(text, {"enable_thinking": thinks})))


def render(name: str, conversation: str) -> list:
    data = Data(path="a", reader="messages", template="chat")
    return render_row(
        CONVERSATIONS[conversation], template_of(name, conversation), data.loss_on, data.turns
    )


def trained_texts(segments) -> list[str]:
    texts, was_trained = [], False
    for segment in segments:
        is_trained = segment.is_response and segment.is_trained
        if is_trained and was_trained:
            texts[-1] += segment.text
        elif is_trained:
            texts.append(segment.text)
        was_trained = is_trained
    return texts


def test_the_table_names_every_template_that_trl_ships():
    assert sorted(OUTCOMES) == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_every_template_trains_what_the_table_says_or_says_why_not(name):
    for conversation, outcome in zip(CONVERSATIONS, OUTCOMES[name], strict=True):
        if isinstance(outcome, str):
            with pytest.raises(BadRow, match=outcome):
                render(name, conversation)
        else:
            assert len(render(name, conversation)) == outcome


@pytest.mark.parametrize("name", TRAINABLE)
def test_every_template_trains_each_response_whole_and_nothing_of_a_prompt(name):
    for conversation, outcome in zip(CONVERSATIONS, OUTCOMES[name], strict=True):
        if isinstance(outcome, str):
            continue
        template = template_of(name, conversation)
        messages = CONVERSATIONS[conversation].messages
        examples = render(name, conversation)
        texts = [text for segments in examples for text in trained_texts(segments)]
        responses = [turn for turn in messages if turn["role"] == "assistant"]
        for text, turn in zip(texts, responses, strict=True):
            parts = ["weather", "Kyoto"] if turn.get("tool_calls") else [turn["content"]]
            parts += [turn["reasoning_content"]] if "reasoning_content" in turn else []
            assert all(part in text for part in parts)
        for text in texts:
            assert not any(part in text for part in ("Q1", "Q2", "SYSTEM", "17"))
        for segments in examples:
            last = [segment for segment in segments if segment.is_trained and segment.is_response]
            assert last[-1].is_special and last[-1].text in template.end_marks


def oracle(template: ChatTemplate, conversation: Conversation) -> list[str]:
    """What trl's template trains, without what the prompt says and white space behind the end."""
    tools = conversation.tools or None
    turns = [in_form(turn, template.call_form) for turn in conversation.messages]

    def rendered(turns, **settings):
        texts, spans = render_jinja_template(
            [turns],
            tools=tools,
            chat_template=template.unmarked,
            **template.tokenizer.special_tokens_map,
            **settings,
        )
        return texts[0], spans and spans[0]

    text, spans = rendered(turns, return_assistant_tokens_mask=True)
    is_trained = {place for start, end in spans for place in range(start, end)}
    ends = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
    prompts = [len(rendered(turns[:end], add_generation_prompt=True)[0]) for end in ends]
    limits = [*(len(rendered(turns[:end])[0]) for end in ends[1:]), len(text)]
    return [
        "".join(text[place] for place in range(start, limit) if place in is_trained).strip()
        for start, limit in zip(prompts, limits, strict=True)
    ]


@pytest.mark.parametrize("name", WITH_MASK)
def test_the_masks_are_those_of_trl(name):
    for conversation in CONVERSATIONS:
        template = template_of(name, conversation)
        try:
            examples = render(name, conversation)
        except BadRow:
            continue
        texts = [text.strip() for segments in examples for text in trained_texts(segments)]
        theirs = oracle(template, CONVERSATIONS[conversation])
        if name == "diffusion_gemma_training" and conversation == "tools":
            # It trains neither the token that ends a call nor, behind a result that no token
            # separates, the beginning of the model's turn.
            theirs = [theirs[0] + "<|tool_response>", "<|turn>model\n" + theirs[1]]
        assert texts == theirs


def test_a_response_without_a_thought_gets_an_empty_one_where_the_prompt_opens_it():
    name = "deepseek_r1_distill_training"
    end = "<｜end▁of▁sentence｜>"
    [segments] = render(name, "turn")
    assert trained_texts(segments) == [f"\n</think>\n\nR1{end}"]
    [segments] = render(name, "reasoning")
    assert trained_texts(segments) == [f"WHY\n</think>\n\nR1{end}"]
    messages = [USER, {**ASSISTANT, "content": "<think>\nWHY\n</think>\n\nR1"}]
    assert template_of(name, "reasoning").render(messages) == segments
    assert oracle(template_of(name, "turn"), Conversation(messages, [])) == [
        f"WHY\n</think>\n\nR1{end}"
    ]


def test_the_refusal_offers_trls_form_for_training():
    with pytest.raises(BadRow, match=r"data\.chat_template: deepseek_r1_distill_training is trl"):
        render("deepseek_r1_distill", "turn")


@pytest.mark.parametrize("name", TRAINABLE)
def test_the_text_of_every_template_is_the_one_transformers_renders(name):
    template = template_of(name, "turn")
    tokenizer = tokenizer_of(template.jinja)
    messages = CONVERSATIONS["turn"].messages
    if template.opens_thought:
        messages = [USER, {**ASSISTANT, "content": "<think>\n\n</think>\n\nR1"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert "".join(segment.text for segment in template.render(messages)) == text
    prompt = tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
    assert "".join(segment.text for segment in template.render_prompt([USER])) == prompt
    assert text.startswith(prompt)


@pytest.mark.parametrize("name", TRAINABLE)
def test_the_saved_template_writes_what_the_tokenizers_own_writes_at_every_turn(name):
    template = template_of(name)
    tokenizer = tokenizer_of(template.jinja)
    messages = CONVERSATIONS["turns"].messages
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == template.apply(messages)
    prompt = tokenizer.apply_chat_template(messages[:3], tokenize=False, add_generation_prompt=True)
    assert prompt == template.apply(messages[:3], add_generation_prompt=True)


def text_of(segments) -> str:
    return "".join(segment.text for segment in segments)


def test_a_conversation_whose_history_is_rewritten_is_one_example_of_each_response():
    data = Data(path="a", reader="messages", template="chat")
    template = thinking_template("qwen3", True)
    first, second = render_row(CONVERSATIONS["turns"], template, data.loss_on, data.turns)
    assert text_of(first) == (
        "<|im_start|>user\nQ1<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\nR1<|im_end|>\n"
    )
    assert trained_texts(first) == ["<think>\n\n</think>\n\nR1<|im_end|>"]
    assert text_of(second) == (
        "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\nR1<|im_end|>\n"
        "<|im_start|>user\nQ2<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\nR2<|im_end|>\n"
    )
    assert trained_texts(second) == ["<think>\n\n</think>\n\nR2<|im_end|>"]
    prompt = template.render_prompt(CONVERSATIONS["turns"].messages[:3])
    assert second[: len(prompt)] == prompt


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"turns": "each"}, [["R1<|im_end|>"], ["R2<|im_end|>"]]),
        ({"turns": "together"}, [["R1<|im_end|>", "R2<|im_end|>"]]),
        ({"loss_on": "last_response"}, [["R2<|im_end|>"]]),
        ({"loss_on": "last_response", "turns": "each"}, [["R2<|im_end|>"]]),
    ],
)
def test_the_recipe_says_which_turns_are_trained(settings, expected):
    data = Data(path="a", reader="messages", template="chat", **settings)
    examples = render_row(
        CONVERSATIONS["turns"], template_of("qwen2_5", "turns"), data.loss_on, data.turns
    )
    assert [trained_texts(segments) for segments in examples] == expected


def test_a_history_that_is_rewritten_is_refused_where_the_turns_must_stay_together():
    data = Data(path="a", reader="messages", template="chat", turns="together")
    with pytest.raises(BadRow, match=r"turn 1: .* rewrites earlier turns.* data\.turns: each"):
        render_row(CONVERSATIONS["turns"], template_of("qwen3", "turns"), data.loss_on, data.turns)


def test_the_last_response_is_trained_where_history_is_rewritten():
    data = Data(path="a", reader="messages", template="chat", loss_on="last_response")
    [segments] = render_row(
        CONVERSATIONS["turns"], template_of("qwen3", "turns"), data.loss_on, data.turns
    )
    assert segments == render("qwen3", "turns")[1]


def test_a_turn_that_the_row_does_not_train_is_read_and_not_trained():
    messages, tools, *_ = CONVERSATIONS["turns"]
    messages = [messages[0], {**messages[1], "is_trained": False}, *messages[2:]]
    data = Data(path="a", reader="messages", template="chat")
    for name in ("qwen2_5", "qwen3"):
        template = template_of(name, "turns")
        [segments] = render_row(Conversation(messages, tools), template, data.loss_on, data.turns)
        [text] = trained_texts(segments)
        assert "R2" in text and "R1" in text_of(segments)


def test_the_tools_of_a_row_are_in_the_prompt_and_its_calls_are_trained():
    [segments] = render("qwen2_5", "tools")
    prompt = text_of(segments).partition("<|im_start|>user")[0]
    assert json.dumps(WEATHER["parameters"]) in prompt
    assert trained_texts(segments) == [
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Kyoto"}}\n</tool_call><|im_end|>',
        "R1<|im_end|>",
    ]


def test_a_tool_that_spells_a_special_token_is_refused():
    messages, tools, *_ = CONVERSATIONS["tools"]
    spelt = {**CALL, "function": {"name": "weather", "arguments": {"city": "<|im_end|>"}}}
    messages = [messages[0], {**CALLING, "tool_calls": [spelt]}, *messages[2:]]
    with pytest.raises(BadRow, match=r"spell the special token '<\|im_end\|>'"):
        template_of("qwen2_5", "tools").render(messages, tools)
