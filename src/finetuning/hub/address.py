"""Where a published checkpoint lives on the Hub: hub:owner/name/subfolder[@revision]."""

import re
from typing import NamedTuple

PREFIX = "hub:"


# As the Hub takes them: no dots or dashes at the ends, nor two of them in a row.
REPO = r"^[A-Za-z0-9_]+([.-][A-Za-z0-9_]+)*/[A-Za-z0-9_]+([.-][A-Za-z0-9_]+)*$"


# Lower case without dots or spaces: what every file system, tag and URL takes as it stands.
SUBFOLDER = r"^[a-z0-9][a-z0-9_-]*(/[a-z0-9][a-z0-9_-]*)*$"


LONGEST = 96  # characters of a repository's name on the Hub; we hold subfolders to it too


LONGEST_PATH = 255  # characters of a folder that somebody else published, as file systems take them


class Address(NamedTuple):
    """A folder of a model repository, and at which branch, tag or commit."""

    repo: str
    subfolder: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{PREFIX}{self.repo}/{self.subfolder}" + (
            f"@{self.revision}" if self.revision else ""
        )

    @property
    def tag_prefix(self) -> str:
        """What this subfolder's tags begin with; a number follows.

        Dots for slashes: git has no room for the tags `a` and `a/v1` side by side.
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
    if not re.fullmatch(REPO, repo) or len(repo) > LONGEST:
        raise ValueError(
            f"{place}: {shortened(repo)} is no repository; expected {PREFIX}owner/name/folder"
        )
    parts = subfolder.split("/")
    if (
        any(part in ("", ".", "..") for part in parts)
        or "\\" in subfolder
        or len(subfolder.encode()) > LONGEST_PATH
    ):
        raise ValueError(
            f"{place}: {shortened(subfolder) or 'nothing'} is no folder of a repository; expected names with single "
            f"slashes between them, at most {LONGEST_PATH} bytes, such as chapter05/sft_model"
        )
    if "@" in text and not re.fullmatch(r"[\w./-]+", revision):
        raise ValueError(
            f"{place}: {revision or 'nothing'} is no revision; expected a branch, tag or commit after @"
        )
    return Address(repo, subfolder, revision or None)


def shortened(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}..."
