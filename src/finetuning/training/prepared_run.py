"""What is known of a run before torch is imported: recipe, tokenizer and examples."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetuning.data.cache import cache_folder, prepare
from finetuning.data.chosen_template import load_template
from finetuning.data.named_templates import set_chat_template
from finetuning.data.prepare import training_texts
from finetuning.data.storage import Prepared
from finetuning.data.templates import Template
from finetuning.hub.access import require_hub
from finetuning.inference.resolve import pin_base_model, with_begun_adapter
from finetuning.launch.compatibility import require_compatible
from finetuning.launch.hub_needs import needs_of
from finetuning.launch.strategy import Strategy
from finetuning.model.tokenizer import load_tokenizer
from finetuning.recipe.recipe import Recipe
from finetuning.runs.reopen import with_begun_draw

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class PreparedRun:
    """One recipe, ready to be trained."""

    recipe: Recipe
    """with its base model, and the adapter that training begins with, pinned to a commit where they
    were published from here"""
    strategy: Strategy
    """that was requested"""
    tokenizer: "PreTrainedTokenizerFast"
    examples: Prepared

    @property
    def template(self) -> Template:
        return load_template(self.recipe.data, self.tokenizer)


def prepare_run(recipe: Recipe, strategy: Strategy, *, trains_here: bool) -> PreparedRun:
    """Reads tokenizer and rows. Raises UserError where something is missing or does not go
    together.
    """
    require_compatible(recipe, strategy, trains_here)
    require_hub(needs_of(recipe))
    recipe = with_begun_draw(recipe)
    on_base = with_begun_adapter(recipe)
    if on_base is not recipe:  # another base model, and a lora section
        require_compatible(on_base, strategy, trains_here)
        require_hub(needs_of(on_base))
    recipe = pin_base_model(on_base)
    tokenizer = load_tokenizer(recipe.model, training_texts(recipe.data))
    set_chat_template(recipe.data, tokenizer)
    examples = prepare(recipe.data, tokenizer, cache_folder())
    # It is saved with the tokenizer, for other programs, instead of the base model's.
    tokenizer.chat_template = load_template(recipe.data, tokenizer).jinja
    return PreparedRun(recipe, strategy, tokenizer, examples)
