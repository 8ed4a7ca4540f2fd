"""Pull a published checkpoint: subfolder of a Hub repository -> local folder, every byte verified.

python src/pull.py elith/llm-book-models chapter05/sft_model
python src/pull.py elith/llm-book-models chapter05/sft_model@chapter05.sft_model.v1
python src/pull.py elith/llm-book-models chapter05/sft_model outputs/pulled

Takes the newest commit, or the branch, tag or commit behind the @. The files go to the cache that the Hugging Face
libraries share; with a third argument to a folder of their own as well. Either is a run folder: src/generate.py asks
it, src/sft.py trains its recipe.yaml again. HF_HUB_OFFLINE=1 takes what an earlier pull left in the cache.
"""

import re
from pathlib import Path

from finetuning.errors import UserError
from finetuning.script import run


def main(arguments: list[str]) -> None:
    from finetuning.hub.address import REPO, shortened
    from finetuning.hub.download import copy, describe, pull
    from finetuning.inference.resolve import read_address

    if not 2 <= len(arguments) <= 3:
        raise UserError(
            f"expected repository and subfolder, and perhaps a folder; found {len(arguments)} arguments"
        )
    repo, subfolder, *target = arguments
    if not re.fullmatch(REPO, repo):
        raise UserError(
            f"{shortened(repo)} is no repository; expected owner/name, such as elith/llm-book-models"
        )
    snapshot = pull(read_address(f"{repo}/{subfolder}"))
    folder = copy(snapshot, Path(target[0]).expanduser()) if target else snapshot.folder
    print(*describe(snapshot), f"folder: {folder}", sep="\n")


if __name__ == "__main__":
    run(main, __doc__, when_interrupted="; the same command goes on where it stopped")
