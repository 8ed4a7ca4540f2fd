"""Training speed and memory beside trl and transformers: same rows, model, optimizer and losses.

python benchmarks/train.py --data dolly.jsonl --tokenizer gpt2-folder    # GPT-2, all weights, CPU
python benchmarks/train.py --model small --method full ...               # 4 layers x 256
python benchmarks/train.py --model bloom --method lora ...               # vocabulary 250,880
python benchmarks/train.py --device cuda --rows 800 --warmup 10 --repeats 3 ...
python benchmarks/train.py --device cuda --rows 800 --warmup 10 --model llama \\
  --attention kernels-community/flash-attn2 ...                          # Liger's kernels too

How is measured: see side_by_side.py. On a GPU, after a training of some steps on the same rows,
thrown away, in which kernels are compiled. The sample of rows is drawn so that its padding and its
share of response tokens are those of the whole data set.
"""

import argparse
import gc

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
    "trl_padded": "trl, padded (the book's)",
    "trl_padding_free": "trl, padding_free",
    "trl_packing": "trl, packing bfd",
    "trl_liger": "trl, padded, use_liger_kernel",
    "trainer": "transformers Trainer, padded, all logits",
    "ours_padded": "ours, padded",
    "ours_packed": "ours, packed",
}
# trl's settings of a mode. It packs into rows of 512 tokens, which hold about 3 examples.
SETTINGS = {
    "trl_padding_free": {"padding_free": True, "max_length": None},
    "trl_packing": {"packing": True, "max_length": 512, "per_device_train_batch_size": 3},
}
AS_THEY_ARE = {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None}
BATCH = 8


def main() -> None:
    options = parse()
    modes = options.modes or [mode for mode in MODES if is_fair(mode, options)]
    compare({mode: MODES[mode] for mode in modes}, options, measure)


def is_fair(mode: str, options: argparse.Namespace) -> bool:
    """Whether model and device have what the mode is about.

    trl packs BLOOM's examples so that they see each other; Liger's kernels are Triton's.
    """
    if mode == "trl_liger":
        return options.device == "cuda" and options.model == "llama"
    return options.model != "bloom" or mode != "trl_packing"


def parse() -> argparse.Namespace:
    parser = parser_of(__doc__, MODES)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--warmup", type=int, default=0, help="steps of a training before")
    parser.add_argument("--attention", help="of trl's modes without padding, instead of SDPA")
    return parser.parse_args()


def measure(options: argparse.Namespace) -> dict:
    """One mode, in this process."""
    import numpy as np
    from transformers import TrainerCallback

    examples = sample(options)
    if options.warmup:
        some = examples.select(np.arange(options.warmup * BATCH) % len(examples))
        make_trainer(options, model_of(options), some, []).train()
        gc.collect()
    clock = Clock(options.device)

    class Start(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            clock.start()

    trainer = make_trainer(options, model_of(options), examples, [Start()])
    trainer.train()
    rows = f"{len(examples)} rows in batches of {BATCH}"
    return {"examples": rows, **figures(trainer, clock, examples)}


def model_of(options: argparse.Namespace):
    has_kernel = options.attention and options.worker in SETTINGS
    attention = {"attn_implementation": options.attention} if has_kernel else {}
    return new_model(MODELS[options.model], **attention)


def sample(options: argparse.Namespace):
    """Rows of dolly, in batches whose padding and response share are those of the whole."""
    from finetuning.data.cache import cache_folder, prepare
    from finetuning.data.section import Data
    from finetuning.model.tokenizer import read_tokenizer

    length = options.max_length if options.model != "bloom" else min(256, options.max_length)
    # Longer rows are cut, as trl does.
    data = Data(
        path=options.data,
        reader="dolly",
        template="question_answer",
        max_length=length,
        overflow="cut",
    )
    examples = prepare(data, read_tokenizer(options.tokenizer), cache_folder()).train
    return representative(examples, options.rows, BATCH)


def make_trainer(options: argparse.Namespace, model, examples, callbacks):
    if options.worker == "trainer":
        return plain_trainer(options, model, examples, callbacks)
    if options.worker.startswith("ours"):
        return our_trainer(options, model, examples, callbacks)
    return trl_trainer(options, model, examples, callbacks)


def plain_trainer(options: argparse.Namespace, model, examples, callbacks):
    from transformers import Trainer, TrainingArguments

    return Trainer(
        with_adapter(options, model),
        TrainingArguments(**settings_of(options, BATCH)),
        data_collator=plain_collator,
        train_dataset=as_dataset(examples),
        callbacks=callbacks,
    )


def trl_trainer(options: argparse.Namespace, model, examples, callbacks):
    from trl import SFTConfig, SFTTrainer

    from finetuning.model.tokenizer import read_tokenizer

    mode, dataset = options.worker, as_dataset(examples)
    special = dict(SETTINGS.get(mode, AS_THEY_ARE))
    if mode == "trl_liger":
        special["use_liger_kernel"] = True
    settings = {**settings_of(options, BATCH), **special, "logging_nan_inf_filter": True}
    return SFTTrainer(
        model,
        SFTConfig(**settings),
        processing_class=read_tokenizer(options.tokenizer),
        train_dataset=dataset.with_format(None) if mode == "trl_packing" else dataset,
        peft_config=adapter_of(options),
        callbacks=callbacks,
    )


def our_trainer(options: argparse.Namespace, model, examples, callbacks):
    from trl import SFTConfig

    from finetuning.data.collator import Collator
    from finetuning.data.example_set import ExampleSet
    from finetuning.model.loading import disable_cudnn_attention, fuse_gelu
    from finetuning.model.lora_sum import sum_in_place
    from finetuning.model.packed_models import use_packed_attention
    from finetuning.model.tokenizer import read_tokenizer
    from finetuning.training.trainer import ResponseTrainer

    layout = options.worker.removeprefix("ours_")
    disable_cudnn_attention()
    fuse_gelu(model)
    if layout == "packed":
        use_packed_attention(model)
    special = SETTINGS.get(options.worker, AS_THEY_ARE)
    settings = {**settings_of(options, BATCH), **special, "logging_nan_inf_filter": False}
    adapted = with_adapter(options, model)
    sum_in_place(adapted)
    return ResponseTrainer(
        model=adapted,
        args=SFTConfig(**settings),
        processing_class=read_tokenizer(options.tokenizer),
        train_dataset=ExampleSet(examples),
        data_collator=Collator(layout, 0),
        order="sequential",
        callbacks=callbacks,
    )


def with_adapter(options: argparse.Namespace, model):
    from peft import get_peft_model
    from transformers import TrainingArguments, set_seed

    set_seed(TrainingArguments.seed)  # as trl does: the same adapter
    lora = adapter_of(options)
    return get_peft_model(model, lora) if lora else model


def as_dataset(examples):
    """The examples as a datasets.Dataset (trl takes no other), without copying their tokens."""
    import pyarrow
    from datasets import Dataset

    offsets = pyarrow.array([0, *examples.ends.tolist()], pyarrow.int64())
    columns = {
        name: pyarrow.LargeListArray.from_arrays(offsets, pyarrow.array(getattr(examples, name)))
        for name in ("input_ids", "labels")
    }
    return Dataset(pyarrow.table(columns)).with_format("numpy")


def plain_collator(examples):
    """Padded input_ids, labels and attention_mask, as any tutorial has them."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids, labels = (
        [torch.as_tensor(example[name]).long() for example in examples]
        for name in ("input_ids", "labels")
    )
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
    }


if __name__ == "__main__":
    main()
