"""Many questions: read without marks of editors, answered in order, resumed where they ended."""

import json
from pathlib import Path

import pytest

from finetuning.errors import UserError
from finetuning.inference import questions
from finetuning.inference.questions import plain_question, read_questions, write_answers


class Echo:
    """Asks nothing: the answer is the prompt, backwards. Counts what it was asked."""

    def __init__(self, dies_after: int | None = None) -> None:
        self.asked: list[str] = []
        self.dies_after = dies_after

    def prompt(self, messages):
        return messages[-1]["content"]

    def answer_prompts(self, prompts):
        if self.dies_after is not None and len(self.asked) >= self.dies_after:
            raise KeyboardInterrupt
        self.asked += prompts
        return [prompt[::-1] for prompt in prompts]


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(questions, "WINDOW", 4)


ASKED = [plain_question(f"question {n}") for n in range(11)]
WHOLE = [{"prompt": f"question {n}", "answer": f"question {n}"[::-1]} for n in range(11)]


def lines_of(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]


def test_marks_of_editors_are_no_part_of_a_question():
    content = "\ufeffWhat is it?\r\n\r\n  Why?  \n".encode()
    assert [q.row["prompt"] for q in read_questions(content, "q.txt", False)] == [
        "What is it?",
        "Why?",
    ]


def test_json_lines_are_prompts_and_conversations_and_keep_what_else_they_have():
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    content = json.dumps({"prompt": "a\nb", "id": 7}) + "\n" + json.dumps({"messages": turns})
    first, second = read_questions(content.encode(), "q.jsonl", True)
    assert first.row["id"] == 7 and first.messages == [{"role": "user", "content": "a\nb"}]
    assert second.messages == turns


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{", "q.jsonl:2: expected JSON"),
        ("[]", "expected an object"),
        ('{"question": "Hi"}', "column prompt: expected text"),
        ('{"messages": [{"role": "assistant", "content": "Hi"}]}', "nothing to answer"),
    ],
)
def test_a_line_that_asks_nothing_is_named(line, what):
    with pytest.raises(UserError, match=what) as error:
        read_questions(f'{{"prompt": "Hi"}}\n{line}\n'.encode(), "q.jsonl", True)
    assert "q.jsonl:2: " in str(error.value)


def test_a_file_without_a_question_is_refused():
    with pytest.raises(UserError, match="no question"):
        read_questions(b"\xef\xbb\xbf\r\n", "q.txt", False)


@pytest.mark.parametrize("killed_after", [0, 4, 8])
@pytest.mark.parametrize("torn", ["", '{"prompt": "quest'])
def test_answers_to_many_questions_are_resumed_where_they_ended(tmp_path, killed_after, torn):
    file, unfinished = tmp_path / "a.jsonl", tmp_path / "a.jsonl.unfinished"
    with pytest.raises(KeyboardInterrupt):
        write_answers(lambda: Echo(dies_after=killed_after), ASKED, file, {"model": "x"})
    assert not file.exists()
    with unfinished.open("a") as stream:  # a kill in the middle of a line
        stream.write(torn)
    again = Echo()
    assert write_answers(lambda: again, ASKED, file, {"model": "x"}) == killed_after
    assert len(again.asked) == 11 - killed_after
    assert lines_of(file) == WHOLE and not unfinished.exists()


def test_answers_of_another_model_or_to_other_questions_are_not_mixed(tmp_path):
    file = tmp_path / "a.jsonl"
    with pytest.raises(KeyboardInterrupt):
        write_answers(lambda: Echo(dies_after=4), ASKED, file, {"model": "x"})
    for asked, made_with in ((ASKED, {"model": "y"}), (ASKED[::-1], {"model": "x"})):
        with pytest.raises(UserError, match="was begun with another model"):
            write_answers(Echo, asked, file, made_with)


def test_a_file_that_is_there_is_not_written_over(tmp_path):
    (tmp_path / "a.jsonl").write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        write_answers(Echo, ASKED, tmp_path / "a.jsonl", {})
