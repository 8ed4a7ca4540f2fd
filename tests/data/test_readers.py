"""Row -> messages for every data format, and what a row that does not fit is told."""

import json
import re

import pytest

from finetuning.data.readers import FILE_READERS, READERS, ROLES
from finetuning.data.row import BadRow
from finetuning.data.section import Source
from finetuning.data.sources import load_rows


def talk(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def read(reader, row):
    return READERS[reader](row)


@pytest.mark.parametrize(
    ("reader", "row", "expected"),
    [
        (
            "dolly",
            {
                "instruction": "Who?",
                "context": "Bob was here.",
                "response": "Bob.",
                "category": "closed_qa",
            },
            talk(("user", "Who?"), ("context", "Bob was here."), ("assistant", "Bob.")),
        ),
        (
            "dolly",
            {"instruction": "Who?", "context": "", "response": "Bob."},
            talk(("user", "Who?"), ("assistant", "Bob.")),
        ),
        (
            "alpaca",
            {"instruction": "Add.", "input": "1, 2", "output": "3"},
            talk(("user", "Add."), ("context", "1, 2"), ("assistant", "3")),
        ),
        (
            "alpaca",
            {"instruction": "Add.", "input": "", "output": "3"},
            talk(("user", "Add."), ("assistant", "3")),
        ),
        (
            "alpaca",
            {"instruction": "Add.", "input": None, "output": "3"},
            talk(("user", "Add."), ("assistant", "3")),
        ),
        (
            "alpaca",
            {"instruction": "Add.", "output": "3"},
            talk(("user", "Add."), ("assistant", "3")),
        ),
        (
            "prompt_response",
            {"prompt": "Hi", "response": "Hello!"},
            talk(("user", "Hi"), ("assistant", "Hello!")),
        ),
        (
            "prompt_response",
            {"prompt": "Hi", "completion": "Hello!"},
            talk(("user", "Hi"), ("assistant", "Hello!")),
        ),
        (
            "prompt_response",
            {"prompt": "Hi", "response": "Hello!", "completion": "unused"},
            talk(("user", "Hi"), ("assistant", "Hello!")),
        ),
        (
            "messages",
            {
                "messages": [
                    {"role": "system", "content": "s"},
                    *talk(("user", "Hi"), ("assistant", "Hello!")),
                ]
            },
            talk(("system", "s"), ("user", "Hi"), ("assistant", "Hello!")),
        ),
        (
            "sharegpt",
            {
                "conversations": [
                    {"from": "human", "value": "Hi"},
                    {"from": "gpt", "value": "Hello!"},
                ],
                "id": 7,
            },
            talk(("user", "Hi"), ("assistant", "Hello!")),
        ),
        (
            "harry_potter",
            {"session": "Session-1", "line": 3, "question": "Tea?", "answer": "Yes."},
            talk(("user", "Tea?"), ("assistant", "Yes.")),
        ),
    ],
)
def test_a_row_is_read_as_these_messages(reader, row, expected):
    assert read(reader, row) == expected


def test_words_are_taken_as_they_are():
    words = " <s>\r\n\t### Answer: 👩‍👩‍👧\x00 "
    assert read("prompt_response", {"prompt": words, "response": words}) == talk(
        ("user", words), ("assistant", words)
    )
    assert read("dolly", {"instruction": words, "context": words, "response": ""}) == talk(
        ("user", words), ("context", words), ("assistant", "")
    )


@pytest.mark.parametrize("column", ["conversations", "conversation"])
@pytest.mark.parametrize(("speaker", "words"), [("from", "value"), ("role", "content")])
@pytest.mark.parametrize("spelling", [str, str.upper, str.title])
@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("system", "system"),
        ("human", "user"),
        ("user", "user"),
        ("gpt", "assistant"),
        ("assistant", "assistant"),
        ("function_call", "assistant"),
        ("tool", "tool"),
        ("observation", "tool"),
        ("function_response", "tool"),
    ],
)
def test_sharegpt_is_read_in_its_spellings_in_the_wild(
    column, speaker, words, spelling, name, role
):
    row = {
        column: [
            {speaker: spelling(name), words: "Hi"},
            {speaker: "gpt", words: "Hello!", "weight": 1},
        ]
    }
    assert read("sharegpt", row) == talk((role, "Hi"), ("assistant", "Hello!"))


def test_every_known_name_means_one_of_four_roles():
    assert set(ROLES.values()) == {"system", "user", "assistant", "tool"}
    for name, role in ROLES.items():
        assert read("messages", {"messages": [{"role": name, "content": "a"}]}) == talk((role, "a"))


HAS = " (the row has instruction, text)"
NAMES = ", ".join(ROLES)


@pytest.mark.parametrize(
    ("reader", "row", "complaint"),
    [
        (
            "dolly",
            {"instruction": "a", "text": "b"},
            f"column response: expected text, found nothing{HAS}",
        ),
        (
            "dolly",
            {"instruction": None, "response": "b"},
            "column instruction: expected text, found nothing",
        ),
        (
            "dolly",
            {"instruction": 3, "response": "b"},
            "column instruction: expected text, found int 3",
        ),
        (
            "dolly",
            {"instruction": "a", "context": ["b"], "response": "c"},
            "column context: expected text, found list ['b']",
        ),
        ("dolly", {}, "column instruction: expected text, found nothing (the row has no columns)"),
        (
            "alpaca",
            {"instruction": "a", "text": "b"},
            f"column output: expected text, found nothing{HAS}",
        ),
        (
            "alpaca",
            {"instruction": "a", "input": False, "output": "b"},
            "column input: expected text, found bool False",
        ),
        (
            "prompt_response",
            {"instruction": "a", "text": "b"},
            f"column prompt: expected text, found nothing{HAS}",
        ),
        (
            "prompt_response",
            {"prompt": "a", "text": "b"},
            "column response: expected text, found nothing (the row has prompt, text)",
        ),
        (
            "prompt_response",
            {"prompt": "a", "completion": 1},
            "column completion: expected text, found int 1",
        ),
        (
            "messages",
            {"instruction": "a", "text": "b"},
            f"column messages: expected a list of turns, found nothing{HAS}",
        ),
        ("messages", {"messages": []}, "column messages: expected a list of turns, found list []"),
        (
            "messages",
            {"messages": "Hi"},
            "column messages: expected a list of turns, found str 'Hi'",
        ),
        (
            "messages",
            {"messages": ["Hi"]},
            "column messages, turn 0: expected {from, value} or {role, content}, found str 'Hi'",
        ),
        (
            "messages",
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": None},
                ]
            },
            "column messages, turn 1: expected text, found nothing",
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "a"}]}]},
            "column messages, turn 0: expected text or {type: text, text}, "
            "found dict {'type': 'image', 'url': 'a'}",
        ),
        (
            "messages",
            {"messages": [{"role": "narrator", "content": "a"}]},
            f"column messages, turn 0: unknown role str 'narrator'; allowed are {NAMES}",
        ),
        (
            "messages",
            {"messages": [{"content": "a"}]},
            f"column messages, turn 0: unknown role nothing; allowed are {NAMES}",
        ),
        (
            "sharegpt",
            {"instruction": "a", "text": "b"},
            f"column conversations: expected a list of turns, found nothing{HAS}",
        ),
        (
            "sharegpt",
            {"conversation": None},
            "column conversation: expected a list of turns, found nothing",
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "a"}, {"from": 1, "value": "b"}]},
            f"column conversations, turn 1: unknown role int 1; allowed are {NAMES}",
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "text": "a"}]},
            "column conversations, turn 0: expected text, found nothing",
        ),
        (
            "harry_potter",
            {"session": "Session-1", "line": None, "question": "a", "answer": None},
            "column answer: expected text, found nothing",
        ),
        (
            "harry_potter",
            {"session": "Session-1", "line": 4, "dialogue": "no colon"},
            "column dialogue: expected 'Speaker: text', found str 'no colon'",
        ),
    ],
)
def test_a_row_that_does_not_fit_is_told_the_column_and_what_was_found(reader, row, complaint):
    with pytest.raises(BadRow, match=f"^{re.escape(complaint)}$"):
        read(reader, row)


def test_what_was_found_is_shown_in_short():
    with pytest.raises(BadRow) as caught:
        read("dolly", {"instruction": list(range(10_000)), "response": "a"})
    assert (
        str(caught.value)
        == "column instruction: expected text, found list [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11..."
    )


@pytest.mark.parametrize(
    "half", ["\ud83d", "\udc4d"]
)  # what cutting a JSON text in the middle of an emoji leaves
def test_half_a_character_is_refused_where_it_stands(half):
    with pytest.raises(
        BadRow, match=r"^column response: half a character, '\\ud...', at position 3$"
    ):
        read("dolly", {"instruction": "a", "response": f"abc{half}"})
    with pytest.raises(
        BadRow, match=r"^column conversations, turn 0: half a character, '\\ud...', at position 0$"
    ):
        read("sharegpt", {"conversations": [{"from": "human", "value": half}]})


SESSIONS = {
    "Session-1": {
        "position": "Book1-chapter1",
        "speakers": ["Harry", "Mira"],
        "scene": "Two invented people have tea.",
        "dialogue": [
            "Harry: Is anyone there?",
            "Mira:  Only me: Mira. ",
            "Harry: Good: tea: at last.",
            "Harry: With milk?",
            "Mira: Yes.",
            "A door slams",
            "Harry: What was that?",
            "Mira: The wind.",
            " Harry : I see.",
            17,
            "Oskar: Hello.",
            "Mira: Hello, Oskar.",
            "Harry:",
        ],
    },
    "Session-2": {"scene": None, "dialogue": ["Mira: Bye.", "Harry: Bye, Mira."]},
}

SCENE = "Describe a scene from the story of Harry Potter."

RECORDS_1 = [
    {
        "session": "Session-1",
        "line": None,
        "question": SCENE,
        "answer": "Two invented people have tea.",
    },
    {
        "session": "Session-1",
        "line": 2,
        "question": "Only me: Mira.",
        "answer": "Good: tea: at last.",
    },
    {"session": "Session-1", "line": 5, "dialogue": "A door slams"},
    {"session": "Session-1", "line": 8, "question": "The wind.", "answer": "I see."},
    {"session": "Session-1", "line": 9, "dialogue": 17},
    {"session": "Session-1", "line": 12, "question": "Hello, Oskar.", "answer": ""},
]
RECORDS_2 = [
    {"session": "Session-2", "line": None, "question": SCENE, "answer": None},
    {"session": "Session-2", "line": 1, "question": "Bye.", "answer": "Bye, Mira."},
]


@pytest.mark.parametrize(
    ("sessions", "expected"),
    [(None, RECORDS_1 + RECORDS_2), (1, RECORDS_1), (2, RECORDS_1 + RECORDS_2)],
)
def test_a_harry_potter_file_gives_the_scene_and_harrys_answers_to_others(
    tmp_path, sessions, expected
):
    file = tmp_path / "en_train_set.json"
    file.write_text(json.dumps(SESSIONS), encoding="utf-8")
    assert (
        load_rows(Source(path=str(file), reader="harry_potter", sessions=sessions)).rows == expected
    )


def test_harry_potter_records_are_read_or_refused_one_by_one():
    outcomes = []
    for row in FILE_READERS["harry_potter"](SESSIONS, None):
        try:
            outcomes.append([message["content"] for message in read("harry_potter", row)])
        except BadRow as error:
            outcomes.append(str(error))
    assert outcomes == [
        [SCENE, "Two invented people have tea."],
        ["Only me: Mira.", "Good: tea: at last."],
        "column dialogue: expected 'Speaker: text', found str 'A door slams'",
        ["The wind.", "I see."],
        "column dialogue: expected 'Speaker: text', found int 17",
        ["Hello, Oskar.", ""],
        "column answer: expected text, found nothing",
        ["Bye.", "Bye, Mira."],
    ]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ([], "expected one JSON object of sessions, found list []"),
        ({"Session-1": []}, "Session-1: expected {scene, dialogue: [...]}, found list []"),
        (
            {"Session-1": {"scene": "a"}},
            "Session-1: expected {scene, dialogue: [...]}, found dict {'scene': 'a'}",
        ),
        (
            {"Session-1": {"scene": "a", "dialogue": "Mira: Hi"}},
            "Session-1: expected {scene, dialogue: [...]}, "
            "found dict {'scene': 'a', 'dialogue': 'Mira: Hi'}",
        ),
    ],
)
def test_a_file_that_is_no_harry_potter_file_is_refused(content, complaint):
    with pytest.raises(BadRow) as caught:
        list(FILE_READERS["harry_potter"](content, None))
    assert str(caught.value) == complaint
