"""Run in every process of test_processes.py: trains all cases and writes down what came out.

accelerate launch --config_file accelerate_configs/zero3.yaml --num_processes 2 tests/processes.py CASES.json FOLDER
"""

import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / "src"), str(Path(__file__).parent)]

from test_trainer import losses_of, trained  # noqa: E402

from finetuning.recipe import load_recipe  # noqa: E402
from finetuning.strategy import running  # noqa: E402


def main() -> None:
    cases, results = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    for name, (recipe, overrides) in cases.items():
        trainer = trained(load_recipe(recipe, overrides))
        trainer.save_trained()
        found = {
            "losses": losses_of(trainer),
            "eval": [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry],
            "strategy": str(running(trainer)),
            "wrapper": type(trainer.model_wrapped).__name__,
            **shares(trainer),
        }
        if trainer.is_world_process_zero():
            (results / f"{name}.json").write_text(json.dumps(found))


def shares(trainer) -> dict[str, float]:
    """How much of the weights, and of Adam's first moments, this process holds: 1.0 is all of it."""
    weights = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    whole = sum(getattr(weight, "ds_numel", weight.numel()) for weight in weights)
    local = sum(weight.ds_tensor.numel() if hasattr(weight, "ds_tensor") else weight.numel() for weight in weights)
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's around DeepSpeed's around torch's
    moments = sum(state["exp_avg"].numel() for state in optimizer.state.values())
    return {"weights": local / whole, "moments": moments / whole}


if __name__ == "__main__":
    main()
