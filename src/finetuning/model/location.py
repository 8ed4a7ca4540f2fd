"""Where the libraries load a base model from."""

from pathlib import Path

from finetuning.hub.address import PREFIX, parse_address
from finetuning.recipe.sections import Model


def location(model: Model) -> str:
    """What the libraries load it from: a Hub id or a folder; a checkpoint that was published from here is pulled."""
    if model.name.startswith(PREFIX):
        from finetuning.hub.download import cached_folder

        return str(cached_folder(parse_address(model.name)))
    return str(Path(model.name).expanduser())
