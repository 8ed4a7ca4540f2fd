"""Commands as a person types them, what they need on disk, and what a refusal looks like."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Protocol

from warm import WarmPython

ROOT = Path(__file__).parents[1]

# A recipe and its rows, right as they are; FOLDER is where write_files puts them.
RECIPE = """\
model:
  from_scratch:
    vocab_size: 300
    config: {model_type: gpt2, n_layer: 1, n_embd: 8, n_head: 2, n_positions: 64}
data:
  path: FOLDER/rows.jsonl
  reader: prompt_response
  template: question_answer
  max_length: 64
training:
  output_dir: FOLDER/run
  max_steps: 2
"""
ROWS = (
    '{"prompt": "Hi", "response": "Hello", "n": 1}\n'
    '{"prompt": "Bye", "response": "See you", "n": 2}\n'
)

# Stands where torch would be found. Nothing can catch this exit, and the code is nobody else's.
FAKE_TORCH = (
    'import os, sys; print("torch was imported", file=sys.stderr, flush=True); os._exit(99)\n'
)


# What scripts import without torch.
SHARED = (
    "finetuning.training.prepared_run",
    "finetuning.model.loading",
    "finetuning.hub.access",
    "finetuning.runs.terminal",
    "finetuning.runs.folder",
    "detect_secrets.core.scan",
    "huggingface_hub",
    "rich.console",
    "transformers.tokenization_utils_tokenizers",
)


class RunScript(Protocol):
    """Runs `python src/<script> arguments` and returns what subprocess.run returns."""

    def __call__(
        self, script: str, *arguments: object, **environment: str
    ) -> subprocess.CompletedProcess: ...


def runs_of(python: WarmPython) -> RunScript:
    """Scripts as forks of that Python, from the project's root."""

    def run(script, *arguments, **environment):
        return python.run(
            sys.executable,
            f"src/{script}",
            *arguments,
            cwd=ROOT,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


def write_files(folder: Path, files: dict[str, str | bytes]) -> None:
    """Writes {name: content}; FOLDER in a text becomes the folder's path."""
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(
            content
            if isinstance(content, bytes)
            else content.replace("FOLDER", str(folder)).encode()
        )


def assert_one_line(process: subprocess.CompletedProcess, words: list[str], code: int = 2) -> None:
    """The command failed, and said why in one line, with these words in it."""
    assert process.returncode == code, process.stderr
    lines = [line for line in process.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, process.stderr
    assert lines[0].startswith("error: ")
    assert "Traceback" not in process.stdout + process.stderr
    for word in words:
        assert word in lines[0]
