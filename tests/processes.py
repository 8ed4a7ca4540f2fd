"""Run in every process of test_processes.py: trains all cases and writes down what came out.

accelerate launch --config_file accelerate_configs/zero3.yaml --num_processes 2 \\
  tests/processes.py CASES.json FOLDER
"""

import json
from contextlib import nullcontext
from pathlib import Path

from fp16_on_cpu import fp16_on_cpu
from torch.distributed.tensor import DTensor
from trainings import figures_of, losses_of, trained

from finetuning.launch.strategy import actual_strategy
from finetuning.recipe.recipe import load_recipe
from finetuning.script import run


def main(arguments: list[str]) -> None:
    cases, results = json.loads(Path(arguments[0]).read_text()), Path(arguments[1])
    for name, (recipe, overrides) in cases.items():
        with fp16_on_cpu() if name == "fp16" else nullcontext():
            trainer = trained(load_recipe(recipe, overrides))
        trainer.save_trained()
        found = {
            "losses": losses_of(trainer),
            "figures": figures_of(trainer),
            "eval": [
                entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry
            ],
            "strategy": str(actual_strategy(trainer)),
            "wrappers": [kind.__name__ for kind in type(trainer.model_wrapped).__mro__],
            **shares(trainer),
        }
        if trainer.is_world_process_zero():
            (results / f"{name}.json").write_text(json.dumps(found))


def shares(trainer) -> dict[str, float]:
    """This process's share of the weights and of Adam's first moments: 1.0 is all of them."""
    weights = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    whole = sum(getattr(weight, "ds_numel", weight.numel()) for weight in weights)
    local = sum(local_part(weight).numel() for weight in weights)
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    optimizer = getattr(
        optimizer, "optimizer", optimizer
    )  # accelerate's around DeepSpeed's around torch's
    moments = sum(local_part(state["exp_avg"]).numel() for state in optimizer.state.values())
    return {"weights": local / whole, "moments": moments / whole}


def local_part(tensor):
    """What this process has of a tensor that DeepSpeed or FSDP2 shared out."""
    if isinstance(tensor, DTensor):
        return tensor.to_local()
    return getattr(tensor, "ds_tensor", tensor)


if __name__ == "__main__":
    run(main, __doc__)
