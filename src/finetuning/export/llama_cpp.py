"""A GGUF file in llama.cpp: does it see the trained prompt, does it answer the same?"""

import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetuning.data.row import Message
from finetuning.launch.software import installed

if TYPE_CHECKING:
    from finetuning.recipe.sections import Generation

PACKAGE = "xllamacpp"  # llama.cpp with its server, prebuilt
TIMEOUT = 600  # seconds for one answer
SETTINGS = ("max_new_tokens", "repetition_penalty")  # greedy settings that it has too


def is_installed() -> bool:
    return installed(PACKAGE) is not None


class LlamaCpp:
    """llama.cpp's own server in this process, on a port of localhost that is free."""

    def __init__(self, file: Path, positions: int, threads: int) -> None:
        import xllamacpp

        settings = xllamacpp.CommonParams()
        settings.model.path = str(file)
        settings.n_ctx = positions
        settings.n_parallel = 1
        settings.n_gpu_layers = 0
        settings.warmup = False
        settings.verbosity = 0
        settings.use_jinja = True
        settings.cpuparams.n_threads = threads
        self.server = xllamacpp.Server(settings)
        self.build: str = xllamacpp.BUILD_INFO
        # It answers some requests before its main loop runs. Deleted before that, it would wait for
        # the loop to end, for ever: this is a request that only the loop answers.
        self.post("/completion", prompt="a", n_predict=0)

    def post(self, path: str, **body: Any) -> Any:
        request = urllib.request.Request(
            self.server.listening_address + path,
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        # Its own opener: a proxy of the environment must not be asked for localhost.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=TIMEOUT) as answer:
            return json.load(answer)

    def prompt(self, messages: Sequence[Message]) -> str:
        """The text that a chat turns into."""
        return str(self.post("/apply-template", messages=messages)["prompt"])

    def tokens(self, text: str) -> list[int]:
        """The ids of a prompt, as its chat completions make them."""
        found = self.post("/tokenize", content=text, add_special=True, parse_special=True)
        return [int(token) for token in found["tokens"]]

    def chat(self, messages: Sequence[Message], generation: "Generation") -> str:
        """A greedy answer to a chat."""
        found = self.post("/v1/chat/completions", messages=messages, **greedy(generation))
        return str(found["choices"][0]["message"]["content"])

    def complete(self, prompt: str, generation: "Generation") -> str:
        """A greedy continuation of a text."""
        return str(self.post("/completion", prompt=prompt, **greedy(generation))["content"])


def greedy(generation: "Generation") -> dict[str, Any]:
    """The recipe's settings by llama.cpp's names, without sampling."""
    found = {"temperature": 0, "n_predict": generation.max_new_tokens, "cache_prompt": False}
    penalty = generation.model_dump(exclude_unset=True).get("repetition_penalty")
    # Of all tokens, as in transformers: a number that is larger than any context.
    return found | ({"repeat_penalty": penalty, "repeat_last_n": 2**20} if penalty else {})
