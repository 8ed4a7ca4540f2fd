"""A page to talk to models side by side, served to this machine by Python's own web server.

GET  .        the page; it loads nothing from anywhere else
GET  models   [{"name": ..., "settings": {...}}]: the columns, and how they answer by default
POST answer   {"model": number, "messages": [...], "settings": {...}} -> a JSON object a line:
              {"piece": ...} as the words come, then
              {"answer": ..., "prompt": [[text, is_trained], ...]}, or {"error": ...}
"""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from finetuning.data.readers import read_messages
from finetuning.data.rendering import Conversation, render_row
from finetuning.data.row import BadRow, message
from finetuning.data.tokenization import tokenize
from finetuning.errors import UserError, one_line
from finetuning.inference.generation import Asker
from finetuning.inference.resolve import pin_base_model
from finetuning.inference.trained_model import load_asker
from finetuning.model.loading import load_model
from finetuning.recipe.recipe import Recipe
from finetuning.recipe.sections import Generation
from finetuning.runs.colored_masks import split_by_mask

PAGE = Path(__file__).with_name("page.html")
SETTINGS = (  # what the page lets a person change
    "max_new_tokens",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "repetition_penalty",
    "seed",
)
MAX_REQUEST = 2**20  # bytes
# Nothing from elsewhere, even if an answer should contain markup.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:"
)


@dataclass(frozen=True)
class Column:
    """One of the models that are asked side by side."""

    name: str
    asker: Asker
    as_base: Callable[[], Any] = field(default=nullcontext)
    """a context in which the model answers; one without its adapter is the base model"""

    def settings(self) -> dict[str, Any]:
        values = self.asker.generation.model_dump()
        return {name: values.get(name) for name in SETTINGS}

    def answer(self, request: dict[str, Any], show: Callable[[str], None]) -> dict[str, Any]:
        """{answer, prompt}. Raises UserError where it cannot be asked like this."""
        asker = replace(self.asker, generation=self.changed(request.get("settings") or {}))
        try:
            messages = read_messages(request)
        except BadRow as error:
            raise UserError(str(error)) from None
        with self.as_base():
            answer = asker.stream(messages, show)
        said = Conversation([*messages, message("assistant", answer)], [])
        (example,) = tokenize(render_row(said, asker.template)[-1:], asker.tokenizer)
        return {"answer": answer, "prompt": split_by_mask(example, asker.tokenizer)}

    def changed(self, settings: dict[str, Any]) -> Generation:
        given = {name: value for name, value in settings.items() if value is not None}
        if unknown := given.keys() - set(SETTINGS):
            raise UserError(f"settings: {min(unknown)} cannot be changed here")
        before = self.asker.generation.model_dump(exclude_unset=True)
        try:
            return Generation.model_validate({**before, **given})
        except ValidationError as error:
            first = error.errors()[0]
            raise UserError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def columns_of(name: str, folder: Path, recipe: Recipe, has_base: bool) -> list[Column]:
    """A run's column, and in front of it that of its base model, if it has one and it is wanted."""
    asker = load_asker(folder, recipe)
    trained = Column(name, asker)
    if not has_base or recipe.model.name is None:
        return [trained]
    base = f"base model {recipe.model.name}"
    model: Any = asker.model
    if (folder / "adapter_config.json").exists():
        return [Column(base, asker, as_base=model.disable_adapter), trained]
    loaded: Any = load_model(pin_base_model(recipe).model, asker.tokenizer, recipe.training.seed)
    return [Column(base, replace(asker, model=loaded.to(model.device))), trained]


class Server(ThreadingHTTPServer):
    """One answer at a time: the models share a device."""

    daemon_threads = True

    def __init__(self, host: str, port: int, columns: list[Column]) -> None:
        self.columns, self.turn = columns, threading.Lock()
        super().__init__((host, port), Handler)

    @property
    def address(self) -> str:
        host, port = self.server_address[:2]
        return f"http://{host!s}:{port}/"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        if self.path in ("/", "/index.html"):
            self.send(200, "text/html; charset=utf-8", PAGE.read_bytes())
        elif self.path == "/models":
            models = [{"name": c.name, "settings": c.settings()} for c in self.server.columns]
            self.send(200, "application/json", json.dumps(models).encode())
        else:
            self.send(404, "text/plain", b"not found")

    def do_POST(self) -> None:
        """Only JSON: a page of another site cannot send it without asking the browser's leave."""
        length = int(self.headers.get("Content-Length") or 0)
        if self.path != "/answer":
            return self.send(404, "text/plain", b"not found")
        if self.headers.get_content_type() != "application/json" or length > MAX_REQUEST:
            return self.send(415, "text/plain", b"expected application/json")
        body = self.rfile.read(length)
        self.begin(200, "application/x-ndjson")
        try:
            request = json.loads(body)
            column = self.server.columns[request["model"]]
            with self.server.turn:
                self.say(**column.answer(request, lambda piece: self.say(piece=piece)))
        except UserError as error:
            self.say(error=one_line(error))
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            self.say(error=f"not a question: {one_line(error)}")
        except ConnectionError:
            pass  # the person has stopped listening

    def say(self, **line: Any) -> None:
        self.wfile.write(json.dumps(line).encode() + b"\n")
        self.wfile.flush()

    def send(self, status: int, kind: str, content: bytes) -> None:
        self.begin(status, kind)
        self.wfile.write(content)

    def begin(self, status: int, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", POLICY)
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        """Nothing: a line for each request says nothing to the person who asks."""


@contextmanager
def serving(columns: list[Column], host: str, port: int) -> Iterator[Server]:
    """A server that listens until the context ends. Raises UserError where it cannot."""
    try:
        server = Server(host, port, columns)
    except OSError as error:
        raise UserError(
            f"{host}:{port} cannot be listened on: {error.strerror}; choose another --port"
        ) from None
    thread = threading.Thread(target=partial(server.serve_forever, poll_interval=0.1), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
