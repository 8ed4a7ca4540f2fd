"""Many questions from a file or standard input, and their answers, in the same order."""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm import tqdm

from finetuning.data.readers import read_messages
from finetuning.data.row import BadRow, Message, message, text
from finetuning.errors import UserError
from finetuning.files import write_text

if TYPE_CHECKING:
    from finetuning.inference.generation import Asker

WINDOW = 128  # questions whose answers are written together; their batches are of similar length
FILES = (".txt", ".jsonl")


class Question(NamedTuple):
    row: dict[str, Any]
    """as it is written out again, beside the answer"""
    messages: list[Message]


def plain_question(text: str) -> Question:
    return Question({"prompt": text}, [message("user", text)])


def read_questions(content: bytes, name: str, is_json: bool) -> list[Question]:
    """A question a line; with is_json a JSON object, {"prompt": ...} or {"messages": [...]}.

    A byte order mark, carriage returns and empty lines are not part of them. Raises UserError with
    file and line.
    """
    try:
        lines = content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise UserError(f"{name}: is not UTF-8 text") from None
    questions = []
    for number, line in enumerate(lines, start=1):
        if text := line.strip("\r").strip():
            place = f"{name}:{number}"
            questions.append(json_question(text, place) if is_json else plain_question(text))
    if not questions:
        raise UserError(f"{name}: there is no question in it")
    return questions


def json_question(line: str, place: str) -> Question:
    try:
        row = json.loads(line)
        if not isinstance(row, dict):
            raise BadRow("expected an object")
        if "messages" not in row:
            return Question(row, [message("user", text(row, "prompt"))])
        messages = read_messages(row)
        if messages[-1]["role"] == "assistant":
            raise BadRow("the last turn is the assistant's, there is nothing to answer")
        return Question(row, messages)
    except (ValueError, BadRow) as error:
        expected = '{"prompt": ...} or {"messages": [...]}'
        raise UserError(f"{place}: expected JSON, {expected}: {error}") from None


def answer_in_order(asker: "Asker", questions: list[Question], done: int = 0) -> Iterator[str]:
    """The answers from number `done` on, as soon as those of a WINDOW are there, with a bar.

    Raises UserError, before anything is answered, for a question that is too long for the model.
    """
    prompts = [asker.prompt(question.messages) for question in questions]
    with tqdm(
        total=len(questions), initial=done, desc="answers", disable=None, leave=False, delay=1
    ) as bar:
        for start in range(done, len(prompts), WINDOW):
            answers = asker.answer_prompts(prompts[start : start + WINDOW])
            bar.update(len(answers))
            yield from answers


def as_json(question: Question, answer: str) -> str:
    return json.dumps({**question.row, "answer": answer}, ensure_ascii=False) + "\n"


def write_answers(
    load: Callable[[], "Asker"], questions: list[Question], file: Path, made_with: dict[str, Any]
) -> int:
    """A JSON object a line, in order; the same call resumes where a killed one ended.

    Until all are there they stand in `<file>.unfinished`, below a line that says what they are made
    with. Returns how many were answered before. Raises UserError where the file is there, or was
    begun with something else.
    """
    if file.exists():
        raise UserError(f"{file} is there already; delete it, or choose another file")
    if not file.parent.is_dir():
        raise UserError(f"{file.parent}: no such folder")
    unfinished = file.with_name(f"{file.name}.unfinished")
    head = json.dumps({**made_with, "questions": digest_of(questions)}, default=str) + "\n"
    lines = begun_answers(unfinished, head)
    done = len(lines) - 1
    write_text(unfinished, "".join(lines))
    with unfinished.open("a", encoding="utf-8") as stream:
        answers = answer_in_order(load(), questions, done)
        for question, answer in zip(questions[done:], answers, strict=True):
            lines.append(as_json(question, answer))
            stream.write(lines[-1])
            stream.flush()
    write_text(file, "".join(lines[1:]))
    unfinished.unlink()
    return done


def begun_answers(unfinished: Path, head: str) -> list[str]:
    """The head, and the lines of whole windows that a killed call left below it."""
    if not unfinished.exists():
        return [head]
    whole = [f"{line}\n" for line in unfinished.read_text(encoding="utf-8").split("\n")[:-1]]
    if whole and whole[0] != head:
        raise UserError(
            f"{unfinished} was begun with another model, other settings or other questions; "
            "delete it, or choose another file"
        )
    answered = max(0, len(whole) - 1)
    return [head, *whole[1 : 1 + answered - answered % WINDOW]]


def digest_of(questions: list[Question]) -> str:
    rows = json.dumps([question.row for question in questions], sort_keys=True)
    return hashlib.sha256(rows.encode()).hexdigest()
