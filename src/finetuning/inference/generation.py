"""Questions -> answers, asked with the very prompt that was trained on."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from finetuning.data.chat_template import ChatTemplate
from finetuning.data.prepare import load_template
from finetuning.data.templates import MarkerTemplate
from finetuning.data.tokenization import encode_prompts
from finetuning.errors import UserError, one_line
from finetuning.inference.resolve import pin_base_model
from finetuning.model.loading import load_model
from finetuning.model.tokenizer import read_tokenizer
from finetuning.recipe.recipe import Recipe
from finetuning.recipe.sections import Generation, Model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


BATCH = 8  # questions asked at once


def load_asker(folder: Path, recipe: Recipe) -> Callable[[list[str]], list[str]]:
    """A function from questions to answers, with the model of a run folder. Uses a GPU if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = read_tokenizer(str(folder))
    model = load_trained(folder, recipe, tokenizer, device)
    model.to(device)
    template = load_template(recipe.data, tokenizer)
    return lambda questions: ask(model, tokenizer, template, recipe.generation, questions)


def load_trained(
    folder: Path, recipe: Recipe, tokenizer: "PreTrainedTokenizerFast", device: str = "cpu"
) -> "PreTrainedModel":
    """The run folder's weights, or its adapter on the base model they were trained on, quantised if the recipe is."""
    if not (folder / "adapter_config.json").exists():
        return load_model(Model(name=str(folder), dtype=recipe.model.dtype), tokenizer, seed=0)
    from peft import PeftModel

    # A base from scratch is the same only with the seed of training.
    base = load_model(pin_base_model(recipe).model, tokenizer, recipe.training.seed, device)
    return PeftModel.from_pretrained(base, str(folder))


def ask(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerFast",
    template: MarkerTemplate | ChatTemplate,
    generation: Generation,
    questions: list[str],
) -> list[str]:
    """The response to each question, without prompt and end mark.

    Leaves the model's mode and the random numbers of training as they were. Raises UserError for a question longer
    than the model can read.
    """
    segments = [
        template.render_prompt([{"role": "user", "content": question}]) for question in questions
    ]
    prompts = encode_prompts(segments, tokenizer)
    answers = []
    was_training = model.training
    model.eval()
    devices = [model.device] if model.device.type == "cuda" else []
    # Not inference_mode: weights that ZeRO-3 gathers in it could not be trained on afterwards.
    with torch.random.fork_rng(devices), torch.no_grad():
        torch.manual_seed(generation.seed)
        for start in range(0, len(prompts), BATCH):
            answers += respond(
                model, tokenizer, template, generation, prompts[start : start + BATCH]
            )
    model.train(was_training)
    return answers


def respond(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerFast",
    template: MarkerTemplate | ChatTemplate,
    generation: Generation,
    prompts: list[list[int]],
) -> list[str]:
    """One batch of `ask`: prompts padded on the left, so that every response starts at the same column."""
    from transformers import GenerationConfig

    longest = max(map(len, prompts))
    settings = generation.model_dump(exclude_unset=True, exclude={"prompts", "seed"})
    settings["max_new_tokens"] = new_tokens(model, generation.max_new_tokens, longest)
    ends = [tokenizer.convert_tokens_to_ids(mark) for mark in template.end_marks]
    fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    tokens = {"eos_token_id": ends, "pad_token_id": fill}
    input_ids = torch.tensor([[fill] * (longest - len(prompt)) + prompt for prompt in prompts])
    attention_mask = torch.tensor(
        [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    )
    try:
        output = model.generate(
            input_ids=input_ids.to(model.device),
            attention_mask=attention_mask.to(model.device),
            generation_config=GenerationConfig(**{**tokens, "use_cache": True, **settings}),
        )
    except ValueError as error:  # what transformers finds wrong with the settings
        raise UserError(f"generation: {one_line(error)}") from None
    responses = [cut_at_end(ids, ends) for ids in output[:, longest:].tolist()]
    return [
        template.answer(text)
        for text in tokenizer.batch_decode(responses, skip_special_tokens=True)
    ]


def cut_at_end(ids: list[int], ends: list[int]) -> list[int]:
    """The tokens before the first end mark."""
    return next((ids[:position] for position, token in enumerate(ids) if token in ends), ids)


def new_tokens(model: "PreTrainedModel", wanted: int, prompt: int) -> int:
    """How many tokens fit behind a prompt of that many."""
    positions = getattr(model.config, "max_position_embeddings", None) or wanted + prompt
    if prompt >= positions:
        raise UserError(
            f"a question has {prompt} tokens with its template, the model reads at most {positions}"
        )
    return min(wanted, positions - prompt)
