"""Values as source text of Jinja."""

import json


def literal(text: str) -> str:
    """The text as a Jinja string."""
    return json.dumps(text, ensure_ascii=False)
