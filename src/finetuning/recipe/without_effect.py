"""Settings that a recipe gives and that change nothing beside its others: said, not refused."""

from collections.abc import Callable
from dataclasses import dataclass

from finetuning.recipe.recipe import PreferenceRecipe, Recipe


@dataclass(frozen=True)
class Condition:
    settings: tuple[str, ...]
    """of one section"""
    needs: str
    """what else has to be there for them to have an effect"""
    is_met: Callable[[Recipe], bool]


def has(name: str, values: tuple[str, ...]) -> Callable[[Recipe], bool]:
    """Whether a setting of `training`, or an entry of its list, is one of the values."""

    def is_met(recipe: Recipe) -> bool:
        value = getattr(recipe.training, name)
        return not {*values}.isdisjoint(value if isinstance(value, list) else [value])

    return is_met


CONDITIONS = {
    "training": (
        Condition(
            ("eval_steps",),
            "training.eval_strategy: steps",
            lambda recipe: recipe.training.eval_strategy == "steps",
        ),
        Condition(
            ("save_steps",),
            "training.save_strategy: steps",
            lambda recipe: recipe.training.save_strategy == "steps",
        ),
        Condition(
            ("logging_steps",),
            "training.logging_strategy: steps",
            lambda recipe: recipe.training.logging_strategy == "steps",
        ),
        Condition(
            ("metric_for_best_model", "greater_is_better"),
            "training.load_best_model_at_end: true, training.save_strategy: best, or "
            "training.early_stopping_patience",
            lambda recipe: (
                recipe.training.load_best_model_at_end
                or recipe.training.save_strategy == "best"
                or recipe.training.early_stopping_patience is not None
                or recipe.training.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")
            ),
        ),
        Condition(
            ("early_stopping_threshold",),
            "training.early_stopping_patience",
            lambda recipe: recipe.training.early_stopping_patience is not None,
        ),
        Condition(
            ("num_train_epochs",),
            "training.max_steps left out",
            lambda recipe: recipe.training.max_steps == -1,
        ),
        Condition(
            ("optim_target_modules",),
            "training.optim: one of galore_* and apollo_*",
            lambda recipe: recipe.training.optim.startswith(("galore", "apollo")),
        ),
        Condition(
            ("torch_compile_backend", "torch_compile_mode"),
            "training.torch_compile: true",
            lambda recipe: recipe.training.torch_compile,
        ),
        *(
            Condition((setting,), f"training.{name}: {' or '.join(values)}", has(name, values))
            for setting, name, values in (
                ("label_smoothing", "loss_type", ("robust", "exo_pair")),
                ("discopop_tau", "loss_type", ("discopop",)),
                ("f_alpha_divergence_coef", "f_divergence_type", ("alpha_divergence",)),
            )
        ),
    ),
    "lora": (
        Condition(
            ("lora_dropout",),
            "training.disable_dropout: false",
            lambda recipe: (
                not isinstance(recipe, PreferenceRecipe) or not recipe.training.disable_dropout
            ),
        ),
    ),
    "evaluation": (
        Condition(
            ("questions", "max_seconds"),
            "data.eval: there is no evaluation set",
            lambda recipe: recipe.data.eval is not None,
        ),
    ),
    "generation": (
        Condition(
            ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "seed"),
            "generation.do_sample: true",
            lambda recipe: bool(recipe.generation.do_sample),
        ),
        Condition(
            ("early_stopping", "length_penalty"),
            "generation.num_beams above 1",
            lambda recipe: (recipe.generation.num_beams or 1) > 1,
        ),
        Condition(
            ("max_cache_len", "cache_config"),
            "generation.cache_implementation",
            lambda recipe: recipe.generation.cache_implementation is not None,
        ),
    ),
}


def settings_without_effect(recipe: Recipe) -> list[str]:
    """A line for each setting that is given and does nothing, with what it would need."""
    sections = {name: getattr(recipe, name) for name in CONDITIONS}
    given = {name: each.model_fields_set if each else set() for name, each in sections.items()}
    return [
        f"{section}.{name} has no effect without {condition.needs}"
        for section, conditions in CONDITIONS.items()
        for condition in conditions
        for name in condition.settings
        if name in given[section] and not condition.is_met(recipe)
    ]
