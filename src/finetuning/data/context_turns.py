"""Material of a question, in templates that have no place for it."""

from collections.abc import Sequence

from finetuning.data.row import Message, message

BELOW = "\n\n"  # between a question and its material


def fold_context(messages: Sequence[Message]) -> list[Message]:
    """The same conversation with material put below the question it belongs to.

    Material that follows no question becomes a user turn of its own.
    """
    folded: list[Message] = []
    for turn in messages:
        if turn["role"] != "context":
            folded.append(turn)
        elif folded and folded[-1]["role"] == "user":
            question = folded.pop()["content"]
            folded.append(message("user", f"{question}{BELOW}{turn['content']}"))
        else:
            folded.append(message("user", turn["content"]))
    return folded
