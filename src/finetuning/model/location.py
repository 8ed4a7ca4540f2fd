"""Where the libraries load a base model from."""

from pathlib import Path

from finetuning.hub.address import PREFIX, parse_address
from finetuning.recipe.sections import Model


def location(model: Model) -> str:
    """A Hub id or a folder; for a model published from here, the folder it is pulled to."""
    return located(model.name or "")


def adapter_folder(model: Model) -> Path | None:
    """The folder of the adapter that training begins with, if there is one."""
    return Path(located(model.adapter)) if model.adapter else None


def located(name: str) -> str:
    if name.startswith(PREFIX):
        from finetuning.hub.offline import cached_folder

        return str(cached_folder(parse_address(name)))
    return str(Path(name).expanduser())
