"""A model's output layer, which returns the loss of the response tokens instead of logits."""

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F

from finetuning.errors import UserError
from finetuning.model.last_block import LastBlock
from finetuning.model.logit_change import LogitChange, settings_of_change, unchanged
from finetuning.model.lora import require_modules
from finetuning.model.loss import Scores, response_loss
from finetuning.model.recompute import recompute_cheap_outputs, recomputing
from finetuning.model.tied_weight import TiedWeight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from finetuning.recipe.sections import Lora

CLOSE = 0.05  # the loss of logits that were rounded to half precision, and of those that were not
# Fields of a config by which a model changes its logits in a way that is not known here.
UNKNOWN = ("logits_soft_cap", "output_logit_soft_cap", "lm_head_multiplier", "output_multiplier")


class Targets(NamedTuple):
    """Which positions are scored, and against which token."""

    positions: torch.Tensor
    """(N,) in the flattened (B * T) hidden states, each one before its target"""
    tokens: torch.Tensor
    """(N,)"""
    counts: torch.Tensor | None = None
    """(G,) targets of each group of them, one group after another, whose losses are added up; None:
    all N are one group"""


class ResponseHead:
    """A model's output embeddings, made to score targets instead of returning logits.

    The head is still called as the module it is, inside the model's own forward: what DDP, ZeRO-3
    and FSDP2 hook there (gathering its weight, say) works unchanged. While it scores, the model
    computes and keeps only what these targets need: see last_block.py, recompute.py and
    tied_weight.py.
    """

    def __init__(self, model: "PreTrainedModel") -> None:
        recompute_cheap_outputs(model)
        self.last_block = LastBlock(model)
        self.tied_weight = TiedWeight(model)
        self.change, self.settings = LogitChange.of(model), settings_of_change(model)
        self.head: Any = model.get_output_embeddings()
        self.targets: Targets | None = None
        self.scores: Scores | None = None
        """of the last batch"""
        self.head.forward = types.MethodType(self.forward, self.head)

    @contextmanager
    def scoring(self, targets: Targets) -> Iterator[None]:
        """Within, the model's `logits` are Scores.loss of the targets."""
        self.targets = targets
        try:
            with (
                recomputing(),
                self.last_block.at(targets.positions),
                self.tied_weight.sharing(),
                unchanged(self.settings),
            ):
                yield
        finally:
            self.targets = None

    @torch.no_grad()
    def require_unmodified_logits(
        self, model: "PreTrainedModel", device: torch.device | None = None
    ) -> None:
        """Raises UserError for a model that changes the logits its head returns.

        What it returns is then not the loss, and it would silently train with other gradients than
        those of the loss that is logged. `device` is that of require_isolation.
        """
        tokens = torch.arange(5, 13, device=device or model.device)
        was_training = model.training
        model.train(False)
        try:
            logits = model(input_ids=tokens[None], use_cache=False).logits[0, :-1].float()
            with self.scoring(Targets(torch.arange(7, device=tokens.device), tokens[1:])):
                returned = model(input_ids=tokens[None], use_cache=False).logits
        finally:
            model.train(was_training)
        expected = F.cross_entropy(logits, tokens[1:], reduction="sum")
        if (
            self.scores is None
            or not torch.equal(returned.float(), self.scores.loss.float())
            or not torch.isclose(self.scores.loss.float(), expected, rtol=CLOSE)
        ):
            kind = model.config.model_type
            raise UserError(
                f"model.name: {kind} models scale, cap or cut their logits, which is not supported"
            )

    def forward(self, head: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.targets is None:
            return F.linear(hidden_states, head.weight, head.bias)
        hidden = hidden_states.flatten(0, -2).index_select(0, self.targets.positions)
        if self.change.factor != 1:
            hidden = hidden * self.change.factor
        _, tokens, counts = self.targets
        loss, correct = response_loss(
            hidden,
            head.weight,
            head.bias,
            tokens,
            self.change.cap,
            counts,
            self.tied_weight.of_head,
        )
        # Detached: the graph would live until the next batch, with bitsandbytes' activations in it.
        self.scores = Scores(loss.detach(), correct)
        return loss


def require_plain_head(model: "PreTrainedModel", lora: "Lora | None") -> None:
    """Raises UserError where the loss is more than a product with the head's weight.

    That is with logits changed in an unknown way, with a loss that balances experts, and with an
    adapter on the head; and where the adapter would not be what was requested: see require_modules.
    """
    require_plain_output(model)
    given = lora.model_dump(exclude_unset=True) if lora else {}
    require_no_adapter_on_the_head(model, given)
    require_modules(model, given)


def require_plain_output(model: "PreTrainedModel") -> None:
    config = model.config.get_text_config()
    if getattr(config, "output_router_logits", False):
        raise UserError(
            f"model.name: the config of this {config.model_type} model asks for the loss that "
            "balances its experts (output_router_logits: true), which is not computed here; train "
            "a copy of it whose config.json has output_router_logits: false"
        )
    modified = [name for name in UNKNOWN if getattr(config, name, None) not in (None, 1)]
    head = model.get_output_embeddings()
    if modified or type(head) is not torch.nn.Linear:
        what = modified[0] if modified else type(head).__name__
        raise UserError(
            f"model.name: the output layer of {config.model_type} models ({what}) is not supported"
        )


def require_no_adapter_on_the_head(model: "PreTrainedModel", given: dict[str, Any]) -> None:
    fields = ("target_modules", "modules_to_save", "trainable_token_indices")
    if any("lm_head" in names for field in fields if (names := given.get(field))):
        raise UserError(
            "lora: lm_head cannot be adapted: the loss is computed from its weight; leave it out"
        )
    head: Any = model.get_output_embeddings()
    is_tied = head.weight is model.get_input_embeddings().weight
    if given.get("trainable_token_indices") and is_tied:
        kind = model.config.get_text_config().model_type
        raise UserError(
            f"lora.trainable_token_indices: the {kind} model's output layer has the "
            "weight of its embeddings, and the loss is computed from it; leave it out"
        )
