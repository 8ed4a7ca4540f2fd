"""Preference tuning beside trl.DPOTrainer: same pairs, model, optimizer and losses.

python benchmarks/dpo.py --data dolly.jsonl --tokenizer gpt2-folder      # GPT-2, all weights, CPU
python benchmarks/dpo.py --model small --method lora ...                 # 4 layers x 256
python benchmarks/dpo.py --reader hh_rlhf --data Anthropic/hh-rlhf ...   # any pairs of data.reader
python benchmarks/dpo.py --device cuda --pairs 400 --repeats 3 ...

How is measured: see side_by_side.py. Measured is all that a run does once its model is there: the
reference, however a mode has it (computed, not read from a cache), and training. A training of a
very small model comes before, so that nothing is left to import. Of dolly's rows pairs are made:
rejected is the response of another row, the next longer one. Speed and memory depend on the lengths
alone, and no mode gains from pairs of two unlike lengths.
"""

import argparse
import copy
import json
import tempfile
from itertools import pairwise
from pathlib import Path

from side_by_side import (
    MODELS,
    Clock,
    adapter_of,
    compare,
    figures,
    new_model,
    parser_of,
    representative,
    settings_of,
)

MODES = {
    "trl": "trl, padded",
    "trl_checkpointed": "trl, gradient_checkpointing (its default)",
    "trl_precomputed": "trl, precompute_ref_log_probs",
    "ours_padded": "ours, padded",
    "ours_packed": "ours, packed",
}
SETTINGS = {
    "trl_checkpointed": {"gradient_checkpointing": True},
    "trl_precomputed": {"precompute_ref_log_probs": True},
}
VERY_SMALL = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 1}
BATCH = 4  # pairs, which are 8 sequences


def main() -> None:
    parser = parser_of(__doc__, MODES)
    parser.add_argument("--reader", help="of data.reader, where --data has pairs")
    parser.add_argument("--pairs", type=int, default=8)
    options = parser.parse_args()
    compare({mode: MODES[mode] for mode in options.modes or MODES}, options, measure)


def measure(options: argparse.Namespace) -> dict:
    """One mode, in this process."""
    pairs = sample(options)
    make_trainer(options, new_model(VERY_SMALL), pairs.select([0])).train()
    model = new_model(MODELS[options.model])
    clock = Clock(options.device)
    clock.start()
    trainer = make_trainer(options, model, pairs)
    trainer.train()
    count = f"{len(pairs)} pairs in batches of {BATCH}"
    return {"examples": count, **figures(trainer, clock, pairs)}


def sample(options: argparse.Namespace):
    """Pairs in batches whose padding and response share are those of the whole."""
    from finetuning.data.cache import cache_folder, prepare
    from finetuning.data.section import Data
    from finetuning.model.tokenizer import read_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        path = options.data if options.reader else write_pairs(options.data, Path(folder))
        data = Data(
            path=str(path),
            reader=options.reader or "preference",
            template="question_answer",
            max_length=options.max_length,
        )
        pairs = prepare(data, read_tokenizer(options.tokenizer), cache_folder()).train
    return representative(pairs, options.pairs, BATCH)


def write_pairs(dolly: str, folder: Path) -> Path:
    """A file of pairs made of dolly's rows."""
    from finetuning.data.section import Source
    from finetuning.data.sources import load_rows

    rows = load_rows(Source(path=dolly, reader="dolly")).rows
    by_length = sorted(rows, key=lambda row: len(row["response"]))
    lines = [
        json.dumps(
            {
                "prompt": "\n".join(filter(None, (row["instruction"], row["context"]))),
                "chosen": row["response"],
                "rejected": longer["response"],
            }
        )
        for row, longer in pairwise(by_length)
        if row["response"] != longer["response"]
    ]
    file = folder / "pairs.jsonl"
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


def make_trainer(options: argparse.Namespace, model, pairs):
    from finetuning.model.tokenizer import read_tokenizer

    tokenizer = read_tokenizer(options.tokenizer)
    if options.worker.startswith("ours"):
        return our_trainer(options, model, pairs, tokenizer)
    return trl_trainer(options, model, pairs, tokenizer)


def trl_trainer(options: argparse.Namespace, model, pairs, tokenizer):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class Tokenized(DPOTrainer):
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

    settings = {**settings_of(options, BATCH), **SETTINGS.get(options.worker, {})}
    args = DPOConfig(**settings, max_length=None)
    lora = adapter_of(options)
    # It would load the model a second time, by a name that this one does not have.
    has_reference = not (lora or args.precompute_ref_log_probs)
    return Tokenized(
        model,
        ref_model=copy.deepcopy(model) if has_reference else None,
        args=args,
        train_dataset=Dataset.from_list(list(map(columns, pairs))),
        processing_class=tokenizer,
        peft_config=lora,
    )


def columns(pair) -> dict[str, list[int]]:
    """The pair as trl's own tokenization has it."""
    from finetuning.data.examples import sequences_of

    chosen, rejected = sequences_of(pair)
    prompt = (chosen["labels"] != -100).argmax()
    return {
        "prompt_ids": chosen["input_ids"][:prompt].tolist(),
        "chosen_ids": chosen["input_ids"][prompt:].tolist(),
        "rejected_ids": rejected["input_ids"][prompt:].tolist(),
    }


def our_trainer(options: argparse.Namespace, model, pairs, tokenizer):
    from peft import get_peft_model
    from transformers import TrainerCallback, set_seed
    from trl import SFTConfig

    from finetuning.data.collator import Collator
    from finetuning.data.example_set import PairSet
    from finetuning.model.loading import fuse_gelu
    from finetuning.model.lora_sum import sum_in_place
    from finetuning.model.packed_models import use_packed_attention
    from finetuning.recipe.sections import PreferenceTraining
    from finetuning.training.preference_trainer import PreferenceTrainer
    from finetuning.training.reference import compute, require_own_reference, used_pairs

    args = SFTConfig(**settings_of(options, BATCH), logging_nan_inf_filter=False)
    layout = options.worker.removeprefix("ours_")
    fuse_gelu(model)
    if layout == "packed":
        use_packed_attention(model)
    if lora := adapter_of(options):
        set_seed(args.seed)  # as trl does: the same adapter
        model = get_peft_model(model, lora)
        sum_in_place(model)
    trainer = PreferenceTrainer(
        preferences=PreferenceTraining(output_dir=str(args.output_dir)),
        model=model,
        args=args,
        train_dataset=PairSet(pairs),
        data_collator=Collator(layout, 0),
        processing_class=tokenizer,
        order="sequential",
    )

    class Start(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            compute(trainer, trainer.train_dataset, used_pairs(trainer))
            require_own_reference(trainer)

    trainer.add_callback(Start())
    return trainer


if __name__ == "__main__":
    main()
