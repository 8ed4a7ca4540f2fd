"""One HTML file that loads nothing: a Jinja template in the frame of html_page.html.

Every value is escaped and without control characters, and a policy lets no script run but the
frame's own, so that no row, name or answer can put markup into a page. `t(english, japanese)`
writes a text in both languages; the reader's browser shows one, a button the other.
"""

import base64
import functools
import hashlib
import re
from pathlib import Path
from typing import Any

from jinja2 import ChainableUndefined, Environment, FileSystemLoader
from markupsafe import Markup, escape

from finetuning.untrusted_text import printable

FRAME = Path(__file__).with_name("html_page.html")


def render(template: Path, **values: Any) -> str:
    """The page of a template that extends html_page.html."""
    page = environment(template.parent).get_template(template.name).render(**values)
    return page.replace("SCRIPT-HASH", hash_of_script(), 1)


@functools.cache
def environment(folder: Path) -> Environment:
    """What finds and compiles the templates of a folder: a run writes its page at every save."""
    made = Environment(
        loader=FileSystemLoader([folder, FRAME.parent]),
        autoescape=True,
        finalize=shown,
        undefined=ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals["t"] = both_languages
    return made


def shown(value: Any) -> Any:
    """Text that is not markup of ours, without control characters."""
    return printable(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def both_languages(english: str, japanese: str) -> Markup:
    return Markup('<span lang="en">{}</span><span lang="ja">{}</span>').format(english, japanese)


def text(value: str) -> Markup:
    """Escaped, for markup that is put together in Python."""
    return escape(printable(value))


def hash_of_script() -> str:
    """As a Content-Security-Policy names the one script that may run."""
    (script,) = re.findall(r"<script>(.*?)</script>", FRAME.read_text("utf-8"), re.DOTALL)
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
