"""The published model is asked too, and a difference is told."""

import json

import pytest
import torch
from hub_server import REPO
from rich.console import Console
from run_folders import S, copied, error_of, retrained
from transformers import AutoModelForCausalLM

import publish
from finetuning.errors import UserError
from finetuning.publishing.verification import Answer, require_agreement


def test_a_published_model_that_answers_otherwise_is_an_error_and_both_answers_are_kept(
    hub, runs, call, tmp_path
):
    run = copied(runs["full"], tmp_path / "run")

    def spoil() -> None:
        """The run folder changes while it is published."""
        model = AutoModelForCausalLM.from_pretrained(run)
        with torch.no_grad():
            model.transformer.wte.weight.copy_(-model.transformer.wte.weight)
        model.save_pretrained(run)

    hub.fault("/tag/", call=spoil)
    line = error_of(call(publish, run))
    assert "published, but 2 of 2 answers are not the run folder's; see published.json" in line
    answers = json.loads((run / "published.json").read_text())["answers"]
    assert [answer["is_same"] for answer in answers] == [False, False]


def test_sampled_answers_are_compared_greedily(hub, runs, call, tmp_path):
    run = copied(runs["full"], tmp_path / "run")
    retrained(
        run, generation__do_sample="true", generation__temperature="5.0", generation__top_k="50"
    )
    done = call(publish, run)
    assert done.code == 0 and "2 of 2 greedy answers are the run folder's" in done.out


def test_a_recipe_without_questions_is_asked_one(hub, runs, call, tmp_path):
    run = retrained(copied(runs["full"], tmp_path / "run"), generation__prompts="[]")
    assert "1 of 1 greedy answers are the run folder's" in call(publish, run).out


def test_merged_weights_may_round_an_answer_away(capsys):
    console = Console(soft_wrap=True)
    answers = [Answer("q", "same", "same"), Answer("q", "one", "two")]
    require_agreement(console, answers, is_exact=False)
    assert (
        "1 of 2 greedy answers are the run folder's (merging rounds the weights once more)"
        in capsys.readouterr().out
    )
    with pytest.raises(UserError, match="1 of 2 answers are not"):
        require_agreement(console, answers, is_exact=True)


def test_nothing_is_asked_when_that_is_said(hub, runs, call, tmp_path):
    run = copied(runs["full"], tmp_path / "run")
    assert call(publish, run, "--unasked").code == 0
    record = json.loads((run / "published.json").read_text())
    assert record["answers"] == [] and (record["repo"], record["subfolder"]) == (REPO, S)
