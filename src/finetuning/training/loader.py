"""Batches, loaded by this process or by others that it starts."""

from typing import Any

from torch.utils.data import DataLoader

from finetuning.data.batch_sampler import BatchSampler
from finetuning.training.signals import block_signals


class EpochLoader(DataLoader[Any]):
    """A DataLoader that tells its batch sampler the epoch, as Trainer expects of accelerate's."""

    batch_sampler: BatchSampler

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)

    def __iter__(self) -> Any:
        with block_signals():
            return super().__iter__()
