"""The template that a recipe names, with a tokenizer's special tokens."""

from typing import TYPE_CHECKING

from finetuning.data.chat_template import ChatTemplate
from finetuning.data.row import BadRow
from finetuning.data.section import Data
from finetuning.data.templates import CHAT, TEMPLATES, MarkerTemplate, Template
from finetuning.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def load_template(data: Data, tokenizer: "PreTrainedTokenizerFast") -> Template:
    """The recipe's template with the tokenizer's own special tokens.

    Raises UserError if the tokenizer lacks what the template needs.
    """
    if data.template == CHAT:
        if not tokenizer.chat_template:
            raise UserError(
                "data.template: chat, but the tokenizer has no chat template; "
                f"allowed are {', '.join(TEMPLATES)}"
            )
        template = ChatTemplate(tokenizer)
        if not template.end_marks:
            raise UserError(
                "data.template: chat: the tokenizer's chat template ends no response, and the "
                "tokenizer has no EOS token to end it with; use another template"
            )
        try:
            template.check()
        except BadRow as error:
            raise UserError(f"data.template: chat: {error}; use another template") from None
        return template
    if tokenizer.eos_token is None:
        raise UserError(
            f"data.template: {data.template} ends a response with EOS, the tokenizer has none"
        )
    bos = tokenizer.bos_token if prepends_bos(tokenizer) else None
    return MarkerTemplate(TEMPLATES[data.template], tokenizer.eos_token, bos, data.newline)


def prepends_bos(tokenizer: "PreTrainedTokenizerFast") -> bool:
    """Prepend BOS only if the tokenizer does, as in pre-training (Llama, Gemma: yes; GPT-2: no)."""
    has_bos = tokenizer.bos_token is not None
    return has_bos and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
