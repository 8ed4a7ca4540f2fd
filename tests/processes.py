"""Run by torchrun in every process of test_processes.py: trains all cases and writes down what came out.

torchrun --nproc_per_node 2 tests/processes.py CASES.json RESULTS_FOLDER
"""

import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / "src"), str(Path(__file__).parent)]

from safetensors.torch import save_file  # noqa: E402
from test_trainer import losses_of, trained  # noqa: E402

from finetuning.recipe import load_recipe  # noqa: E402


def main() -> None:
    cases, results = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    for name, (recipe, overrides) in cases.items():
        trainer = trained(load_recipe(recipe, overrides))
        model = trainer.accelerator.unwrap_model(trainer.model)
        if trainer.is_world_process_zero():
            weights = {k: w.detach().clone() for k, w in model.named_parameters() if w.requires_grad}
            save_file(weights, results / f"{name}.safetensors")
            found = {
                "losses": losses_of(trainer),
                "eval": [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry],
                "processes": trainer.accelerator.num_processes,
                "wrapper": type(trainer.model_wrapped).__name__,
            }
            (results / f"{name}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
