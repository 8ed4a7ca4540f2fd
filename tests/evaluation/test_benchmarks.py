"""src/evaluate.py --tasks: the numbers of an independent script, with the trained prompt."""

import json
import re
import sys

import pytest
import torch
from pages import block
from run_folders import LORA, error_of, train
from tiny import write_base
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import evaluate
from finetuning.evaluation import benchmarks, recipe_lm

QUESTIONS, TASK = 8, "sums"
CHOICES = """
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: gold
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
GENERATED = """
output_type: generate_until
doc_to_target: "{{choices[gold]}}"
generation_kwargs: {until: ["!"], do_sample: false, max_gen_toks: 9}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def write_task(tmp_path_factory):
    """A function that writes a task in the form that the runs were trained on; nobody has it."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = folder / "rows.jsonl"
    lines = [
        {
            "question": f"What is {n} + 1?",
            "choices": [f"It is {n + m}." for m in range(3)],
            "gold": 1,
        }
        for n in range(12)
    ]
    rows.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")

    def write(settings: str, name: str = TASK, **more: str) -> str:
        file = folder / f"{name}.yaml"
        data = {"test": str(rows), "train": str(rows)}
        said = {"doc_to_text": "{{question}}", "fewshot_split": "train", **more}
        file.write_text(
            f"task: {name}\ndataset_path: json\ntest_split: test\nmetadata: {{version: 1.0}}\n"
            f"dataset_kwargs: {json.dumps({'data_files': data})}\n{settings}\n"
            + "".join(f"{key}: {json.dumps(value)}\n" for key, value in said.items()),
            encoding="utf-8",
        )
        return str(file)

    return write


@pytest.fixture(scope="module")
def bloom(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bloom")
    lora = LORA.replace("q_proj, v_proj", "query_key_value")
    return train(folder / "bloom" / "run", write_base(folder / "base", "bloom"), lora)


def asked(folder, *arguments):
    """(tasks.json, lines of tasks.jsonl)"""
    evaluate.main([*map(str, arguments), "--questions", str(QUESTIONS), "--output", str(folder)])
    lines = (folder / "tasks.jsonl").read_text(encoding="utf-8").splitlines()
    return json.loads((folder / "tasks.json").read_text("utf-8")), list(map(json.loads, lines))


class Independent:
    """The same by transformers alone, a request at a time, from the text that is trained on."""

    def __init__(self, run, in_8_bit=False):
        self.tokenizer = AutoTokenizer.from_pretrained(run)
        more = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)} if in_8_bit else {}
        self.model = AutoModelForCausalLM.from_pretrained(run, **more).eval()

    def ids(self, text):
        return self.tokenizer(text, add_special_tokens=False).input_ids

    @torch.no_grad()
    def log_likelihood(self, question, choice):
        prompt = self.ids(f"### Question: {question}\n### Answer:")
        response = self.ids(f" {choice}")
        logits = self.model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        nats = logits.log_softmax(-1)[range(len(response)), response].sum()
        return float(nats), logits.argmax(-1).tolist() == response

    def generate(self, question, tokens, until):
        prompt = self.ids(f"### Question: {question}\n### Answer:")
        settings = {"max_new_tokens": tokens, "do_sample": False, "repetition_penalty": 1.0}
        output = self.model.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :]
        text = self.tokenizer.decode(output, skip_special_tokens=True)
        return text.removeprefix(" ").split(until)[0]


@pytest.mark.parametrize("kind", ["full", "bloom", "lora", "lora in 8 bit"])
def test_every_request_has_the_log_likelihood_of_an_independent_script(
    kind, runs, bloom, write_task, tmp_path
):
    in_8_bit = kind.endswith("8 bit")
    run = {**runs, "bloom": bloom}[kind.partition(" ")[0]]
    precision = ["model.quantization=8bit"] if in_8_bit else []
    summary, lines = asked(tmp_path, run, "--no-base", "--tasks", write_task(CHOICES), *precision)
    independent, right = Independent(run, in_8_bit), []
    assert len(lines) == QUESTIONS
    for number, line in enumerate(lines):
        expected = [
            independent.log_likelihood(f"What is {number} + 1?", f"It is {number + m}.")
            for m in range(3)
        ]
        found = [answer for ((answer,),) in zip(line["responses"][str(run)], strict=True)]
        assert [nats for nats, _ in found] == pytest.approx(
            [nats for nats, _ in expected], rel=1e-2 if in_8_bit else 1e-5
        )
        assert in_8_bit or [greedy for _, greedy in found] == [greedy for _, greedy in expected]
        right.append(max(range(3), key=lambda choice: found[choice][0]) == 1)
    score = summary["scores"][TASK]["acc,none"][str(run)]
    assert score["value"] == pytest.approx(sum(right) / QUESTIONS)
    assert score["low"] <= score["value"] <= score["high"]


def test_what_is_generated_is_what_an_independent_script_generates(runs, write_task, tmp_path):
    run, task = runs["full"], write_task(GENERATED, "written")
    summary, lines = asked(tmp_path, run, "--tasks", task)
    independent = Independent(run)
    said = [line["responses"][str(run)][0][0] for line in lines]
    assert said == [independent.generate(f"What is {n} + 1?", 9, "!") for n in range(QUESTIONS)]
    right = sum(text == f"It is {n + 1}." for n, text in enumerate(said))
    scores = summary["scores"]["written"]["exact_match,none"]
    assert scores[str(run)]["value"] == pytest.approx(right / QUESTIONS)
    base, trained = summary["names"]
    assert base.startswith("base model") and trained == str(run)
    assert summary["differences"]["written"]["exact_match,none"].keys() == {trained}


@pytest.fixture
def prompts(monkeypatch, runs, write_task, tmp_path):
    """A function that returns the texts that the model reads."""

    def read(task, *arguments):
        seen = []
        plain = recipe_lm.RecipeLM.answer

        def answer(self, kind, requests, act):
            seen.extend(self.asker.tokenizer.decode(each.ids) for each in requests)
            return plain(self, kind, requests, act)

        monkeypatch.setattr(recipe_lm.RecipeLM, "answer", answer)
        asked(tmp_path, runs["full"], "--no-base", "--tasks", task, *arguments)
        return seen

    return read


def test_examples_are_turns_or_stand_in_the_prompt(prompts, write_task, tmp_path):
    task = write_task(GENERATED, "shots", description="Add.", target_delimiter=" -> ")
    few = ("--num-fewshot", "1")
    first = prompts(task, *few)[0]
    assert first.startswith("Add.\n### Question: What is ") and first.endswith("\n### Answer:")
    assert first.count("### Question: ") == 2 and "<|endoftext|>\n### Question" in first
    (tmp_path / "tasks.json").unlink()
    first = prompts(task, *few, "--fewshot-in-prompt", "--system", "Be brief.")[0]
    assert first.startswith("Be brief.") and "Add." in first
    assert first.count("### Question: ") == 1 and " -> It is" in first


def test_a_response_that_is_begun_is_continued(prompts, write_task):
    task = write_task(CHOICES, "begun", gen_prefix="Sum: ")
    assert prompts(task)[1] == "### Question: What is 0 + 1?\n### Answer: Sum: It is 1."


def test_as_is_is_lm_evals_own_way(runs, write_task, tmp_path, capsys):
    run, task = runs["full"], write_task(CHOICES)
    summary, lines = asked(tmp_path, run, "--no-base", "--tasks", task, "--as-is")
    as_is = f"{run}, as is"
    assert summary["names"] == [str(run), as_is]
    assert lines[0]["arguments"][as_is][0] == ["What is 0 + 1?", " It is 0."]
    assert "as is" in capsys.readouterr().out
    difference = summary["differences"][TASK]["acc,none"][as_is]["mean"]
    values = [summary["scores"][TASK]["acc,none"][name]["value"] for name in summary["names"]]
    assert difference == pytest.approx(values[1] - values[0])


def test_killed_it_is_resumed_and_leaves_the_same_files(runs, write_task, tmp_path, monkeypatch):
    arguments = [
        runs["full"],
        "--tasks",
        f"{write_task(CHOICES)},{write_task(GENERATED, 'written')}",
    ]
    asked(tmp_path / "whole", *arguments)
    plain = benchmarks.keeper

    def killing(unfinished, model):
        keep = plain(unfinished, model)

        def keep_and_die(results):
            keep(results)
            raise KeyboardInterrupt

        return keep_and_die

    for _ in range(5):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(benchmarks, "keeper", killing)
            asked(tmp_path / "killed", *arguments)
    asked(tmp_path / "killed", *arguments)
    for name in ("tasks.json", "tasks.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "killed" / "unfinished_tasks.jsonl").exists()


def test_import_evaluate_is_the_librarys(tmp_path, monkeypatch):
    (tmp_path / "evaluate.py").write_text("OF_A_LIBRARY = True")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    with benchmarks.library_named_evaluate():
        import evaluate as found

        assert found.OF_A_LIBRARY
    assert sys.modules["evaluate"] is evaluate


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ("task: x\ndataset_path: nobody/has_this\ntest_split: test", "nobody/has_this"),
        (CHOICES + "unsafe_code: true", "runs programs that the model wrote"),
        ("output_type: loglikelihood_rolling\ndoc_to_target: question", "without a prompt"),
    ],
)
def test_a_task_that_cannot_be_asked_is_one_line(settings, says, runs, write_task, call, tmp_path):
    if settings.startswith("task"):
        task = tmp_path / "x.yaml"
        task.write_text(settings + CHOICES + "doc_to_text: question")
    else:
        task = write_task(settings, "refused")
    assert says in error_of(call(evaluate, runs["full"], "--tasks", task))


def test_the_task_of_the_page_asks_its_choices(runs, tmp_path):
    choices = {f"choice{n}": f"No. {n}" for n in range(5)}
    rows = [{"question": f"Which is {n}?", **choices, "label": n % 5} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    task = block("docs/evaluation.md", "Benchmarks", "yaml")
    files = dict.fromkeys(("train", "validation"), str(tmp_path / "rows.jsonl"))
    local = f"dataset_path: json\ndataset_kwargs: {json.dumps({'data_files': files})}"
    (tmp_path / "task.yaml").write_text(re.sub("dataset_path: .*", local, task), encoding="utf-8")
    arguments = [runs["full"], "--no-base", "--tasks", tmp_path / "task.yaml"]
    _, lines = asked(tmp_path / "out", *arguments)
    (conversation, response) = lines[3]["arguments"][str(runs["full"])][2]
    assert json.loads(conversation) == [{"role": "user", "content": "Which is 3?"}]
    assert response == "No. 2" and lines[3]["target"] == 3


def test_an_unknown_task_or_a_missing_extra_is_one_line(runs, write_task, call, monkeypatch):
    from lm_eval.tasks import TaskManager

    task = write_task(CHOICES)  # of all the tasks of lm-eval: reading those takes many seconds
    manager = TaskManager(include_path=task.rpartition("/")[0], include_defaults=False)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda include_defaults: manager)
    line = error_of(call(evaluate, runs["full"], "--tasks", "summs"))
    assert "no task summs in lm-eval, and no such file; did you mean sums?" in line
    monkeypatch.setattr(benchmarks, "installed", lambda package: None)
    assert "pip install" in error_of(call(evaluate, runs["full"], "--tasks", task))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--as-is"], "--as-is needs --tasks"),
        (["--tasks", "x", "--at-least", "chrf=3"], "--at-least goes without --tasks"),
        (["--tasks", "x", "--num-fewshot", "-1"], "--num-fewshot -1: expected 0 or more"),
    ],
)
def test_flags_that_do_not_go_together_are_one_line(arguments, says, runs, call):
    assert says in error_of(call(evaluate, runs["full"], *arguments))
