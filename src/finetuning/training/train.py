"""One run, from the base model to a finished run folder."""

from collections.abc import Callable
from contextlib import closing
from functools import partial

from rich.console import Console
from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback

from finetuning.data.collator import Collator
from finetuning.data.example_set import ExampleSet, PairSet
from finetuning.errors import UserError, one_line
from finetuning.evaluation.report import write_report
from finetuning.evaluation.table import print_evaluation
from finetuning.inference.generation import Asker, saved_generation_config
from finetuning.model.loading import fuse_gelu, load_model
from finetuning.model.location import adapter_folder
from finetuning.model.lora import add_adapter, lora_config
from finetuning.model.packed_models import use_packed_attention
from finetuning.model.precision import with_weight_format
from finetuning.model.response_head import require_plain_head
from finetuning.recipe.recipe import PreferenceRecipe, Recipe
from finetuning.runs.environment import recording_end, write_finish
from finetuning.runs.terminal import print_answers
from finetuning.training.answers import evaluate_trained, means, score_evaluations
from finetuning.training.callbacks import MetricsFile, ReportFile, Watchdog
from finetuning.training.library_checks import require_library_settings
from finetuning.training.loggers import log_samples
from finetuning.training.preference_trainer import PreferenceTrainer
from finetuning.training.prepared_run import PreparedRun
from finetuning.training.progress import ProgressLines
from finetuning.training.resume import resume_or_train
from finetuning.training.samples import ask_after_training
from finetuning.training.sft_config import make_arguments
from finetuning.training.signals import Stop
from finetuning.training.start_checks import StartChecks
from finetuning.training.stopping import SynchronizedStop
from finetuning.training.trainer import ResponseTrainer


def train(run: PreparedRun, stop: Stop, console: Console) -> None:
    """Trains, from the last checkpoint if there is one, and fills the run folder.

    Raises UserError where model, data, strategy and machine do not go together, Stopped where a
    signal asked for it.
    """
    trainer = make_trainer(run)
    score_evaluations(trainer, run)
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(StartChecks(trainer, run, console))
    progress = ProgressLines(console)
    trainer.add_callback(progress)
    trainer.add_callback(MetricsFile(trainer.run_folder))
    trainer.add_callback(ReportFile(trainer.run_folder))
    trainer.add_callback(Watchdog())
    trainer.add_callback(SynchronizedStop(stop, trainer))
    with recording_end(trainer.run_folder, trainer.is_world_process_zero()):
        losses = train_and_save(trainer, run, stop, progress, console)
    console.print(losses)
    console.print(f"run folder: {trainer.run_folder}")
    # As torch's manual wants: a process that leaves takes with it what another has still to receive
    # from it by NCCL.
    trainer.accelerator.end_training()


def train_and_save(
    trainer: ResponseTrainer,
    run: PreparedRun,
    stop: Stop,
    progress: ProgressLines,
    console: Console,
) -> str:
    """Fills the run folder. Returns how far the loss fell, and which weights were kept if not the
    last.
    """
    with closing(progress), stop.after_a_step():
        resume_or_train(trainer)
        losses = loss_before_and_after(trainer)
    trainer.require_finite_weights()
    trainer.require_moved_weights()
    trainer.save_trained()
    step, why = kept_step(trainer)
    samples = ask_after_training(trainer, run)
    evaluation = evaluate_trained(trainer, run)
    if trainer.is_world_process_zero():
        scores = means(evaluation) if evaluation else {}
        log_samples(run.recipe, trainer.run_folder, samples, scores, trainer.state.global_step)
        write_finish(trainer.run_folder, step)
        write_report(trainer.run_folder)
        print_answers(console, samples)
        if evaluation:
            print_evaluation(console, evaluation)
    return f"{losses}\n{why}" if why else losses


def make_trainer(run: PreparedRun) -> ResponseTrainer:
    """A trainer ready to train.

    Raises UserError where model, data and machine do not go together.
    """
    recipe, examples = run.recipe, run.examples
    args = make_arguments(recipe, has_eval=examples.eval is not None)
    require_library_settings(run, args)
    formats = {"bf16": bool(args.bf16), "fp16": args.fp16}
    base = with_weight_format(recipe, args.device, formats)
    model = load_model(base, run.tokenizer, args.seed, args.device)
    require_plain_head(model, recipe.lora)
    fuse_gelu(model)
    if recipe.data.layout == "packed":
        use_packed_attention(model)
    asker = Asker(model, run.tokenizer, run.template, recipe.generation)
    try:
        begun = adapter_folder(recipe.model)
        adapted = add_adapter(model, lora_config(recipe), args, begun)
        make, kind_of_set = trainer_of(recipe)
        return make(
            model=adapted,
            args=args,
            train_dataset=kind_of_set(examples.train),
            eval_dataset=kind_of_set(examples.eval) if examples.eval else None,
            data_collator=Collator(recipe.data.layout, run.tokenizer.pad_token_id or 0),
            processing_class=run.tokenizer,
            order=recipe.data.order,
            batch_tokens=recipe.data.batch_tokens,
            loraplus_lr_ratio=recipe.training.loraplus_lr_ratio,
            generation_config=saved_generation_config(asker),
            early_stopping=early_stopping(recipe),
        )
    except ValueError as error:  # what transformers and peft find wrong with the settings
        section = "lora" if recipe.lora else "training"
        raise UserError(f"{section}: {one_line(error)}") from error


def trainer_of(recipe: Recipe) -> tuple[Callable[..., ResponseTrainer], type[ExampleSet]]:
    """What trains on the recipe's rows, and what it has them in."""
    if not isinstance(recipe, PreferenceRecipe):
        return ResponseTrainer, ExampleSet
    return partial(PreferenceTrainer, preferences=recipe.training), PairSet


def early_stopping(recipe: Recipe) -> EarlyStoppingCallback | None:
    training = recipe.training
    if training.early_stopping_patience is None:
        return None
    threshold = training.early_stopping_threshold
    return EarlyStoppingCallback(training.early_stopping_patience, threshold)


def kept_step(trainer: ResponseTrainer) -> tuple[int, str]:
    """(step whose weights are kept, in one line why these); the last step's needs no line."""
    args, state, callback = trainer.args, trainer.state, trainer.early_stopping
    lines = []
    if callback and callback.early_stopping_patience_counter >= callback.early_stopping_patience:
        evaluations = f"{callback.early_stopping_patience} evaluation(s)"
        metric = args.metric_for_best_model
        lines.append(
            f"stopped early at step {state.global_step}: {metric} no better in {evaluations}"
        )
    if not (args.load_best_model_at_end and state.best_global_step):
        return state.global_step, "; ".join(lines)
    best = f"{args.metric_for_best_model} {state.best_metric:.4g}"
    lines.append(f"kept are the weights of step {state.best_global_step}, the best: {best}")
    return state.best_global_step, "; ".join(lines)


def loss_before_and_after(trainer: ResponseTrainer) -> str:
    """How far the loss of the evaluation set fell, evaluated anew unless that was just done with
    these weights.
    """
    if trainer.eval_dataset is None:
        return "no evaluation: data.eval is null"
    history = evaluations(trainer)
    is_done = history and history[-1]["step"] == trainer.state.global_step
    # The weights of the best step are not those of the last one.
    if not is_done or trainer.args.load_best_model_at_end:
        trainer.evaluate()
        history = evaluations(trainer)
    first, last = history[0], history[-1]
    figures = [("loss", "eval_loss", ".3f"), ("perplexity", "eval_perplexity", ".1f")]
    figures += [("reward accuracy", "eval_rewards/accuracies", ".1%")]
    figures += [("margin", "eval_rewards/margins", ".3f")]
    changes = [
        f"{name} {first[key]:{form}} -> {last[key]:{form}}{interval(last, key, form)}"
        for name, key, form in figures
        if key in last
    ]
    return f"evaluation {', '.join(changes)} ({len(trainer.eval_dataset):,} examples)"


def interval(evaluation: dict[str, float], key: str, form: str) -> str:
    """` [low, high]` of a figure that has an interval."""
    if f"{key}_low" not in evaluation:
        return ""
    return f" [{evaluation[f'{key}_low']:{form}}, {evaluation[f'{key}_high']:{form}}]"


def evaluations(trainer: ResponseTrainer) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "eval_loss" in entry]
