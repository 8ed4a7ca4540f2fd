"""ResponseTrainer on pairs of responses: the losses of DPO instead of cross-entropy."""

from typing import Any

import torch
from accelerate.utils import gather_object

from finetuning.data.collator import Batch
from finetuning.data.example_set import PairSet
from finetuning.evaluation.intervals import mean_of
from finetuning.model.dropout import disable_dropout
from finetuning.model.packing import Packing, packed_as
from finetuning.model.preference_loss import ScoredPairs, summed_losses
from finetuning.model.preference_throughput import PreferenceThroughput
from finetuning.recipe.sections import PreferenceTraining
from finetuning.training.trainer import ResponseTrainer


class PreferenceTrainer(ResponseTrainer):
    """Trains on which of two responses is preferred.

    Not trl.DPOTrainer: it pads every pair to the longest of its batch, computes logits of prompts
    too, and holds or switches to a second model in every step. Here the reference is known before
    the first step, see reference.py.
    """

    throughput: PreferenceThroughput
    train_dataset: PairSet
    eval_dataset: PairSet | None

    def __init__(self, *, preferences: PreferenceTraining, **kwargs: Any) -> None:
        self.preferences = preferences
        if preferences.disable_dropout:
            disable_dropout(kwargs["model"])
        super().__init__(**kwargs)

    def new_throughput(self) -> PreferenceThroughput:
        return PreferenceThroughput(self.model, self.args.device)

    def items_of(self, batches: list[Batch]) -> torch.Tensor:
        """(2,) pairs, and trained tokens of chosen responses; a dummy pair has none."""
        counts = torch.cat([batch["counts"].reshape(-1, 4) for batch in batches])
        chosen = counts[:, :2].sum(1)
        return torch.stack([(chosen > 0).sum(), chosen.sum()])

    def compute_loss(
        self,
        model: Any,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> torch.Tensor:
        """() losses of the pairs; in training, a mean over those of the step on all processes."""
        log_probs = -self.scored(model, inputs).reshape(-1, 4)
        loss: torch.Tensor
        if not len(inputs["targets"]):  # a dummy pair, whose log-probabilities are 0
            loss = log_probs.sum()
            return loss
        counts = inputs["counts"].reshape(-1, 4)
        pairs = ScoredPairs(log_probs, inputs["reference"], counts, self.preferences)
        of_pairs, of_tokens = summed_losses(pairs)
        self.throughput.count_pairs(pairs, of_pairs, of_tokens)
        if num_items_in_batch is None:
            loss = of_pairs / len(counts) + of_tokens / counts[:, :2].sum()
            return loss
        # DDP and ZeRO average gradients over processes, each of which has only its own pairs.
        items = num_items_in_batch / self.accelerator.num_processes
        loss = of_pairs / items[0] + of_tokens / items[1]
        return loss

    def evaluation(self) -> dict[str, float]:
        """With the 95 % intervals of reward accuracy and margin, over the pairs."""
        own = [margin for each in self.throughput.margins for margin in each.tolist()]
        margins = gather_object(own)
        values = {
            "rewards/accuracies": [margin > 0 for margin in margins],
            "rewards/margins": margins,
        }
        found = super().evaluation()
        for name, of_pairs in values.items():
            interval = mean_of(of_pairs)
            found |= {f"{name}_low": interval.low, f"{name}_high": interval.high}
        return found

    @torch.no_grad()
    def log_probs(self, batch: Batch) -> torch.Tensor:
        """(pairs, 4) of the batch's responses, as ScoredPairs has them; counted nowhere."""
        inputs = self._prepare_inputs(batch)
        with packed_as(Packing.of(inputs)), self.compute_loss_context_manager():
            losses = self.scored(self.model_wrapped, inputs)
        self.throughput.reset()
        return -losses.reshape(-1, 4)
