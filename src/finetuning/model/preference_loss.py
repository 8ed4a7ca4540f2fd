"""Log-probabilities of pairs of responses, under the model and its reference -> losses of DPO.

The formulas are those of trl.DPOTrainer (1.16), by the same names, and a test compares them:
https://huggingface.co/docs/trl/dpo_trainer names the paper of each. Here are those that need
nothing but these sums, pair by pair, so that a loss does not depend on how a step is divided.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

from finetuning.recipe.sections import PreferenceTraining

MAX_EXPONENT = 80.0  # beyond, exp is infinite in float32


@dataclass(frozen=True)
class ScoredPairs:
    """P pairs of responses. Log-probabilities are sums over the tokens of a response."""

    log_probs: torch.Tensor
    """(P, 4) chosen, within the length of the shorter response and behind it, and rejected"""
    reference: torch.Tensor
    """(P, 4) the same of the reference"""
    tokens: torch.Tensor
    """(P, 4) how many tokens they are of"""
    settings: PreferenceTraining

    @cached_property
    def chosen(self) -> torch.Tensor:
        """(P,) log-probability."""
        return self.weighted(self.log_probs[:, :2])

    @cached_property
    def rejected(self) -> torch.Tensor:
        """(P,) log-probability."""
        return self.weighted(self.log_probs[:, 2:])

    @cached_property
    def chosen_ratio(self) -> torch.Tensor:
        """(P,) by how much more probable than under the reference, as a logarithm."""
        return self.chosen - self.weighted(self.reference[:, :2])

    @cached_property
    def rejected_ratio(self) -> torch.Tensor:
        return self.rejected - self.weighted(self.reference[:, 2:])

    def weighted(self, parts: torch.Tensor) -> torch.Tensor:
        """(P, 2) -> (P,): both parts; with ld_alpha, less of what is behind the shorter length."""
        alpha = 1.0 if self.settings.ld_alpha is None else self.settings.ld_alpha
        return parts[:, 0] + alpha * parts[:, 1]

    @property
    def chosen_score(self) -> torch.Tensor:
        return divergence(self.chosen_ratio, self.settings)

    @property
    def rejected_score(self) -> torch.Tensor:
        return divergence(self.rejected_ratio, self.settings)

    @cached_property
    def margin(self) -> torch.Tensor:
        """(P,) by how much the chosen response is scored higher, times beta."""
        return self.settings.beta * (self.chosen_score - self.rejected_score)

    @property
    def mean_margin(self) -> torch.Tensor:
        """(P,) the same of scores for a token, without beta."""
        tokens = self.tokens.reshape(-1, 2, 2).sum(2)
        return self.chosen_score / tokens[:, 0] - self.rejected_score / tokens[:, 1]

    @property
    def rewards(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(P,) of the chosen and of the rejected responses."""
        beta = self.settings.beta
        return beta * self.chosen_ratio.detach(), beta * self.rejected_ratio.detach()


def divergence(ratio: torch.Tensor, settings: PreferenceTraining) -> torch.Tensor:
    """The score of a response whose log-probability exceeds the reference's by `ratio`."""
    power = settings.f_alpha_divergence_coef - 1
    if settings.f_divergence_type == "forward_kl":
        return 1 - torch.exp(-ratio)
    if settings.f_divergence_type == "js_divergence":
        return math.log(2) + F.logsigmoid(ratio)
    if settings.f_divergence_type == "alpha_divergence" and abs(power) >= 1e-6:
        return (torch.exp((power * ratio).clamp(max=MAX_EXPONENT)) - 1) / power
    return ratio


def sigmoid(pairs: ScoredPairs) -> torch.Tensor:
    return -F.logsigmoid(pairs.margin)


def hinge(pairs: ScoredPairs) -> torch.Tensor:
    return torch.relu(1 - pairs.margin)


def ipo(pairs: ScoredPairs) -> torch.Tensor:
    return (pairs.mean_margin - 1 / (2 * pairs.settings.beta)) ** 2


def exo_pair(pairs: ScoredPairs) -> torch.Tensor:
    epsilon, margin = pairs.settings.label_smoothing, pairs.margin
    right = torch.sigmoid(margin) * (F.logsigmoid(margin) - math.log1p(-epsilon))
    return right + torch.sigmoid(-margin) * (F.logsigmoid(-margin) - math.log(epsilon))


def nca_pair(pairs: ScoredPairs) -> torch.Tensor:
    chosen, rejected = (
        pairs.settings.beta * ratio for ratio in (pairs.chosen_ratio, pairs.rejected_ratio)
    )
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def robust(pairs: ScoredPairs) -> torch.Tensor:
    wrong = pairs.settings.label_smoothing
    right = (1 - wrong) * F.logsigmoid(pairs.margin)
    return (wrong * F.logsigmoid(-pairs.margin) - right) / (1 - 2 * wrong)


def bco_pair(pairs: ScoredPairs) -> torch.Tensor:
    beta = pairs.settings.beta
    return -F.logsigmoid(beta * pairs.chosen_ratio) - F.logsigmoid(-beta * pairs.rejected_ratio)


def sppo_hard(pairs: ScoredPairs) -> torch.Tensor:
    half = 0.5 / pairs.settings.beta
    return (pairs.chosen_ratio - half) ** 2 + (pairs.rejected_ratio + half) ** 2


def apo_zero(pairs: ScoredPairs) -> torch.Tensor:
    beta = pairs.settings.beta
    return 1 - torch.sigmoid(beta * pairs.chosen_ratio) + torch.sigmoid(beta * pairs.rejected_ratio)


def apo_down(pairs: ScoredPairs) -> torch.Tensor:
    beta, difference = pairs.settings.beta, pairs.chosen_ratio - pairs.rejected_ratio
    return torch.sigmoid(beta * pairs.chosen_ratio) + 1 - torch.sigmoid(beta * difference)


def discopop(pairs: ScoredPairs) -> torch.Tensor:
    share = torch.sigmoid(pairs.margin / pairs.settings.discopop_tau)
    return -F.logsigmoid(pairs.margin) * (1 - share) + torch.exp(-pairs.margin) * share


def sigmoid_norm(pairs: ScoredPairs) -> torch.Tensor:
    return -F.logsigmoid(pairs.settings.beta * pairs.mean_margin)


LOSSES: dict[str, Callable[[ScoredPairs], torch.Tensor]] = {
    "sigmoid": sigmoid,
    "hinge": hinge,
    "ipo": ipo,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "robust": robust,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
    "sigmoid_norm": sigmoid_norm,
}
"""of each pair (P,); `sft`, of each token, is in summed_losses"""


def summed_losses(pairs: ScoredPairs) -> tuple[torch.Tensor, torch.Tensor]:
    """The weighted losses, () summed over the pairs and () over the tokens of chosen responses.

    Divided by how many pairs and how many such tokens a step has, their sum is its loss.
    """
    settings = pairs.settings
    weights = settings.loss_weights or [1.0] * len(settings.loss_types)
    of_pairs = of_tokens = pairs.log_probs.new_zeros(())
    for kind, weight in zip(settings.loss_types, weights, strict=True):
        if kind == "sft":
            of_tokens = of_tokens - weight * pairs.log_probs[:, :2].sum()
        else:
            of_pairs = of_pairs + weight * LOSSES[kind](pairs).sum()
    return of_pairs, of_tokens
