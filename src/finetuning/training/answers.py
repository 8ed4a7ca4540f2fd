"""The evaluation set's questions, answered by the base and by the trained model."""

from statistics import fmean
from typing import Any

from rich.console import Console

from finetuning.errors import UserError
from finetuning.evaluation.asking import Answers, Share, ask
from finetuning.evaluation.results import (
    BASE,
    TRAINED,
    answer_lines,
    answer_record,
    known_answers,
    results_of,
    summary,
    turn_record,
    write_answers,
    write_evaluation,
)
from finetuning.evaluation.scores import BETTER_IF_HIGHER, SCORES
from finetuning.evaluation.turns import Turn, draw, turns_of
from finetuning.inference.generation import Asker
from finetuning.runs.folder import ANSWERS
from finetuning.runs.metrics import append_metrics, read_lines
from finetuning.training.prepared_run import PreparedRun
from finetuning.training.trainer import ResponseTrainer


def evaluate_base(trainer: ResponseTrainer, run: PreparedRun, console: Console) -> None:
    """Writes answers.jsonl with the answers of the untrained model."""
    every = evaluation_turns(run)
    turns = draw(every, run.recipe.evaluation.questions)
    if not turns:
        return
    seconds = run.recipe.evaluation.max_seconds
    console.print(
        f"answers  {len(turns):,} of {len(every):,} evaluation questions, before and after, "
        f"{seconds:g} s each at most"
    )
    if trainer.answer_scores:
        console.print("         and at each evaluation, for training.metric_for_best_model")
    answers = ask(asker_of(trainer, run), turns, share_of(trainer, run), seconds)
    if trainer.is_world_process_zero():
        lines = [
            turn_record(turn) | {"answers": {BASE: answer_record(answers[turn.key])}}
            for turn in turns
            if turn.key in answers
        ]
        write_answers(trainer.run_folder, lines)


def evaluate_trained(trainer: ResponseTrainer, run: PreparedRun) -> dict[str, Any] | None:
    """The same questions again: writes answers.jsonl with both answers, and evaluation.json.

    Returns what that holds. None without questions, and in processes other than the first.
    """
    every = evaluation_turns(run)
    turns = draw(every, run.recipe.evaluation.questions)
    if not turns:
        return None
    share = share_of(trainer, run)
    base = share.of_first(base_answers(trainer))
    before = [turn for turn in turns if turn.key in base] or turns
    seconds = run.recipe.evaluation.max_seconds
    trained = ask(asker_of(trainer, run), before, share, seconds * (2 if base else 1))
    if not trainer.is_world_process_zero():
        return None
    results = results_of(before, {BASE: base, TRAINED: trained} if base else {TRAINED: trained})
    if not results.turns:
        return None
    evaluation = summary(results, len(every), losses=losses_of(trainer))
    write_answers(trainer.run_folder, answer_lines(results))
    write_evaluation(trainer.run_folder, evaluation)
    figures = {f"eval_{name}": value for name, value in means(evaluation).items()}
    append_metrics(trainer.run_folder, {**figures, "step": trainer.state.global_step})
    return evaluation


def score_evaluations(trainer: ResponseTrainer, run: PreparedRun) -> None:
    """Has each evaluation ask its questions, where a score of the answers decides which is best."""
    metric = (trainer.args.metric_for_best_model or "").removeprefix("eval_")
    if metric not in BETTER_IF_HIGHER:
        return
    turns = draw(evaluation_turns(run), run.recipe.evaluation.questions)

    def scores_now() -> dict[str, float]:
        share = share_of(trainer, run)
        base = share.of_first(base_answers(trainer))
        # As many as there was time for before training: always the same ones.
        asked = [turn for turn in turns if turn.key in base] or turns
        results = results_of(asked, {TRAINED: ask(asker_of(trainer, run), asked, share)})
        if not results.turns:
            raise UserError(
                f"training.metric_for_best_model: no question can be asked for {metric}"
            )
        return {name: fmean(results.values(TRAINED, name)) for name in SCORES}

    trainer.answer_scores = scores_now


def means(evaluation: dict[str, Any]) -> dict[str, float]:
    """Of the trained model, by score."""
    return {name: score["mean"] for name, score in evaluation["scores"][TRAINED].items()}


def base_answers(trainer: ResponseTrainer) -> Answers:
    """What was answered before training; nothing in a run that an earlier version began."""
    return known_answers(read_lines(trainer.run_folder / ANSWERS), BASE)


def evaluation_turns(run: PreparedRun) -> list[Turn]:
    if run.examples.eval is None or run.recipe.evaluation.questions == 0:
        return []
    return turns_of(run.recipe.data, run.examples.eval.rows.tolist())


def asker_of(trainer: ResponseTrainer, run: PreparedRun) -> Asker:
    return Asker(trainer.model, run.tokenizer, run.template, run.recipe.generation)


def share_of(trainer: ResponseTrainer, run: PreparedRun) -> Share:
    args = trainer.args
    return Share(args.process_index, args.world_size, run.strategy.is_sharded)


def losses_of(trainer: ResponseTrainer) -> dict[str, dict[str, float]]:
    """Loss, perplexity and token accuracy of the whole evaluation set, before and after; of pairs,
    loss, accuracy and margin of the rewards with the ends of their 95 % intervals.
    """
    history = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    names = (
        *("eval_loss", "eval_perplexity", "eval_mean_token_accuracy"),
        *("eval_rewards/accuracies", "eval_rewards/accuracies_low", "eval_rewards/accuracies_high"),
        *("eval_rewards/margins", "eval_rewards/margins_low", "eval_rewards/margins_high"),
    )
    pairs = {BASE: history[0], TRAINED: history[-1]} if history else {}
    return {
        model: {name: entry[name] for name in names if name in entry}
        for model, entry in pairs.items()
    }
