"""Conversations -> answers, generated from exactly the prompt that was trained on."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from finetuning.data.row import BadRow, Message, Tool, message
from finetuning.data.templates import Template
from finetuning.data.tokenization import encode_prompts
from finetuning.errors import UserError, one_line
from finetuning.inference.streaming import WordStreamer
from finetuning.recipe.sections import Generation

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

BATCH = 8  # questions asked at once
# Fields of transformers.GenerationConfig that are refused, when it is saved, without do_sample.
SAMPLING = {
    *("temperature", "top_k", "top_p", "min_p", "top_h"),
    *("typical_p", "epsilon_cutoff", "eta_cutoff"),
}

Conversation = Sequence[Message]


@dataclass(frozen=True)
class Asker:
    """A model that is asked with the prompt it was trained on."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerFast"
    template: Template
    generation: Generation

    def __call__(self, questions: Sequence[str]) -> list[str]:
        """The answer to each question, asked alone."""
        return self.answer([[message("user", question)] for question in questions])

    def answer(self, conversations: Sequence[Conversation]) -> list[str]:
        """The next response of each conversation, without end mark.

        Raises UserError for one that the template has no place for, or the model cannot read.
        """
        return self.answer_prompts([self.prompt(each) for each in conversations])

    def prompt(self, conversation: Conversation, tools: Sequence[Tool] = ()) -> list[int]:
        """The token ids that the next response is generated from. Raises UserError; see answer."""
        try:
            segments = self.template.render_prompt(conversation, tools)
        except BadRow as error:
            raise UserError(str(error)) from None
        ids = encode_prompts([segments], self.tokenizer)[0]
        if len(ids) >= (positions := self.positions()):
            raise UserError(
                f"a question has {len(ids)} tokens with its template and what was said before it, "
                f"the model reads at most {positions}"
            )
        return ids

    def positions(self) -> int:
        """How many tokens the model reads, prompt and response together."""
        positions: int | None = getattr(self.model.config, "max_position_embeddings", None)
        return positions or sys.maxsize

    def answer_prompts(self, prompts: Sequence[list[int]]) -> list[str]:
        """The answers in order; computed in batches of prompts of similar length."""
        answers = [""] * len(prompts)
        with self.generating():
            for batch in batches_by_length(prompts):
                responses = self.respond([prompts[number] for number in batch])
                for number, response in zip(batch, responses, strict=True):
                    answers[number] = self.text(response)
        return answers

    def stream(self, conversation: Conversation, show: Callable[[str], None]) -> str:
        """The answer, of which each new piece is shown as soon as its words are whole."""
        prompt = self.prompt(conversation)
        if (self.generation.model_dump().get("num_beams") or 1) > 1:
            show(answer := self.answer_prompts([prompt])[0])  # it is chosen at the end
            return answer
        streamer = WordStreamer(self.text, show)
        with self.generating():
            self.respond([prompt], streamer)
        return streamer.shown

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Leaves the model's mode and the random numbers of training as they were."""
        was_training = self.model.training
        self.model.eval()
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        try:
            # Not inference_mode: weights that ZeRO-3 gathers in it could not be trained on later.
            with torch.random.fork_rng(devices), torch.no_grad():
                torch.manual_seed(self.generation.seed)
                yield
        finally:
            self.model.train(was_training)

    def respond(self, prompts: list[list[int]], streamer: Any = None) -> list[list[int]]:
        """The token ids of each response, for B prompts padded on the left to T tokens.

        So every response starts at the same column.
        """
        from transformers import GenerationConfig

        longest = max(map(len, prompts))
        settings = generation_settings(self.generation, self.template, self.tokenizer)
        room = self.positions() - longest
        settings["max_new_tokens"] = min(self.generation.max_new_tokens, room)
        fill = settings["pad_token_id"]
        padding = [longest - len(prompt) for prompt in prompts]
        input_ids = [[fill] * n + prompt for n, prompt in zip(padding, prompts, strict=True)]
        is_prompt = [[0] * n + [1] * (longest - n) for n in padding]
        model: Any = self.model
        device = model.device
        try:
            output = model.generate(
                input_ids=torch.tensor(input_ids, device=device),
                attention_mask=torch.tensor(is_prompt, device=device),
                generation_config=GenerationConfig(**settings),
                streamer=streamer,
            )
        except ValueError as error:  # what transformers finds wrong with the settings
            raise UserError(f"generation: {one_line(error)}") from None
        responses: list[list[int]] = output[:, longest:].tolist()
        return responses

    def ends(self) -> list[int]:
        """The tokens that end a response."""
        return end_ids(self.template, self.tokenizer)

    def text(self, response: list[int]) -> str:
        """The assistant's content in a generated response."""
        content = cut_at_end(response, self.ends())
        if content[: len(self.lead)] == self.lead:
            content = content[len(self.lead) :]
        text = str(self.tokenizer.decode(content, skip_special_tokens=True))
        return self.template.strip_markers(text)

    @cached_property
    def lead(self) -> list[int]:
        """What the template puts between the prompt and the content of a response."""
        prompt = self.template.render_prompt([message("user", "a")])
        segments = [prompt, [*prompt, *self.template.response_lead]]
        before, with_lead = encode_prompts(segments, self.tokenizer)
        return with_lead[len(before) :]


def end_ids(template: Template, tokenizer: "PreTrainedTokenizerFast") -> list[int]:
    """The tokens that end a response."""
    ends: Any = tokenizer.convert_tokens_to_ids(template.end_marks)
    return list(ends)


def generation_settings(
    generation: Generation, template: Template, tokenizer: "PreTrainedTokenizerFast"
) -> dict[str, Any]:
    """The fields of transformers.GenerationConfig that the recipe and its template decide."""
    ends = end_ids(template, tokenizer)
    fill = tokenizer.pad_token_id
    return {
        "eos_token_id": ends,
        "pad_token_id": ends[0] if fill is None else fill,
        "use_cache": True,
        "max_new_tokens": generation.max_new_tokens,
        **generation.model_dump(exclude_unset=True, exclude={"prompts", "seed"}),
    }


def saved_generation_config(asker: Asker) -> "GenerationConfig":
    """What is saved with the weights, so that `model.generate(**inputs)` answers as `asker` does.

    As in generate(), what the recipe leaves open is the base model's. Nothing but greedy search is
    written out too: pipelines sample where do_sample is open.
    """
    from transformers import GenerationConfig

    base = asker.model.generation_config.to_diff_dict()
    ours = generation_settings(asker.generation, asker.template, asker.tokenizer)
    settings = {"do_sample": False, **base, **ours}
    unused = {"transformers_version", "max_length", "output_attentions", "output_hidden_states"}
    if not settings["do_sample"]:
        unused |= SAMPLING
    unused |= {name for name in settings if name.startswith("_")}
    return GenerationConfig(**{k: v for k, v in settings.items() if k not in unused})


def batches_by_length(prompts: Sequence[list[int]]) -> list[list[int]]:
    """The numbers of the prompts in batches of similar length, each in the order of the prompts."""
    by_length = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    starts = range(0, len(by_length), BATCH)
    return [sorted(by_length[start : start + BATCH]) for start in starts]


def cut_at_end(ids: list[int], ends: list[int]) -> list[int]:
    """The tokens before the first end mark."""
    return next((ids[:position] for position, token in enumerate(ids) if token in ends), ids)
