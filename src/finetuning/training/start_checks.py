"""What is asked of the prepared model before its first step."""

import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object
from rich.console import Console
from transformers import TrainerCallback

from finetuning.launch.software import require_same_software, software
from finetuning.launch.strategy import Strategy, launch_of, require_strategy
from finetuning.model.attention import require_isolation
from finetuning.recipe.recipe import Recipe
from finetuning.runs.folder import Sample, write_samples, write_start
from finetuning.training.memory_check import check_memory

if TYPE_CHECKING:
    from finetuning.training.trainer import ResponseTrainer


class StartChecks(TrainerCallback):
    """Does the run do what was asked for, is the software the same everywhere, is what the head scores the loss, do
    packed examples see each other, does the longest batch fit, how does the untrained model answer?

    On the prepared model, because under ZeRO-3 and FSDP no process can ask one of its parts alone. Then the run folder
    is begun: one that is refused here leaves nothing behind.
    """

    def __init__(
        self,
        trainer: "ResponseTrainer",
        recipe: Recipe,
        strategy: Strategy,
        fingerprint: str,
        ask: Callable[[], list[str]],
        console: Console,
    ) -> None:
        self.trainer, self.recipe, self.strategy = trainer, recipe, strategy
        self.fingerprint, self.ask, self.console = fingerprint, ask, console

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        require_strategy(self.trainer, self.strategy)
        require_same_software(gather_object([(socket.gethostname(), software())]))
        self.trainer.head.require_unmodified_logits(model)
        if self.recipe.data.layout == "packed":
            longest = int(self.trainer.train_examples.lengths.max())
            require_isolation(model, longest, is_half=args.bf16 or args.fp16)
        check_memory(self.trainer, self.recipe)
        folder = self.trainer.run_folder
        # A run that goes on was asked before its first step; the model has learnt since.
        answers = [] if state.global_step else self.ask()
        if not state.is_world_process_zero:
            return
        if not state.global_step:
            write_samples(
                folder,
                [
                    Sample(*pair)
                    for pair in zip(self.recipe.generation.prompts, answers, strict=True)
                ],
            )
        launch = launch_of(self.trainer, self.strategy)
        write_start(folder, self.recipe, self.fingerprint, launch)
        self.console.print(f"runs as {self.strategy}, {launch['precision']}, on {launch['device']}")
