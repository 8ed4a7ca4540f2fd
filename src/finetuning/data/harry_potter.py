"""Harry-Potter-Dialogue-Dataset: one JSON file of sessions -> rows."""

from collections.abc import Iterator
from typing import Any

from finetuning.data.row import BadRow, Message, Row, brief, message, text

# The one question under which a scene of the Harry-Potter-Dialogue-Dataset is learnt.
SCENE_QUESTION = "Describe a scene from the story of Harry Potter."


def read_session_record(row: Row) -> list[Message]:
    """{question, answer}, made of a session of Harry-Potter-Dialogue-Dataset: Harry's replies, and the scene."""
    if "dialogue" in row:
        raise BadRow(f"column dialogue: expected 'Speaker: text', found {brief(row['dialogue'])}")
    return [message("user", text(row, "question")), message("assistant", text(row, "answer"))]


def harry_potter_rows(content: Any, sessions: int | None) -> Iterator[Row]:
    """Records of a Harry-Potter-Dialogue-Dataset file, which is one JSON object {Session-N: {scene, dialogue, ...}}.

    Per session one record for the scene, then one for every line of Harry's that answers another speaker's. A line
    without a colon becomes a row of its own, {session, line, dialogue}, which the reader does not accept.
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
        yield from answers_of_harry(name, session["dialogue"])


def answers_of_harry(session: str, dialogue: list[Any]) -> Iterator[Row]:
    before = None  # (speaker, words) of the line before
    for number, line in enumerate(dialogue):
        speaker, colon, words = line.partition(":") if isinstance(line, str) else ("", "", "")
        if not colon:
            yield {"session": session, "line": number, "dialogue": line}
            before = None
            continue
        speaker, words = speaker.strip(), words.strip()
        if speaker == "Harry" and before and before[0] != "Harry":
            yield {"session": session, "line": number, "question": before[1], "answer": words}
        before = (speaker, words)
