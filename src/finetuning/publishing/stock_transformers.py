"""A published folder in stock transformers: generate, a chat pipeline, `transformers serve`."""

import contextlib
import json
import logging
import sys
import time
import urllib.request
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from finetuning.data.row import Message
from finetuning.errors import UserError
from finetuning.export.exported import Trained, config_of

if TYPE_CHECKING:
    from transformers import TextGenerationPipeline

TIMEOUT = 600  # seconds for one answer


class Stock:
    """The folder as a reader has it: its own tokenizer, chat template and generation settings.

    Only sampling is turned off, to compare, and answers end where the model's positions do.
    """

    def __init__(self, model: Trained) -> None:
        from transformers import pipeline

        self.trained, folder = model, str(model.run.path)
        load: Any = pipeline
        self.pipeline: TextGenerationPipeline = load(
            "text-generation", model=folder, tokenizer=folder, device="cpu"
        )

    def generate(self, question: str) -> str:
        """The answer of `model.generate(**inputs)` to the text of the prompt."""
        tokenizer: Any = self.pipeline.tokenizer
        prompt = self.trained.prompt(chat_of(question))
        inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
        model: Any = self.pipeline.model
        output = model.generate(**inputs, **self.greedy(question))
        response = output[0, inputs.input_ids.shape[1] :]
        return self.content(tokenizer.decode(response, skip_special_tokens=True))

    def chat(self, question: str) -> str:
        """The answer of `pipeline("text-generation")(messages)`."""
        ask: Any = self.pipeline
        said = ask(chat_of(question), **self.greedy(question))[0]["generated_text"]
        return self.content(said[-1]["content"])

    def greedy(self, question: str) -> dict[str, Any]:
        # An answer longer than the model reads is an IndexError in transformers, cut in ours.
        return {"do_sample": False, "max_new_tokens": room_of(self.trained, question)}

    def content(self, text: str) -> str:
        return str(self.trained.template.strip_markers(text))


def room_of(model: Trained, question: str) -> int:
    """Tokens that an answer may have: the recipe's, as far as the model has positions for them."""
    positions = getattr(config_of(model), "max_position_embeddings", None) or sys.maxsize
    room: int = positions - len(model.prompt_ids(question))
    return min(model.recipe.generation.max_new_tokens, room)


def chat_of(question: str) -> list[Message]:
    return [{"role": "user", "content": question}]


def can_serve() -> bool:
    """Whether `transformers serve` has what it needs: pip install "transformers[serving]"."""
    from transformers.utils.import_utils import is_serve_available

    return bool(is_serve_available())


def ask_server(model: Trained, questions: list[str]) -> list[str]:
    """Greedy answers of the chat completions of `transformers serve`."""
    answers = []
    with serving(model) as address:
        for question in questions:
            asked = {
                "model": str(model.run.path),
                "messages": chat_of(question),
                "temperature": 0,
                "max_tokens": room_of(model, question),
            }
            said = post(f"{address}/v1/chat/completions", asked)["choices"][0]["message"]["content"]
            answers.append(str(model.template.strip_markers(said)))
    return answers


@contextlib.contextmanager
def serving(model: Trained) -> Iterator[str]:
    """The address of `transformers serve` on a free port of localhost, in this process."""
    from transformers.cli.serve import Serve

    logger = logging.getLogger("transformers")
    level, disabled = logger.level, logging.root.manager.disable
    # Its web server sets up its own loggers, so a level of theirs would not last.
    logging.disable(logging.CRITICAL)
    server: Any = Serve(
        str(model.run.path),
        device="cpu",
        host="127.0.0.1",
        port=0,
        log_level="error",
        non_blocking=True,
    )
    try:
        while not server.server.started:
            if not server._thread.is_alive():
                raise UserError("transformers serve does not start")
            time.sleep(0.01)
        port = server.server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill_server()
        logging.disable(disabled)
        logger.setLevel(level)


def post(address: str, body: dict[str, Any]) -> Any:
    """The answer of a local server to a JSON request."""
    request = urllib.request.Request(
        address, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    # Its own opener: a proxy of the environment must not be asked for localhost.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=TIMEOUT) as answer:
        return json.load(answer)
