"""Rewards of pairs beside loss and speed, since the last log."""

from typing import TYPE_CHECKING, Any

import torch

from finetuning.model.preference_loss import ScoredPairs
from finetuning.model.throughput import Throughput

if TYPE_CHECKING:
    from accelerate import Accelerator

# What is added up: loss_of_pairs and loss_of_tokens of summed_losses; the others of each pair, but
# for chosen_tokens by trl's names.
SUMS = ("pairs", "chosen_tokens", "loss_of_pairs", "loss_of_tokens")
MEANS = (
    *("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"),
    *("logps/chosen", "logps/rejected"),
)


class PreferenceThroughput(Throughput):
    """Throughput that adds up the figures of pairs, too."""

    def reset(self) -> None:
        super().reset()
        self.margins: list[torch.Tensor] = []
        """of each pair, (pairs of a micro-batch,)"""
        self.sums = torch.zeros(len(SUMS) + len(MEANS), dtype=self.loss.dtype, device=self.device)

    def count_pairs(
        self, pairs: ScoredPairs, of_pairs: torch.Tensor, of_tokens: torch.Tensor
    ) -> None:
        chosen, rejected = pairs.rewards
        self.margins.append(chosen - rejected)
        figures = [
            torch.ones_like(chosen),
            pairs.tokens[:, :2].sum(1),
            chosen,
            rejected,
            chosen > rejected,
            chosen - rejected,
            pairs.chosen.detach(),
            pairs.rejected.detach(),
        ]
        sums = torch.stack([each.to(self.sums.dtype).sum() for each in figures])
        losses = torch.stack([of_pairs.detach(), of_tokens.detach()]).to(self.sums.dtype)
        self.sums += torch.cat([sums[:2], losses, sums[2:]])

    def state(self) -> dict[str, Any]:
        return {**super().state(), "sums": self.sums.tolist()}

    def restore(self, states: list[dict[str, Any]]) -> None:
        super().restore(states)
        for state in states:
            self.sums += torch.tensor(state["sums"], dtype=self.sums.dtype, device=self.device)

    def evaluation(self, accelerator: "Accelerator") -> dict[str, float]:
        """Loss of a pair, and the means of their rewards and log-probabilities."""
        sums: list[float] = accelerator.reduce(self.sums.clone()).tolist()
        pairs, chosen_tokens, of_pairs, of_tokens = sums[: len(SUMS)]
        loss = of_pairs / max(1.0, pairs) + of_tokens / max(1.0, chosen_tokens)
        means = [each / max(1.0, pairs) for each in sums[len(SUMS) :]]
        return {"loss": loss, **dict(zip(MEANS, means, strict=True))}

    def since_last_log(self, accelerator: "Accelerator") -> dict[str, float]:
        """Without the loss, which the trainer logs, and without the accuracy of tokens, which half
        of them are meant to lose.
        """
        rewards = self.evaluation(accelerator)
        figures = super().since_last_log(accelerator)
        left_out = ("loss", "mean_token_accuracy")
        return {k: v for k, v in {**rewards, **figures}.items() if k not in left_out}
