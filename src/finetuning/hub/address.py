"""Where a published model lives on the Hub: hub:owner/name/subfolder[@revision]."""

import re
from typing import NamedTuple

PREFIX = "hub:"

# As the Hub takes them: no dots or dashes at the ends, nor two of them in a row.
REPO = r"^[A-Za-z0-9_]+([.-][A-Za-z0-9_]+)*/[A-Za-z0-9_]+([.-][A-Za-z0-9_]+)*$"

# Lower case without dots or spaces: what every file system, tag and URL takes as it stands.
SUBFOLDER = r"^[a-z0-9][a-z0-9_-]*(/[a-z0-9][a-z0-9_-]*)*$"

MAX_NAME_LENGTH = 96  # characters of a repository's name on the Hub; also of our subfolders
MAX_PATH_BYTES = 255  # of a folder that somebody else published, as file systems take them


class Address(NamedTuple):
    """A folder of a model repository, and at which branch, tag or commit."""

    repo: str
    subfolder: str
    revision: str | None = None

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return f"{PREFIX}{self.repo}/{self.subfolder}{at}"

    @property
    def tag_prefix(self) -> str:
        """What this subfolder's tags begin with; a number follows.

        Dots for slashes: git cannot hold the tags `a` and `a/v1` side by side.
        """
        return f"{self.subfolder.replace('/', '.')}.v"


def parse_address(text: str) -> Address:
    """The address that was written down. Raises ValueError with what is expected.

    Takes any folder that others may have published; what we publish is held to SUBFOLDER.
    """
    path, _, revision = text.removeprefix(PREFIX).partition("@")
    owner, _, rest = path.partition("/")
    name, _, subfolder = rest.partition("/")
    repo, place = f"{owner}/{name}", shortened(text)
    if not re.fullmatch(REPO, repo) or len(repo) > MAX_NAME_LENGTH:
        raise ValueError(
            f"{place}: {shortened(repo)} is not a repository; expected {PREFIX}owner/name/folder"
        )
    if not is_folder(subfolder):
        raise ValueError(
            f"{place}: {shortened(subfolder) or 'nothing'} is not a folder of a repository; "
            f"expected names with single slashes between them, at most {MAX_PATH_BYTES} bytes, "
            "such as chapter05/sft_model"
        )
    if "@" in text and not re.fullmatch(r"[\w./-]+", revision):
        raise ValueError(
            f"{place}: {revision or 'nothing'} is not a revision; "
            "expected a branch, tag or commit after @"
        )
    return Address(repo, subfolder, revision or None)


def is_folder(path: str) -> bool:
    """Whether a repository can have a folder of this path."""
    has_names = not {"", ".", ".."} & set(path.split("/"))
    return has_names and "\\" not in path and len(path.encode()) <= MAX_PATH_BYTES


def shortened(text: str) -> str:
    """At most 40 characters of it, for a message."""
    return text if len(text) <= 40 else f"{text[:37]}..."
