"""Publish a run: run folder -> subfolder of one Hub repository.

python src/publish.py outputs/dolly_gpt2 --dry-run
python src/publish.py outputs/dolly_gpt2
python src/publish.py outputs/dolly_gpt2 publish.repo=you/models publish.subfolder=chapter05/sft_model

Weights or adapter, tokenizer, recipe, metrics, answers, a model card and a manifest become one commit, with a tag of
its own, and the table in the repository's README.md is kept. The commit is then pulled anew and asked the recipe's
questions; published.json in the run folder keeps the result. publish.merged=true publishes a LoRA run as full weights.

--dry-run      shows what would change, and changes nothing
--replace      overwrites what was published from another recipe
--unfinished   publishes a run that did not come to its end
--unasked      does not load the published model to ask it

A token with write access is needed: `hf auth login`, or HF_TOKEN. Publishing again changes only what is different.
"""

from finetuning.errors import UserError
from finetuning.script import run

FLAGS = ("--dry-run", "--replace", "--unfinished", "--unasked")


def main(arguments: list[str]) -> None:
    from rich.console import Console

    from finetuning.hub.allowed_files import unpublished_files
    from finetuning.hub.client import patiently, require_access
    from finetuning.publishing.bundle import address_of, gather_publication, require_publishable
    from finetuning.publishing.commit import plan, publish
    from finetuning.publishing.merging import merged_if_wanted
    from finetuning.recipe.recipe import load_recipe
    from finetuning.runs.folder import find_run_folder, lock
    from finetuning.runs.terminal import print_changes

    flags, (name, *overrides) = read_arguments(arguments)
    folder = find_run_folder(name)
    recipe = load_recipe(folder / "recipe.yaml", overrides)
    address, console = (
        address_of(recipe),
        Console(highlight=False, soft_wrap=True, markup=False, emoji=False),
    )
    require_publishable(folder, recipe, unfinished="--unfinished" in flags)
    require_access(address.repo, write="--dry-run" not in flags)
    with lock(folder), merged_if_wanted(folder, recipe) as weights:
        publication = gather_publication(folder, recipe, weights)
        if "--dry-run" in flags:
            todo = patiently(lambda: plan(publication, "--replace" in flags), address.repo)
            return print_changes(console, todo.changes, unpublished_files(folder))
        published = publish(publication, "--replace" in flags)
    console.print(
        f"{'published' if published.is_new else 'unchanged'}: {published.address}, tag {published.tag}"
    )

    from finetuning.publishing.verification import compare, require_agreement, write_record

    answers = [] if "--unasked" in flags else compare(folder, recipe, published)
    write_record(folder, published, answers)
    require_agreement(console, answers, is_exact=not weights)


def read_arguments(arguments: list[str]) -> tuple[set[str], list[str]]:
    """(flags, run folder and overrides). Raises UserError for anything else."""
    flags = {argument for argument in arguments if argument.startswith("--")}
    others = [argument for argument in arguments if argument not in flags]
    if unknown := sorted(flags - set(FLAGS)):
        raise UserError(f"unknown flag {unknown[0]}; allowed are {', '.join(FLAGS)}")
    if not others:
        raise UserError(
            "which run folder? For example: src/publish.py outputs/dolly_gpt2 --dry-run"
        )
    if other := [override for override in others[1:] if not override.startswith("publish.")]:
        raise UserError(
            f"{other[0]} comes too late, the run is trained; only publish.* can be overridden here"
        )
    return flags, others


if __name__ == "__main__":
    run(main, __doc__, when_interrupted="; the repository is as it was, or has the whole commit")
