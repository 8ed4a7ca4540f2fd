"""Are all weights of a saved model numbers?"""

from pathlib import Path

from finetuning.errors import UserError


def require_finite_weights(folder: Path) -> None:
    """Raises UserError for a weight that is infinite or no number."""
    if found := non_finite_weight(folder):
        file, name = found
        raise UserError(
            f"{folder / file}: {name} is not finite, so the model cannot answer; train again "
            "with a lower training.learning_rate, in another training.output_dir"
        )


def non_finite_weight(folder: Path) -> tuple[str, str] | None:
    """(file, weight) of the first that is not finite. Reads every safetensors file."""
    import torch
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118, not a dictionary
                weight = stored.get_tensor(name)
                if weight.is_floating_point() and not weight.sum(dtype=torch.float64).isfinite():
                    return file.name, name
    return None
