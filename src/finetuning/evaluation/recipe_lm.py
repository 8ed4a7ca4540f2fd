"""A trained model as lm-eval asks models, with the prompt it was trained on.

    context        the conversation as JSON: what lm-eval calls the text of a chat template
    loglikelihood  of the ids that training has for the response, its end token left out
    generate_until ends at the trained end tokens; what the task says of `until`, length and
                   sampling holds too

Imports lm-eval: only for those who ask for its tasks.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm

from finetuning.data.row import BadRow, Message, message
from finetuning.data.tokenization import tokenize
from finetuning.errors import UserError
from finetuning.evaluation.asking import Share
from finetuning.inference.generation import Asker, batches_by_length, cut_at_end
from finetuning.recipe.sections import Generation

ALONE = Share()
Results = dict[str, Any]
"""{kind/number of a request: what the model said}"""


@dataclass(frozen=True)
class Request:
    """One thing that a model is asked, as token ids."""

    ids: list[int]
    start: int = 0
    """from where on the ids are scored"""
    until: tuple[str, ...] = ()
    """texts that end a generated response"""
    generation: Generation = field(default_factory=Generation)


class RecipeLM(LM):  # type: ignore[misc]  # lm-eval has no types
    """The model of an Asker. Every process answers its share, and has all answers."""

    def __init__(
        self,
        asker: Asker,
        share: Share = ALONE,
        known: Mapping[str, Any] = {},
        keep: Callable[[Results], None] = lambda results: None,
    ) -> None:
        super().__init__()
        self.asker, self.share, self.known, self.keep = asker, share, known, keep

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Rendered when the response is known: both are tokenized as in training."""
        return json.dumps(chat_history, ensure_ascii=False)

    @property
    def tokenizer_name(self) -> str:
        """A part of the name of a cache of lm-eval's, which is not used."""
        return ""

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether it is what greedy search gives) of each response."""
        asked = [self.scored(*request.args) for request in requests]
        return [(nats, greedy) for nats, greedy in self.answer("scored", asked, self.score)]

    def generate_until(self, requests: list[Any]) -> list[str]:
        asked = [self.question(*request.args) for request in requests]
        return self.answer("generated", asked, self.generate)

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        raise AssertionError("benchmarks.py refuses such tasks")

    def scored(self, context: str, response: str) -> Request:
        messages, prefix = read_context(context)
        # What separates it from the question in a plain text is the template's here.
        ids, start = self.encode(messages, prefix + response if prefix else response.lstrip())
        if prefix:
            start = len(self.encode(messages, prefix)[0])
        return Request(ids, max(1, start))

    def question(self, context: str, settings: dict[str, Any]) -> Request:
        messages, prefix = read_context(context)
        ids = self.encode(messages, prefix)[0] if prefix else self.asker.prompt(messages)
        found = normalize_gen_kwargs(settings)
        until, generation = tuple(found.pop("until")), {"max_new_tokens": found.pop("max_gen_toks")}
        if not found["do_sample"]:
            found = {"do_sample": False}
        generation |= {name: value for name, value in found.items() if value is not None}
        return Request(ids, until=until, generation=Generation(**generation))

    def encode(self, messages: list[Message], response: str) -> tuple[list[int], int]:
        """(ids of the conversation up to the end of the response, where the response starts).

        Raises UserError where the template or the model has no place for it.
        """
        prompt = self.asker.prompt(messages)
        try:
            segments = self.asker.template.render([*messages, message("assistant", response)])
        except BadRow as error:
            raise UserError(str(error)) from None
        (example,) = tokenize([segments], self.asker.tokenizer)
        after = cut_at_end(example["input_ids"].tolist()[len(prompt) :], self.asker.ends())
        if len(prompt) + len(after) > (positions := self.asker.positions()):
            raise UserError(
                f"a question and its answer have {len(prompt) + len(after)} tokens, "
                f"the model reads at most {positions}"
            )
        lead = self.asker.lead
        has_lead = bool(lead) and after[: len(lead)] == lead
        return [*prompt, *after], len(prompt) + len(lead) * has_lead

    def answer(
        self, kind: str, asked: list[Request], act: Callable[[list[Request]], list[Any]]
    ) -> list[Any]:
        """In batches of similar length; each is answered once, in whichever launch."""
        names = [f"{kind}/{number}" for number in range(len(asked))]
        found: Results = {name: self.known[name] for name in names if name in self.known}
        batches = [b for b in batches_of(asked) if any(names[n] not in found for n in b)]
        with tqdm(desc=kind, total=len(asked), disable=None, leave=False, delay=1) as bar:
            bar.update(len(asked) - sum(map(len, batches)))
            for batch in self.share.rounds(batches):
                with self.asker.generating():
                    said = act([asked[number] for number in batch]) if batch else []
                mine = {names[n]: value for n, value in zip(batch, said, strict=True)}
                together = self.share.together(mine)
                found |= together
                bar.update(len(together))
                if self.share.process == 0:
                    self.keep(together)
        return [found[name] for name in names]

    def score(self, batch: list[Request]) -> list[Any]:
        """[log-likelihood, is greedy] of each, in one forward of B rows padded on the right."""
        longest = max(len(each.ids) for each in batch)
        first = min(each.start for each in batch) - 1  # the logits before it are not looked at
        padding = [longest - len(each.ids) for each in batch]
        model: Any = self.asker.model
        kept = {"logits_to_keep": longest - first} if model._supports_logits_to_keep() else {}
        rows = [each.ids + [0] * n for each, n in zip(batch, padding, strict=True)]
        mask = [[1] * len(each.ids) + [0] * n for each, n in zip(batch, padding, strict=True)]
        logits = model(
            input_ids=torch.tensor(rows, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            use_cache=False,
            **kept,
        ).logits[:, first - longest :]
        return [
            log_likelihood(row[each.start - 1 - first :], each.ids[each.start :])
            for row, each in zip(logits, batch, strict=True)
        ]

    def generate(self, batch: list[Request]) -> list[Any]:
        asker = replace(self.asker, generation=batch[0].generation)
        responses = asker.respond([each.ids for each in batch])
        return [
            postprocess_generated_text(asker.text(ids), list(each.until), None)
            for ids, each in zip(responses, batch, strict=True)
        ]


def read_context(context: str) -> tuple[list[Message], str]:
    """(the conversation, what its next response begins with); see apply_chat_template."""
    messages = [message(turn["role"], turn["content"]) for turn in json.loads(context)]
    begun = messages.pop()["content"] if messages[-1]["role"] == "assistant" else ""
    return messages, begun


def batches_of(asked: Sequence[Request]) -> list[list[int]]:
    """The numbers of the requests in batches of one kind of generation and of similar length."""
    kinds: dict[str, list[int]] = {}
    for number, each in enumerate(asked):
        kinds.setdefault(each.generation.model_dump_json(), []).append(number)
    return [
        [numbers[n] for n in batch]
        for numbers in kinds.values()
        for batch in batches_by_length([asked[n].ids for n in numbers])
    ]


def log_likelihood(logits: torch.Tensor, tokens: list[int]) -> list[Any]:
    """[nats, is greedy] of N tokens, from (>= N, V) logits: those in front of each."""
    log_probabilities = logits[: len(tokens)].float().log_softmax(-1)
    targets = torch.tensor(tokens, dtype=torch.long, device=logits.device)
    chosen = log_probabilities.gather(-1, targets[:, None])
    is_greedy = (log_probabilities.argmax(-1) == targets).all()
    return [float(chosen.sum()), bool(is_greedy)]
