"""Where the libraries load a base model from."""

from pathlib import Path

from finetuning.hub.address import PREFIX, parse_address
from finetuning.recipe.sections import Model


def location(model: Model) -> str:
    """A Hub id or a folder; for a model published from here, the folder it is pulled to."""
    if model.name is not None and model.name.startswith(PREFIX):
        from finetuning.hub.download import cached_folder

        return str(cached_folder(parse_address(model.name)))
    return str(Path(model.name or "").expanduser())
