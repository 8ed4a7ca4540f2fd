"""A trained model -> GGUF file, Modelfile, and exported.json: does it answer the same?"""

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetuning.data.chosen_template import load_template
from finetuning.data.generation_marks import without_generation_marks
from finetuning.data.row import Message
from finetuning.data.templates import Template
from finetuning.data.tokenization import encode_prompts
from finetuning.errors import UserError
from finetuning.export.architectures import architecture_of
from finetuning.export.gguf_file import Contents, write_gguf
from finetuning.export.llama_cpp import PACKAGE, SETTINGS, LlamaCpp, is_installed
from finetuning.export.merging import merge
from finetuning.export.modelfile import modelfile, turns_of
from finetuning.files import sha256_of, write_text
from finetuning.hub.allowed_files import ADAPTER_WEIGHTS
from finetuning.inference.agreement import Answer, ask_greedily, questions_of
from finetuning.inference.resolve import pin_base_model
from finetuning.launch.software import installed
from finetuning.model.finite import require_finite_weights
from finetuning.model.loading import load_config
from finetuning.recipe.recipe import Recipe
from finetuning.runs.environment import now
from finetuning.runs.folder import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

RECORD, MODELFILE = "exported.json", "Modelfile"


@dataclass(frozen=True)
class Trained:
    """A trained model in its folder, and how it is asked."""

    run: RunFolder
    recipe: Recipe
    """its own, or with other settings"""

    @property
    def tokenizer(self) -> "PreTrainedTokenizerFast":
        return self.run.tokenizer

    @property
    def template(self) -> Template:
        return load_template(self.recipe.data, self.tokenizer)

    def prompt(self, messages: Sequence[Message]) -> str:
        """The text it was trained to be asked with. Raises BadRow for roles without a place."""
        return "".join(segment.text for segment in self.template.render_prompt(messages))

    def prompt_ids(self, question: str) -> list[int]:
        """The same of one question, as ids."""
        segments = self.template.render_prompt([{"role": "user", "content": question}])
        return encode_prompts([segments], self.tokenizer)[0]

    @property
    def chat_template(self) -> str | None:
        """The saved chat template if it asks as was trained: a base's own may not."""
        saved = self.tokenizer.chat_template
        if not isinstance(saved, str):
            return None
        for question in questions_of(self.recipe):
            asked = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": question}],
                add_generation_prompt=True,
                return_dict=False,
            )
            if asked != self.prompt_ids(question):
                return None
        return saved


def require_gguf() -> None:
    """Raises UserError without the library that writes the files."""
    if installed("gguf") is None:
        raise UserError(
            "GGUF files are written by the library gguf, which is not installed; "
            "pip install -e '.[export]' --constraint constraints.txt"
        )


def export(folder: Path, recipe: Recipe, kind: str, target: Path) -> Path:
    """Writes model-<kind>.gguf and a Modelfile to the target folder; returns the GGUF file.

    Raises UserError for a model that llama.cpp does not compute, and for weights that are not
    finite.
    """
    trained = Trained(RunFolder(folder), recipe)
    architecture_of(config_of(trained))
    ends = trained.template.end_marks
    license = recipe.publish.license if recipe.publish else None
    contents = Contents(
        name=Path(recipe.training.output_dir).name,
        tokenizer=trained.tokenizer,
        chat_template=plain_template(trained.chat_template),
        ends=[trained.tokenizer.get_vocab()[end] for end in ends],
        generation=recipe.generation,
        license=license,
    )
    target.mkdir(parents=True, exist_ok=True)
    file = target / f"model-{kind}.gguf"
    with full_weights(trained) as weights:
        require_finite_weights(weights)
        write_gguf(weights, contents, kind, file)
    turns = turns_of(trained.prompt)
    text = modelfile(file.name, turns, ends, recipe.generation, license)
    write_text(target / MODELFILE, text)
    return file


def plain_template(saved: str | None) -> str | None:
    """Without marks for training, of which other programs' Jinja need not know."""
    return without_generation_marks(saved) if saved else None


def config_of(trained: Trained) -> Any:
    """Of the model itself, or of an adapter's base."""
    from transformers import AutoConfig

    if (trained.run.path / "config.json").is_file():
        return AutoConfig.from_pretrained(trained.run.path, trust_remote_code=False)
    return load_config(pin_base_model(trained.recipe).model, trained.tokenizer)


@contextmanager
def full_weights(trained: Trained) -> Iterator[Path]:
    """The folder itself, or for an adapter a folder with its merged weights, gone afterwards."""
    folder = trained.run.path
    if not (folder / ADAPTER_WEIGHTS).is_file():
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="merged-") as weights:
        yield merge(trained.run, trained.recipe, Path(weights))


def compare(folder: Path, recipe: Recipe, file: Path) -> list[Answer]:
    """The recipe's questions, answered greedily by the run folder and by the file in llama.cpp.

    Raises UserError where llama.cpp sees other tokens than were trained. Nothing is asked where
    llama.cpp is not installed.
    """
    if not is_installed():
        return []
    trained = Trained(RunFolder(folder), recipe)
    questions = questions_of(recipe)
    ours = ask_greedily(folder, recipe, questions, SETTINGS)
    prompts = [trained.prompt_ids(question) for question in questions]
    positions = max(map(len, prompts)) + recipe.generation.max_new_tokens + 1
    server = LlamaCpp(file, positions, threads())
    theirs = [
        ask(server, trained, question, ids)
        for question, ids in zip(questions, prompts, strict=True)
    ]
    return [Answer(*row) for row in zip(questions, ours, theirs, strict=True)]


def ask(server: LlamaCpp, trained: Trained, question: str, ids: list[int]) -> str:
    """llama.cpp's answer to a question, asked by its chat template if the file has one."""
    messages: list[Message] = [{"role": "user", "content": question}]
    generation, has_chat = trained.recipe.generation, trained.chat_template is not None
    prompt = server.prompt(messages) if has_chat else trained.prompt(messages)
    if server.tokens(prompt) != ids:
        raise UserError(
            f"exported, but llama.cpp sees other tokens than were trained in the prompt of "
            f"{question!r}: its tokenizer cuts text in another way; the file is of no use"
        )
    answer = server.chat(messages, generation) if has_chat else server.complete(prompt, generation)
    return str(trained.template.strip_markers(answer))


def threads() -> int:
    import torch

    return torch.get_num_threads()


def write_record(file: Path, kind: str, answers: list[Answer]) -> dict[str, Any]:
    """exported.json beside the file: what was written, and what it answered."""
    record = {
        "file": file.name,
        "type": kind,
        "size": file.stat().st_size,
        "sha256": sha256_of(file),
        "at": now(),
        "llama.cpp": f"{PACKAGE} {installed(PACKAGE)}" if answers else None,
        "answers": [answer.record("llama.cpp") for answer in answers],
    }
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    write_text(file.with_name(RECORD), text)
    return record
