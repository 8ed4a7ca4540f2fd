"""The code of a model card: how the model is loaded and asked, in the libraries' own calls."""

import json
from typing import TYPE_CHECKING

from finetuning.data.chosen_template import load_template
from finetuning.hub.address import Address
from finetuning.hub.manifest import BaseModelSource
from finetuning.recipe.recipe import Recipe
from finetuning.untrusted_text import printable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def loading(address: Address, kind: str, base: BaseModelSource | None) -> str:
    """The code that loads it, in the libraries' own calls."""
    place = f'"{address.repo}", subfolder="{address.subfolder}"'
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    if kind == "adapter" and base:
        named = {"subfolder": base.subfolder, "revision": base.revision}
        names = [text_of(base.name), *(f"{key}={text_of(v)}" for key, v in named.items() if v)]
        lines = ["from peft import PeftModel", *lines]
        lines.append(f"base = AutoModelForCausalLM.from_pretrained({', '.join(names)})")
        lines.append(f"model = PeftModel.from_pretrained(base, {place})")
    else:
        lines.append(f"model = AutoModelForCausalLM.from_pretrained({place})")
    lines.append(f"tokenizer = AutoTokenizer.from_pretrained({place})")
    return "\n".join(lines)


def text_of(value: str | None) -> str:
    """A string in Python, whatever is in it."""
    return printable(json.dumps(value, ensure_ascii=False))


def asking(recipe: Recipe, tokenizer: "PreTrainedTokenizerFast", question: str) -> str:
    """The code that asks it a question with the prompt it was trained with."""
    template = load_template(recipe.data, tokenizer)
    segments = template.render_prompt([{"role": "user", "content": question}])
    prompt = "".join(segment.text for segment in segments)
    given = recipe.generation.model_dump(exclude_unset=True, exclude={"prompts", "seed"})
    settings = {"max_new_tokens": recipe.generation.max_new_tokens, **given}
    if template.end_marks != [tokenizer.eos_token]:  # all that the model's own settings may know
        settings = {"eos_token_id": tokenizer.convert_tokens_to_ids(template.end_marks), **settings}
    newline = f".replace({recipe.data.newline!r}, '\\n')" if recipe.data.newline else ""
    arguments = printable(", ".join(f"{name}={value!r}" for name, value in settings.items()))
    return "\n".join(
        [
            f"prompt = {text_of(prompt)}",
            'inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")',
            f"output = model.generate(**inputs, {arguments})",
            "response = output[0, inputs.input_ids.shape[1] :]",
            "answer = tokenizer.decode(response, skip_special_tokens=True)",
            f"print(answer{newline})",
        ]
    )
