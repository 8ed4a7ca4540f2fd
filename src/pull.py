"""Pull a published model: subfolder of a Hub repository -> local folder, every byte verified.

python src/pull.py elith/llm-book-models chapter05/sft_model
python src/pull.py elith/llm-book-models chapter05/sft_model@chapter05.sft_model.v1
python src/pull.py elith/llm-book-models chapter05/sft_model outputs/pulled
python src/pull.py hub:elith/llm-book-models/chapter05/sft_model outputs/pulled

Takes the newest commit, or the branch, tag or commit behind the @. The files go to the cache that
the Hugging Face libraries share; with a folder behind the address to that one as well. Either is
a run folder: src/generate.py asks it, src/sft.py trains its recipe.yaml again. HF_HUB_OFFLINE=1
takes what an earlier pull left in the cache.
"""

import re
from argparse import Namespace
from pathlib import Path

from finetuning.command_line import ArgumentParser
from finetuning.errors import UserError
from finetuning.script import run
from finetuning.untrusted_text import printable


def main(arguments: list[str]) -> None:
    from finetuning.hub.address import PREFIX, REPO, shortened
    from finetuning.hub.download import pull
    from finetuning.hub.snapshot import copy_snapshot, describe_snapshot
    from finetuning.inference.resolve import read_address

    options = read_arguments(arguments)
    if not options.address.startswith(PREFIX) and not re.fullmatch(REPO, options.repo):
        raise UserError(
            f"{shortened(options.repo)} is not a repository; "
            "expected owner/name, such as elith/llm-book-models"
        )
    snapshot = pull(read_address(options.address))
    folder = snapshot.folder
    if options.folder:
        folder = copy_snapshot(snapshot, Path(options.folder).expanduser())
    print(*describe_snapshot(snapshot), printable(f"folder: {folder}"), sep="\n")


def read_arguments(arguments: list[str]) -> Namespace:
    """The address, in one word with its prefix or in two without, and perhaps a folder."""
    parser = ArgumentParser()
    parser.add_argument("repo")
    is_one = bool(arguments) and arguments[0].startswith("hub:")
    if not is_one:
        parser.add_argument("subfolder")
    parser.add_argument("folder", nargs="?")
    options = parser.read(arguments)
    options.address = options.repo if is_one else f"{options.repo}/{options.subfolder}"
    return options


if __name__ == "__main__":
    run(main, __doc__, when_interrupted="; the same command resumes where it stopped")
