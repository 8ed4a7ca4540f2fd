"""What is published is asked in every form, and a difference is told."""

import json
import os

import pytest
from hub_server import REPO
from publications import BOTH, names
from rich.console import Console
from run_folders import BASE, S, copied, error_of, files_below, retrained

import publish
from finetuning.errors import UserError
from finetuning.export.exported import Trained
from finetuning.inference.agreement import Answer, ask_greedily
from finetuning.publishing import verification
from finetuning.publishing.bundle import gather
from finetuning.publishing.commit import Published
from finetuning.publishing.stock_transformers import ask_server, can_serve
from finetuning.publishing.verification import Form, check_published, require_agreement
from finetuning.runs.folder import RunFolder


def test_a_model_that_answers_otherwise_is_not_published(hub, runs, call, tmp_path, monkeypatch):
    run = copied(runs["full"], tmp_path / "run")
    wrong = ["something else"] * 2
    with monkeypatch.context() as patch:
        others = iter([wrong, ["It is", "another"]])
        patch.setattr(verification, "ask_greedily", lambda *_, **__: next(others))
        patch.setattr(verification, "ask_others", lambda *_: [])
        done = call(publish, run)
    assert "not published: 2 of 2 answers are not the run folder's; --unasked" in error_of(done)
    assert "run folder: something else" in done.out and "published:  another" in done.out
    assert names(hub) == set() and not (run / "published.json").exists()


def test_every_form_is_asked_and_the_card_says_which_answer_alike(hub, runs, call, tmp_path):
    run = copied(runs["lora"], tmp_path / "run")
    hub.create(BASE)
    hub.put(BASE, files_below(runs["full"].parents[1] / "llama"))
    done = call(publish, run, *BOTH)
    assert done.code == 0, done.err
    record = json.loads((run / "published.json").read_text())
    forms = ["published", "adapter on its base model", "transformers", "transformers' pipeline"]
    served = ["transformers serve"] if can_serve() else []
    assert list(record["forms"]) == [*forms, *served]
    assert all(form == {"asked": 2, "same": 2} for form in record["forms"].values())
    card = hub.read(REPO, f"{S}/README.md").decode()
    for form in ("`src/generate.py`", "`model.generate` of transformers", *forms[3:], *served):
        assert f"| {form} | 2 of 2 |" in card
    assert record["tag"] == "chapter05.sft_model.v1" and f'revision="{record["tag"]}"' in card

    again = call(publish, run, *BOTH)
    assert again.code == 0 and "unchanged: " in again.out
    known = call(publish, run, *BOTH, "--unasked")  # the same files were asked before
    assert known.code == 0 and "unchanged: " in known.out
    assert list(hub.tags(REPO)) == [record["tag"]]


def test_transformers_serve_is_asked_and_answers_as_the_run_folder(runs, tmp_path):
    if "CI" not in os.environ and not can_serve():
        pytest.skip("transformers serve is not installed (pip install 'transformers[serving]')")
    run = RunFolder(runs["full"])
    questions = ["What is 3 + 1?", "日本の首都はどこですか？"]
    served = ask_server(Trained(run, run.recipe), questions)
    assert served == ask_greedily(run.path, run.recipe, questions)


def test_what_was_committed_has_to_be_what_was_asked(hub, runs, call, tmp_path):
    run = copied(runs["full"], tmp_path / "run")
    assert call(publish, run, "--unasked").code == 0
    bundle = gather(RunFolder(run), RunFolder(run).recipe, None)
    published = Published(bundle.address._replace(revision=hub.head(REPO)), "v1", is_new=True)
    check_published(bundle, published)
    (run / "samples.md").write_text("# Other\n")
    other = gather(RunFolder(run), RunFolder(run).recipe, None)
    with pytest.raises(UserError, match=r"samples\.md is not the file that was asked"):
        check_published(other, published)


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
    forms = [Form("published", answers)]
    require_agreement(console, forms, is_exact=False)
    assert (
        "1 of 2 greedy answers are the run folder's (merging rounds the weights once more)"
        in capsys.readouterr().out
    )
    with pytest.raises(UserError, match="1 of 2 answers are not"):
        require_agreement(console, forms, is_exact=True)


def test_nothing_is_asked_when_that_is_said(hub, runs, call, tmp_path):
    run = copied(runs["full"], tmp_path / "run")
    assert call(publish, run, "--unasked").code == 0
    record = json.loads((run / "published.json").read_text())
    assert record["answers"] == [] and (record["repo"], record["subfolder"]) == (REPO, S)
