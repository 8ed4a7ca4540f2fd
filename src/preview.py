"""Look before you train: what a recipe will train on, without loading the model.

python src/preview.py recipes/dolly_gpt2.yaml
python src/preview.py recipes/dolly_gpt2.yaml data.max_length=256

Shows how many rows are kept and why others are not, and some examples with the trained tokens in green. Writes
report.json, token_lengths.png and examples.jsonl to <training.output_dir>/preview/.
"""

import json

from finetuning.errors import run

SHOWN = 3  # examples printed


def main(arguments: list[str]) -> None:
    from rich.console import Console

    from finetuning.cache import cache_folder, prepare
    from finetuning.data import training_texts
    from finetuning.model import load_tokenizer
    from finetuning.origin import with_pulled_base
    from finetuning.reach import needs_of, require_hub
    from finetuning.recipe import load_recipe
    from finetuning.report import examples_in_order, plot_lengths, print_example, print_funnel
    from finetuning.run_folder import make_folder, output_folder, write_text

    recipe = load_recipe(arguments[0], arguments[1:])
    require_hub(needs_of(recipe))
    recipe = with_pulled_base(recipe)
    tokenizer = load_tokenizer(recipe.model, training_texts(recipe.data))
    prepared = prepare(recipe.data, tokenizer, cache_folder())
    folder = make_folder(output_folder(recipe) / "preview")
    examples = examples_in_order(prepared.train, prepared.eval)

    console = Console()
    print_funnel(console, prepared.report)
    console.rule("examples: prompt grey, response green")
    for _, _, example in examples[:SHOWN]:
        print_example(console, example, tokenizer)

    write_text(folder / "report.json", json.dumps(prepared.report, indent=2, ensure_ascii=False) + "\n")
    plot_lengths([len(example["input_ids"]) for _, _, example in examples], recipe.data.max_length, folder)
    with (folder / "examples.jsonl").open("w", encoding="utf-8") as stream:
        for split, row, example in examples:
            tokens = {name: values.tolist() for name, values in example.items()}
            stream.write(json.dumps({"split": split, "row": row, **tokens}) + "\n")
    console.print(f"written to {folder}: report.json, token_lengths.png, examples.jsonl")


if __name__ == "__main__":
    run(main, __doc__)
