"""Runs scripts as `python src/<script> arguments` would, each in a fork of this process.

The process has imported what scripts share, so a start costs 0.1 s and not one or two. A fork ends
as any Python does: exit code and stderr are its own. commands.forks speaks to it, one JSON line a
script.

python tests/fork_server.py [MODULE ...]        modules to import beforehand
"""

import gc
import importlib
import json
import os
import runpy
import signal
import sys
import tempfile
from pathlib import Path

SHARED = [
    "finetuning.model.loading",
    "finetuning.hub.access",
    "finetuning.runs.terminal",
    "finetuning.runs.folder",
    "huggingface_hub",
    "rich.console",
    "transformers.tokenization_utils_tokenizers",
]
LONGEST = 60  # seconds that a script may take


def main(modules: list[str]) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print when they are imported
    sys.path[0] = str(Path(__file__).parents[1] / "src")
    for name in [*SHARED, *modules]:
        importlib.import_module(name)
    gc.freeze()  # a fork's end need not visit (and so copy) what it shares
    for line in sys.stdin:
        script, arguments, environment = json.loads(line)
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            child = os.fork()
            if not child:
                return become(script, arguments, environment, out.fileno(), err.fileno())
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            texts = [os.pread(file.fileno(), 1 << 20, 0).decode() for file in (out, err)]
        print(json.dumps([code, *texts]), file=answers, flush=True)


def become(
    script: str, arguments: list[str], environment: dict[str, str], out: int, err: int
) -> None:
    """Goes on as that script, which writes to these file descriptors and reads nothing."""
    signal.alarm(LONGEST)
    os.environ.update(environment)
    for descriptor, standard in ((os.open(os.devnull, os.O_RDONLY), 0), (out, 1), (err, 2)):
        os.dup2(descriptor, standard)
    sys.argv = [f"src/{script}", *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
