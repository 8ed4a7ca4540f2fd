"""What preference tuning compares with: log-probabilities of the model as it is before training.

They are computed once, of the pairs that the run will use, by all its processes, and kept in the
run folder. So no second model is in memory and none is asked in a step; and the reference is what
training starts from, whatever that is: full weights, a base model under a new adapter, or an
adapter that is trained on. They are cached beside prepared rows, too: another run on the same
weights and pairs, with another beta, reads them there.
"""

import io
import os
import zipfile
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from numpy.typing import NDArray
from tqdm import tqdm

from finetuning.data.batch_sampler import BatchSampler
from finetuning.data.cache import cache_folder, make_private
from finetuning.data.dummies import dummy_of
from finetuning.data.example_set import PairSet
from finetuning.errors import UserError
from finetuning.files import write_bytes
from finetuning.runs.folder import REFERENCE
from finetuning.training.preference_trainer import PreferenceTrainer
from finetuning.training.prepared_run import PreparedRun
from finetuning.training.reference_key import reference_key

# By how much a log-probability may differ when the same model computes it in another batch: for
# each token, and at least; in float32 and in half precision. The sum over a response of another
# model differs by more than that for each of its first tokens.
ROUNDING = {False: (2e-4, 1e-3), True: (2e-2, 1e-1)}

Numbers = NDArray[np.int64]
Arrays = dict[str, NDArray[np.float32]]


def find_reference(trainer: PreferenceTrainer, run: PreparedRun) -> None:
    """Fills in what the pairs of training and evaluation compare with: computed before the first
    step or cached by an earlier run, and read from the run folder by a run that is resumed.

    Raises UserError where that file is gone or the model is not its own reference, Stopped where a
    signal asked for it.
    """
    if trainer.state.global_step:
        read_reference(trainer)
        return
    used = used_pairs(trainer)
    cached = cache_folder() / f"{reference_key(trainer, run, used)}.{REFERENCE}"
    if not fill_from(cached, trainer):
        compute(trainer, trainer.train_dataset, used)
        if trainer.eval_dataset is not None:
            compute(trainer, trainer.eval_dataset, np.arange(len(trainer.eval_dataset)))
        keep(cached, trainer)
    require_own_reference(trainer)
    if trainer.is_world_process_zero():
        write_bytes(trainer.run_folder / REFERENCE, content_of(trainer))
    trainer.accelerator.wait_for_everyone()


def used_pairs(trainer: PreferenceTrainer) -> Numbers:
    """The numbers of the training pairs that any process sees until training.max_steps."""
    sampler = trainer.get_train_dataloader().batch_sampler
    micro_batches = trainer.state.max_steps * trainer.args.gradient_accumulation_steps
    if micro_batches >= len(sampler):
        return np.arange(len(trainer.train_dataset))
    parts = [part for parts in islice(sampler.micro_batches(), micro_batches) for part in parts]
    return np.unique(np.concatenate(parts))


def compute(trainer: PreferenceTrainer, pairs: PairSet, numbers: Numbers) -> None:
    """The reference of these pairs, the longest first; in every process that of all of them."""
    numbers = numbers[np.argsort(-pairs.examples.lengths[numbers], kind="stable")]
    sampler = BatchSampler(
        pairs.examples.lengths[numbers],
        batch_size=trainer.args.per_device_eval_batch_size,
        processes=trainer.args.world_size,
        process=trainer.args.process_index,
    )
    found = torch.zeros(len(numbers), 4, device=trainer.args.device)
    was_training = trainer.model_wrapped.training
    trainer.model_wrapped.eval()
    hidden = True if not trainer.is_world_process_zero() else None  # None: without a terminal
    for part in tqdm(sampler, "reference", disable=hidden, leave=False, delay=1):
        is_dummy = part[0] < 0
        at = [dummy_of(number) if is_dummy else number for number in part]
        examples = [pairs[dummy_of(n) if is_dummy else n] for n in numbers[at].tolist()]
        log_probs = trainer.log_probs(trainer.data_collator(examples))
        if not is_dummy:
            found[at] = log_probs.float()
        # Whoever asks a run to stop does not wait for the end of a long pass.
        trainer.callback_handler.on_prediction_step(trainer.args, trainer.state, trainer.control)
    trainer.model_wrapped.train(was_training)
    everything: Any = trainer.accelerator.reduce(found)
    pairs.reference[numbers] = everything.cpu().numpy()


def require_own_reference(trainer: PreferenceTrainer) -> None:
    """Raises UserError, in every process, unless the model as it is trained gives the first pairs
    the log-probabilities of the reference: rewards of 0, and a loss of log 2 with loss_type
    sigmoid.
    """
    sampler = trainer.get_train_dataloader().batch_sampler
    numbers = next(iter(sampler))
    batch = trainer.data_collator([trainer.train_dataset[number] for number in numbers])
    was_training = trainer.model_wrapped.training
    trainer.model_wrapped.train(trainer.preferences.disable_dropout)
    log_probs = trainer.log_probs(batch).cpu()
    trainer.model_wrapped.train(was_training)
    tokens = batch["counts"].reshape(-1, 4)
    by_token, least = ROUNDING[bool(trainer.args.bf16 or trainer.args.fp16)]
    is_dummy = not len(batch["targets"])
    wrong = ~((log_probs - batch["reference"]).abs() <= least + by_token * tokens)
    found: Any = torch.tensor(0 if is_dummy else int(wrong.any(1).sum()))
    if count := int(trainer.accelerator.reduce(found.to(trainer.args.device))):
        largest = float((log_probs - batch["reference"]).abs().max())
        raise UserError(
            f"the model is not its own reference before the first step: in {count} of the first "
            f"pairs a response's log-probability differs, by {largest:.3g} in those of this "
            "process, so that rewards would not begin at 0; something of it changes from call to "
            "call, such as dropout or noise that training.disable_dropout does not reach"
        )


def parts_of(trainer: PreferenceTrainer) -> dict[str, PairSet]:
    parts = {"train": trainer.train_dataset, "eval": trainer.eval_dataset}
    return {name: pairs for name, pairs in parts.items() if pairs is not None}


def content_of(trainer: PreferenceTrainer) -> bytes:
    """The reference as an .npz file."""
    arrays: dict[str, Any] = {name: pairs.reference for name, pairs in parts_of(trainer).items()}
    content = io.BytesIO()
    np.savez(content, **arrays)
    return content.getvalue()


def read_arrays(file: Path) -> Arrays | None:
    """What content_of has made; None where the file is missing or damaged."""
    try:
        with np.load(file) as found:
            return {name: found[name] for name in found.files}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def fill_from(cached: Path, trainer: PreferenceTrainer) -> bool:
    """Whether an earlier run has left the reference there; the first process reads it for all."""
    found: list[Arrays | None] = [None]
    if trainer.is_world_process_zero() and is_own(cached):
        found = [read_arrays(cached)]
    broadcast_object_list(found)  # in place
    if found[0] is None:
        return False
    for name, pairs in parts_of(trainer).items():
        pairs.reference[:] = found[0][name]
    return True


def is_own(file: Path) -> bool:
    """Whether it is there, and was not put there by another user."""
    return file.is_file() and file.stat().st_uid == os.getuid()


def keep(cached: Path, trainer: PreferenceTrainer) -> None:
    """For other runs; with a read-only home, say, there is none."""
    if not trainer.is_world_process_zero():
        return
    try:
        make_private(cached.parent)
        write_bytes(cached, content_of(trainer))
    except OSError as error:
        tqdm.write(f"the reference is not cached: {cached.parent}: {error.strerror}")


def read_reference(trainer: PreferenceTrainer) -> None:
    """Of a run that is resumed: its model has learnt since, and cannot be asked any more."""
    file = trainer.run_folder / REFERENCE
    found = read_arrays(file)
    if found is None or not parts_of(trainer).keys() <= found.keys():
        raise lost(file, "is missing or damaged")
    for name, pairs in parts_of(trainer).items():
        fill(pairs, found[name], file)
    if np.isnan(trainer.train_dataset.reference[used_pairs(trainer)]).any():
        raise lost(file, "has only the pairs of the steps that were asked for when it began")


def fill(pairs: PairSet, reference: NDArray[np.float32], file: Path) -> None:
    if reference.shape != pairs.reference.shape:
        raise lost(file, "is of other pairs")
    pairs.reference[:] = reference


def lost(file: Path, what: str) -> UserError:
    return UserError(
        f"{file} {what}, and a model that was trained since cannot make it again; begin anew in "
        "another folder: training.output_dir=..."
    )
