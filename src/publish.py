"""Publish a run: run folder -> subfolder of one Hub repository.

python src/publish.py outputs/dolly_gpt2 --dry-run
python src/publish.py outputs/dolly_gpt2
python src/publish.py outputs/dolly_gpt2 publish.repo=you/models publish.subfolder=gpt2/dolly
python src/publish.py outputs/dolly_gpt2 publish.gguf=true      # for llama.cpp and Ollama as well

Weights or adapter, tokenizer, recipe, metrics, answers, a model card and a manifest become one
commit, with a tag of its own, and the table in the repository's README.md is kept. Before, the
recipe's questions are asked in every form that is published, after it the commit is pulled anew and
has to be what was asked; published.json in the run folder and the card keep the result.
publish.merged=true publishes a LoRA run as full weights.

--dry-run      shows what would change, and changes nothing
--replace      overwrites what was published from another recipe
--unfinished   publishes a run that is not finished; one that was stopped, as its last checkpoint is
--unasked      does not load what is published to ask it
--verbose      shows what the libraries log and warn of

A token with write access is needed: `hf auth login`, or HF_TOKEN. Publishing again changes only
what is different.
"""

from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from finetuning.command_line import ArgumentParser, require_section
from finetuning.script import run

if TYPE_CHECKING:
    from rich.console import Console

    from finetuning.publishing.bundle import Bundle


def main(arguments: list[str]) -> None:
    from finetuning.publishing.bundle import gathered
    from finetuning.publishing.commit import publish
    from finetuning.publishing.publishable import find_publishable
    from finetuning.publishing.verification import (
        ask_forms,
        check_published,
        print_agreement,
        read_agreements,
        require_agreement,
        write_record,
    )
    from finetuning.recipe.recipe import load_recipe
    from finetuning.runs.terminal import make_console

    options = read_arguments(arguments)
    folder = find_publishable(options.run, options.unfinished)
    recipe = load_recipe(folder / "recipe.yaml", options.overrides)
    console = make_console()
    with gathered(folder, recipe, options.unfinished, writes=not options.dry_run) as bundle:
        bundle = replace(bundle, agreements=read_agreements(folder, bundle))
        show_changes(console, folder, bundle, options)
        if options.dry_run:
            return
        forms = [] if options.unasked else ask_forms(bundle, recipe)
        require_agreement(console, forms, is_exact=bundle.manifest.kind != "merged")
        if forms:
            bundle = replace(bundle, agreements=[form.agreement for form in forms])
        published = publish(bundle, options.replace)
    state = "published" if published.is_new else "unchanged"
    console.print(f"{state}: {published.address}, tag {published.tag}")
    if not options.unasked:
        check_published(bundle, published)
    write_record(folder, bundle, published, forms)
    print_agreement(console, forms)


def show_changes(console: "Console", folder: Path, bundle: "Bundle", options: Namespace) -> None:
    """What is about to be published, to whom; of a dry run each file that would change."""
    from finetuning.hub.allowed_files import unpublished_files
    from finetuning.hub.client import is_private, with_retries
    from finetuning.publishing.bundle import announcement
    from finetuning.publishing.commit import plan_changes
    from finetuning.runs.terminal import print_changes

    repo = bundle.address.repo
    console.print(announcement(bundle, with_retries(lambda: is_private(repo), repo)))
    todo = with_retries(lambda: plan_changes(bundle, options.replace), repo)
    if options.dry_run:
        print_changes(console, todo.changes, unpublished_files(folder))


def read_arguments(arguments: list[str]) -> Namespace:
    parser = ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("overrides", nargs="*", default=[])
    for flag in ("--dry-run", "--replace", "--unfinished", "--unasked"):
        parser.add_argument(flag, action="store_true")
    options = parser.read(arguments)
    require_section(options.overrides, "publish.*")
    return options


if __name__ == "__main__":
    run(main, __doc__, when_interrupted="; the repository is as it was, or has the whole commit")
