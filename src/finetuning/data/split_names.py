"""Names of splits, as keys of a file and as words of a path."""

import re

# As a word of a path in lower case: `validation`, but not `latest` or `devices`.
SPLIT_NAME = re.compile(
    r"(?<![a-z])(?:(?:train|test|dev|val)(?:ing|set)?|valid[a-z]*|eval[a-z]*)(?![a-z])"
)


def is_split_name(text: str) -> bool:
    return bool(SPLIT_NAME.fullmatch(text.lower()))


def names_split(path: str, split: str | None = None) -> bool:
    """Whether a path has the name of this split, or of any, as a word."""
    if split is None:
        return bool(SPLIT_NAME.search(path.lower()))
    return bool(re.search(rf"(?<![a-z]){re.escape(split.lower())}(?![a-z])", path.lower()))
