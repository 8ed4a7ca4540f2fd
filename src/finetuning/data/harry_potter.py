"""Harry-Potter-Dialogue-Dataset: one JSON file of sessions -> rows."""

from collections.abc import Iterator
from typing import Any

from finetuning.data.row import BadRow, Message, Row, brief, message, text

SCENE_QUESTION = "Describe a scene from the story of Harry Potter."  # the prompt of every scene


def read_session_record(row: Row) -> list[Message]:
    """{question, answer} of a Harry-Potter-Dialogue-Dataset session: Harry's replies, the scene."""
    if "dialogue" in row:
        raise BadRow(f"column dialogue: expected 'Speaker: text', found {brief(row['dialogue'])}")
    return [message("user", text(row, "question")), message("assistant", text(row, "answer"))]


def harry_potter_rows(content: Any, sessions: int | None) -> Iterator[Row]:
    """Rows of a Harry-Potter-Dialogue-Dataset file: one object {Session-N: {scene, dialogue, ...}}.

    Per session one row for the scene, then one for each of Harry's lines that replies to another
    speaker. A line without a colon becomes a row {session, line, dialogue}, which the reader
    refuses, so that it is counted. Raises BadRow for a file of another form.
    """
    if not isinstance(content, dict):
        raise BadRow(f"expected one JSON object of sessions, found {brief(content)}")
    for name, session in list(content.items())[:sessions]:
        if not isinstance(session, dict) or not isinstance(session.get("dialogue"), list):
            raise BadRow(f"{name}: expected {{scene, dialogue: [...]}}, found {brief(session)}")
        yield {
            "session": name,
            "line": None,
            "question": SCENE_QUESTION,
            "answer": session.get("scene"),
        }
        yield from replies_of_harry(name, session["dialogue"])


def replies_of_harry(session: str, dialogue: list[Any]) -> Iterator[Row]:
    previous: tuple[str, str] | None = None  # (speaker, speech) of the line before
    for number, line in enumerate(dialogue):
        speaker, colon, speech = line.partition(":") if isinstance(line, str) else ("", "", "")
        if not colon:
            yield {"session": session, "line": number, "dialogue": line}
            previous = None
            continue
        speaker, speech = speaker.strip(), speech.strip()
        if speaker == "Harry" and previous and previous[0] != "Harry":
            yield {"session": session, "line": number, "question": previous[1], "answer": speech}
        previous = (speaker, speech)
