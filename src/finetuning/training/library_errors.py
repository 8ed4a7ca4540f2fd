"""What a library raises at a setting, as what is wrong with a section of the recipe."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from finetuning.errors import UserError, one_line

# How peft says that it does without a setting.
IGNORES = "(?s).*(did not match any|no parameter was matched|will be ignored)"


@contextmanager
def trying(section: str) -> Iterator[None]:
    """Whatever a library raises at settings, of any type, is what is wrong with the section.

    So is a warning that it ignores one of them; other warnings come again when it is trained.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", message=IGNORES)
            yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{section}: {one_line(error) or type(error).__name__}") from None
