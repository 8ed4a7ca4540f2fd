"""What a person can get wrong is refused in one line, before torch is imported."""

import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import RECIPE, ROOT, ROWS, assert_one_line, write_files
from tiny import byte_level

SCRATCH = RECIPE[RECIPE.index("  from_scratch") : RECIPE.index("data:")]

PREVIEW = "preview.py FOLDER/recipe.yaml"
TRAIN = "sft.py FOLDER/recipe.yaml"


def case(name, *words, command=PREVIEW, override=None, recipe=RECIPE, files=()):
    """A command that must fail, and what its message must hold; FOLDER as in write_files."""
    files = {"recipe.yaml": recipe, "rows.jsonl": ROWS, **dict(files)}
    script, *arguments = command.split()
    return pytest.param(
        words,
        files,
        script,
        arguments + ([override] if override else []),
        id=name.replace(" ", "_"),
    )


def override(name, text, *words):
    return case(name, f"override {text!r}: ", *words, override=text)


def edit(name, old, new, *words):
    assert RECIPE.count(old) == 1, old
    return case(name, *words, recipe=RECIPE.replace(old, new))


def data(name, file, content, *words, more=""):
    command = f"{PREVIEW} data.path=FOLDER/{file} {more}"
    return case(name, f"FOLDER/{file}", *words, files={file: content}, command=command)


MISSPELT = [
    edit(
        "section",
        "training:",
        "trainning:",
        "recipe.yaml:10: ",
        "unknown key trainning",
        "did you mean training?",
    ),
    edit(
        "key",
        "max_length:",
        "max_lenght:",
        "recipe.yaml:9: ",
        "data.max_lenght",
        "did you mean data.max_length?",
    ),
    edit(
        "key two deep",
        "vocab_size:",
        "vocabsize:",
        "recipe.yaml:3: ",
        "did you mean model.from_scratch.vocab_size?",
    ),
    edit(
        "library's key",
        "max_steps:",
        "max_step:",
        "recipe.yaml:12: ",
        "did you mean training.max_steps?",
    ),
    edit(
        "key in a list",
        "FOLDER/rows.jsonl",
        "[{path: a, readr: dolly}]",
        "data.path.0.readr",
        "data.path.0.reader?",
    ),
    override(
        "section in an override",
        "traning.max_steps=1",
        "unknown key traning",
        "did you mean training?",
    ),
    override(
        "key in an override",
        "data.max_lenght=9",
        "data.max_lenght",
        "did you mean data.max_length?",
    ),
    override("key two deep in an override", "data.eval.evry=5", "did you mean data.eval.every?"),
    override(
        "lora field that does not exist",
        "lora.rank=8",
        "unknown key lora.rank",
        "nearest are",
        "rank_pattern",
    ),
    override(
        "generation field that does not exist",
        "generation.temprature=1",
        "did you mean generation.temperature?",
    ),
    override("key of another section", "training.prompts=[a]", "did you mean generation.prompts?"),
    case(
        "two at once",
        "data.maxlength",
        "(and 1 more: data.lay)",
        command=f"{PREVIEW} data.maxlength=9 data.lay=packed",
    ),
]

RENAMED = [
    override("torch_dtype", "model.torch_dtype=float32", "write model.dtype"),
    override("max_seq_length", "training.max_seq_length=64", "write data.max_length"),
    override("warmup_ratio", "training.warmup_ratio=0.1", "write training.warmup_steps"),
    override(
        "evaluation_strategy", "training.evaluation_strategy=epoch", "write training.eval_strategy"
    ),
    override(
        "overwrite_output_dir", "training.overwrite_output_dir=true", "another training.output_dir"
    ),
    override(
        "gradient_checkpointing",
        "training.gradient_checkpointing=true",
        "write training.activation_checkpointing",
    ),
    override(
        "gradient_checkpointing_kwargs",
        "training.gradient_checkpointing_kwargs={use_reentrant: false}",
        "write training.activation_checkpointing_kwargs",
    ),
    edit(
        "renamed key in the file",
        "max_steps: 2",
        "warmup_ratio: 0.1",
        "recipe.yaml:12: ",
        "training.warmup_steps",
    ),
]

OWNED_ELSEWHERE = [
    override("training.max_length", "training.max_length=64", "belongs to data.max_length"),
    override("training.packing", "training.packing=true", "belongs to data.layout"),
    override("training.eval_on_start", "training.eval_on_start=false", "belongs to data.eval: "),
    override(
        "training.average_tokens",
        "training.average_tokens_across_devices=false",
        "belongs to the loss: ",
    ),
    override("training.push_to_hub", "training.push_to_hub=true", "belongs to the publish section"),
    override(
        "training.deepspeed", "training.deepspeed=zero3.json", "belongs to accelerate_configs/"
    ),
    override("lora.task_type", "lora.task_type=CAUSAL_LM", "lora.task_type belongs to"),
    override(
        "generation.num_return_sequences",
        "generation.num_return_sequences=2",
        "belongs to src/generate.py: ",
    ),
    override(
        "generation.return_dict",
        "generation.return_dict_in_generate=true",
        "belongs to src/generate.py: ",
    ),
    override(
        "generation.is_assistant", "generation.is_assistant=true", "belongs to src/generate.py: "
    ),
    override(
        "generation.stop_strings", "generation.stop_strings=[a]", "belongs to data.template: "
    ),
    override(
        "generation.max_length", "generation.max_length=64", "belongs to generation.max_new_tokens"
    ),
]

WRONG_VALUES = [
    override("negative warmup", "training.warmup_steps=-1", "expected at least 0"),
    override("clip norm that would be ignored", "training.max_grad_norm=-1", "at least 0"),
    override("rate that trains NaN", "training.learning_rate=1e9", "expected at most 10"),
    override("decay that is no number", "training.weight_decay=.nan", "expected a finite number"),
    override("weight without end", "data.weight=.inf", "data.weight", "expected a finite number"),
    override("seed below 0", "data.eval={fraction: 0.5, seed: -1}", "data.eval.seed is -1"),
    override("beta of 2", "training.adam_beta1=2", "expected less than 1"),
    override("epsilon below 0", "training.adam_epsilon=-1", "expected greater than 0"),
    override("scale of nothing", "lora.lora_alpha=0", "expected at least 1"),
    override("everything dropped out", "lora.lora_dropout=1", "expected less than 1"),
    override("more than all", "generation.top_p=5", "expected at most 1"),
    override("batch without end", "training.global_batch_size=9223372036854775808", "at most"),
    override("step without end", "training.gradient_accumulation_steps=1000000000000", "at most"),
    override("text for a number", "training.learning_rate=fast", 'is "fast"; expected a number'),
    override("true for a number", "training.learning_rate=true", "is true; expected a number"),
    override("2.5 for a whole number", "training.max_steps=2.5", "is 2.5; expected a whole number"),
    override(
        "true for a whole number", "training.max_steps=true", "is true; expected a whole number"
    ),
    override("number for text", "data.newline=3", "data.newline is 3; expected text"),
    override("text for a list", "generation.prompts=hello", 'is "hello"; expected a list'),
    override("list for a section", "training=[1]", "training is [1]; expected a mapping"),
    override("nothing for a section", "training=", "training is null; expected a mapping"),
    override("list for a mapping", "data.where=[context]", 'is ["context"]; expected a mapping'),
    override(
        "list of bare paths", "data.path=[a.jsonl]", 'data.path.0 is "a.jsonl"; expected a mapping'
    ),
    override("empty list of paths", "data.path=[]", "data.path is []", "not empty"),
    override("empty path", 'data.path=""', 'data.path is ""', "not empty"),
    override(
        "empty output folder", 'training.output_dir=""', "training.output_dir is", "not empty"
    ),
    override("number too small", "data.max_length=1", "data.max_length is 1; expected at least 2"),
    override(
        "share above one",
        "data.eval.fraction=1.5",
        "data.eval.fraction is 1.5; expected less than 1",
    ),
    override(
        "reader that does not exist",
        "data.reader=doly",
        "allowed are dolly, alpaca",
        "did you mean dolly?",
    ),
    override(
        "template that does not exist",
        "data.template=quesion_answer",
        "did you mean question_answer?",
    ),
    override(
        "library's choice",
        "training.save_strategy=epochs",
        "no, steps, epoch, best",
        "did you mean epoch?",
    ),
    override(
        "logger that does not exist",
        "training.report_to=tensorbord",
        "kubeflow",
        "did you mean tensorboard?",
    ),
    case(
        "logger in a list",
        'training.report_to.0 is "tensorbord"; allowed are none, ',
        "kubeflow, ",
        "did you mean tensorboard?",
        command="sft.py --check FOLDER/recipe.yaml training.report_to=[tensorbord,wandb]",
    ),
    override(
        "repository without owner",
        "publish={repo: models, subfolder: a}",
        "publish.repo",
        "owner/name",
    ),
    override(
        "two ways to hold out",
        "data.eval={every: 5, split: test}",
        "exactly one of every, fraction and split",
    ),
    override(
        "no way to hold out", "data.eval={}", "data.eval: exactly one of every, fraction and split"
    ),
    override("seed without draw", "data.eval={every: 5, seed: 1}", "seed belongs to fraction"),
    edit(
        "held out what is trained on",
        "max_length: 64",
        "eval: {split: train}",
        "eval.split train",
        "another split",
    ),
    edit(
        "two base models",
        "model:",
        "model:\n  name: gpt2",
        "recipe.yaml:1: ",
        "exactly one of name and from_scratch",
    ),
    edit(
        "chat without a base model",
        "question_answer",
        "chat",
        "data.template: chat",
        "from_scratch",
    ),
    edit(
        "session numbers for another reader",
        "max_length",
        "sessions: 3\n  max_length",
        "sessions belongs to reader",
    ),
    case(
        "GPU that is not known",
        "--gpu t5: unknown; allowed are t4, l4",
        command=f"{PREVIEW} --gpu t5",
    ),
    case(
        "flag that is not known",
        "unrecognized arguments: --graphics t4; usage: ",
        "[--gpu GPU] [--config_file",
        command=f"{PREVIEW} --graphics t4",
    ),
    override("no section", "max_steps=3", "did you mean training.max_steps=3?"),
    override("no section and no such key", "lr=3", "such as", "training.learning_rate="),
    override("stray word", "quick", "expected section.key=value"),
    case(
        "flag misspelt behind the recipe",
        "unrecognized arguments: --chek; usage: ",
        command=f"{TRAIN} --chek",
    ),
    case(
        "flag of generate that is not known",
        "unrecognized arguments: --graphics",
        command="generate.py FOLDER/run --graphics Hi",
    ),
    case(
        "flag without a value", "argument --gpu: expected one argument", command=f"{PREVIEW} --gpu"
    ),
    *(
        case(
            f"{count} processes",
            f"--num_processes {count}: expected a",
            command=f"{PREVIEW} --num_processes={count}",
        )
        for count in ("0", "-1", "²")
    ),
    case(
        "processes that are no number",
        "--num_processes two: expected a",
        command=f"{PREVIEW} --num_processes=two",
    ),
    case(
        "smaller micro-batches of tokens",
        "training.auto_find_batch_size makes micro-batches of fewer examples",
        command=f"{PREVIEW} training.auto_find_batch_size=true data.batch_tokens=64",
    ),
    override(
        "bits that do not exist",
        "model.quantization=16bit",
        "allowed are 8bit, 4bit",
        "did you mean",
    ),
    edit(
        "bits of random weights",
        "model:",
        "model:\n  quantization: 8bit",
        "model: quantization needs name",
    ),
    case(
        "bits without an adapter",
        "recipe.yaml: ",
        "model.quantization: 8bit weights cannot be trained",
        "add a lora section",
        recipe=RECIPE.replace(SCRATCH, "  name: FOLDER\n  quantization: 8bit\n"),
    ),
    override("override without value", "training.max_steps", "expected section.key=value"),
    override("override without section", "max_steps=3", "expected section.key=value"),
    override(
        "override below a value",
        "data.reader.name=x",
        'data.reader is "prompt_response", it has no keys',
    ),
    override("override that is not YAML", "generation.prompts=[a", "the value is not YAML"),
    case(
        "value in a section that an override replaced",
        "override 'data.eval={every: 1}': data.eval.every is 1",
        recipe=RECIPE.replace("max_length: 64", "eval: {every: 5}"),
        override="data.eval={every: 1}",
    ),
    case(
        "override is not blamed for what the file lacks",
        "recipe.yaml:5: data.template is missing",
        recipe=RECIPE.replace("  template: question_answer\n", ""),
        override="data.max_length=32",
    ),
]

WRONG_FILES = [
    edit(
        "section missing",
        RECIPE[RECIPE.index("training:") :],
        "",
        "recipe.yaml: training is missing",
    ),
    edit(
        "field missing",
        "  output_dir: FOLDER/run\n",
        "",
        "recipe.yaml:10: training.output_dir is missing",
    ),
    edit(
        "choice missing",
        "  template: question_answer\n",
        "",
        "data.template is missing; allowed are",
        "plain_chat",
    ),
    edit(
        "reader missing",
        "  reader: prompt_response\n",
        "",
        "reader is missing for FOLDER/rows.jsonl",
        "sharegpt",
    ),
    edit(
        "duplicate key",
        "  max_steps: 2\n",
        "  max_steps: 2\n  max_steps: 3\n",
        "recipe.yaml:13: ",
        "duplicate key",
    ),
    edit("tab", "  max_length: 64", "\tmax_length: 64", "recipe.yaml:9: is not YAML"),
    edit("bracket not closed", "n_positions: 64}", "n_positions: 64", "recipe.yaml:5: is not YAML"),
    edit("placeholder", "vocab_size: 300", "vocab_size: {{ size }}", "recipe.yaml:3: is not YAML"),
    edit("key that is a list", "model:", "? [a, b]\n: 1\nmodel:", "recipe.yaml: "),
    edit(
        "alias inside itself",
        "{model_type: gpt2,",
        "&a {a: *a,",
        "is an alias; write out what it stands for",
    ),
    case("not UTF-8", "FOLDER/recipe.yaml: is not UTF-8", recipe=RECIPE.encode() + b"# caf\xe9\n"),
    case("control character", "FOLDER/recipe.yaml: is not YAML", recipe=RECIPE + "# \x07\n"),
    case(
        "empty recipe",
        "FOLDER/recipe.yaml: a recipe is a mapping of model, data",
        "found null",
        recipe="",
    ),
    case(
        "recipe that is a list",
        "FOLDER/recipe.yaml: a recipe is a mapping",
        'found ["model"]',
        recipe="- model\n",
    ),
    case(
        "two documents",
        "recipe.yaml:13: is not YAML",
        "another document",
        recipe=RECIPE + "---\na: 1\n",
    ),
    case("recipe that is a folder", "FOLDER: is a folder", command="preview.py FOLDER"),
    case(
        "recipe that is missing",
        "recip.yaml: no such",
        "mean FOLDER/recipe.yaml?",
        command="preview.py FOLDER/recip.yaml",
    ),
    case(
        "recipe in no folder",
        "nowhere/recipe.yaml: no such recipe",
        command="preview.py nowhere/recipe.yaml",
    ),
]

ROBOT = [{"messages": [{"role": role, "content": "a"}]} for role in ("user", "robot")]
SESSIONS = {"Session-1": {"scene": "a", "dialogue": ["no colon"]}}

WRONG_ROWS = [
    data(
        "row without the column",
        "a.jsonl",
        ROWS + '{"prompt": "a"}',
        "row 2: column response",
        "found nothing",
    ),
    data(
        "row of another type",
        "a.jsonl",
        ROWS + '{"prompt": 5, "response": "a"}\n',
        "row 2: column prompt",
        "int 5",
    ),
    data(
        "rows of another format",
        "a.jsonl",
        '{"text": "a"}\n',
        "row 0: column prompt",
        "the row has text",
    ),
    data(
        "rows of another reader",
        "a.jsonl",
        ROWS,
        "row 0: column messages",
        "has prompt",
        more="data.reader=messages",
    ),
    data(
        "role",
        "a.json",
        json.dumps(ROBOT),
        "row 1: ",
        "turn 0: unknown role str 'robot'",
        more="data.reader=messages",
    ),
    data(
        "sessions that are none",
        "a.json",
        "[]",
        "object of sessions",
        more="data.reader=harry_potter",
    ),
    data(
        "no speaker",
        "a.json",
        json.dumps(SESSIONS),
        "row 1: column dialogue",
        more="data.reader=harry_potter",
    ),
    data(
        "broken JSON line",
        "a.jsonl",
        ROWS + '\n{"prompt" "a"}\n',
        "a.jsonl:4: is not JSON: Expecting ':' delimiter",
    ),
    data(
        "broken JSON array",
        "a.json",
        '[{"prompt": "a"},\n {"prompt": "b"\n',
        "a.json:3: is not JSON: Expecting ','",
    ),
    data("JSON too deep", "a.jsonl", "[" * 100_000, "nested too deeply"),
    data("JSON of numbers", "a.jsonl", ROWS + "5\n", "line 3: expected an object, found int"),
    data(
        "JSON not UTF-8", "a.jsonl", ROWS.encode() + b'{"prompt": "caf\xe9"}\n', "is not UTF-8 text"
    ),
    data(
        "csv row too short",
        "a.csv",
        'prompt,response\n"a\nb",c\nd\n',
        "line 4: not as many columns as the header",
    ),
    data(
        "csv row too long",
        "a.csv",
        "prompt,response\na,b\nc,d,e\n",
        "line 3: not as many columns as the header",
    ),
    data(
        "csv quote not closed",
        "a.csv",
        'prompt,response\na,"b\nc,d\n',
        "line 3: unexpected end of data",
    ),
    data("not parquet", "a.parquet", ROWS, "is not parquet"),
    data("gz cut off", "a.jsonl.gz", gzip.compress(ROWS.encode())[:-12], "cannot be read"),
    data(
        "gz damaged",
        "a.jsonl.gz",
        gzip.compress(ROWS.encode())[:12] + b"\xff" * 40,
        "cannot be read",
    ),
    data("gz that is none", "a.jsonl.gz", ROWS, "cannot be read: Not a gzipped file"),
    data("no rows", "a.jsonl", "\n\n", "no rows"),
    data("no rows below the header", "a.csv", "prompt,response\n", "no rows"),
    data(
        "kind of file that is not read",
        "a.txt",
        ROWS,
        "unknown kind of file; allowed are .jsonl, .json, .csv",
    ),
    data(
        "where on no column",
        "a.jsonl",
        ROWS,
        "no column promt",
        "did you mean prompt?",
        more="data.where.promt=Hi",
    ),
    data(
        "too long",
        "a.jsonl",
        ROWS,
        "row 0: ",
        "data.max_length is 3",
        more="data.overflow=error data.max_length=3",
    ),
    case(
        "everything dropped",
        "nothing to train on",
        '"overflow": 2',
        command=f"{PREVIEW} data.max_length=3",
    ),
    case(
        "everything filtered",
        "nothing to train on",
        '"where": 0',
        command=f"{PREVIEW} data.where.n=3",
    ),
    case(
        "all held out",
        "nothing to train on",
        '"eval": 1',
        command=f"{PREVIEW} data.where.n=1 data.eval.every=2",
    ),
]

NO_MODEL = f"{PREVIEW} model.from_scratch=null"

MISSING = [
    case(
        "data file",
        "data.path: FOLDER/a.jsonl: no such file",
        command=f"{PREVIEW} data.path=FOLDER/a.jsonl",
    ),
    case(
        "data in a folder",
        "FOLDER/a: no data file in this folder",
        files={"a/readme.md": "b"},
        command=f"{PREVIEW} data.path=FOLDER/a",
    ),
    case(
        "split of a folder",
        "no file of split 'test'; found",
        "rows.jsonl",
        command=f"{PREVIEW} data.path=FOLDER data.eval.split=test",
    ),
    case(
        "split of a file",
        "FOLDER/rows.jsonl: no split 'test' in a file",
        command=f"{PREVIEW} data.eval.split=test",
    ),
    case(
        "data set",
        "data.path: me/none is not in the cache",
        "data.path=/path/to/none",
        command=f"{PREVIEW} data.path=me/none",
    ),
    case(
        "model folder",
        "model.name: FOLDER/none: no such folder",
        command=f"{NO_MODEL} model.name=FOLDER/none",
    ),
    case(
        "run that is not trained",
        "model.name: outputs/dolly_gpt2: no such folder; train it first: accelerate launch "
        "src/sft.py recipes/dolly_gpt2.yaml",
        command=f"{NO_MODEL} model.name=outputs/dolly_gpt2",
    ),
    case(
        "checkpoint of it",
        "train it first: accelerate launch src/dpo.py recipes/hh_rlhf_gpt2_dpo.yaml",
        command=f"{NO_MODEL} model.name=outputs/hh_rlhf_gpt2_dpo/checkpoint-9",
    ),
    case(
        "model file",
        "model.name: FOLDER/recipe.yaml is a file; expected a folder or a Hub id",
        command=f"{NO_MODEL} model.name=FOLDER/recipe.yaml",
    ),
    case(
        "run that is not finished",
        "model.name: FOLDER/begun has no trained model; train it first: accelerate launch "
        "src/sft.py FOLDER/begun/recipe.yaml",
        command=f"{NO_MODEL} model.name=FOLDER/begun",
        files={"begun/recipe.yaml": RECIPE},
    ),
    case(
        "run of no recipe",
        "model.name: outputs/none: no such folder",
        command=f"{NO_MODEL} model.name=outputs/none",
    ),
    case(
        "model",
        "model.name: me/none is not in the cache",
        "model.name=/path/to/none",
        command=f"{NO_MODEL} model.name=me/none",
    ),
    case(
        "chat template",
        "data.template: chat, but the tokenizer has no chat template",
        "question_answer",
        command=f"{NO_MODEL} model.name=TOKENIZER data.template=chat",
    ),
]

RUN = {"run/recipe.yaml": RECIPE}

FOLDERS = [
    case(
        "preview into a file",
        "training.output_dir: ",
        "cannot be written",
        command=f"{PREVIEW} training.output_dir=FOLDER/rows.jsonl",
    ),
    case(
        "training into a file",
        "training.output_dir: ",
        "cannot be written",
        command=f"{TRAIN} training.output_dir=FOLDER/rows.jsonl",
    ),
    case(
        "run of another recipe",
        "FOLDER/run belongs to another run: training.seed was ",
        files=RUN,
        command=f"{TRAIN} training.seed=3",
    ),
    case(
        "run of other data",
        "FOLDER/run belongs to another run: its data was not the same",
        command=TRAIN,
        files={**RUN, "run/environment.json": '{"data": "1", "finished": null}'},
    ),
    case(
        "asking a folder of no run",
        "FOLDER/a is not a run folder",
        command="generate.py FOLDER/a Hi",
        files={"a/b": "c"},
    ),
    case(
        "asking a folder without weights",
        "FOLDER/run has no trained model; train it: ",
        "src/sft.py",
        files=RUN,
        command="generate.py FOLDER/run Hi",
    ),
    case(
        "asking before training",
        "FOLDER/run has no trained model; train it: ",
        "src/sft.py FOLDER/recipe.yaml",
        command="generate.py FOLDER/recipe.yaml Hi",
    ),
    case(
        "misspelt override of an answer",
        "override 'generaton.seed=1'",
        command="generate.py FOLDER Hi generaton.seed=1",
    ),
    case(
        "asking nothing that is there",
        "FOLDER/a: no such run folder or recipe",
        command="generate.py FOLDER/a Hi",
    ),
]

# What only the model and the libraries can tell: found before the first step.
LATE = [
    case(
        "model of no type",
        "config: model_type is missing",
        command=f"{TRAIN} model.from_scratch.config={{}}",
    ),
    case(
        "model of unknown type",
        "gpt5",
        command=f"{TRAIN} model.from_scratch.config.model_type=gpt5",
    ),
    case(
        "positions",
        "reads at most 4; use data.max_length=4",
        command=f"{TRAIN} model.from_scratch.config.n_positions=4",
    ),
    case(
        "evaluation of nothing",
        "training.eval_strategy is set, but data.eval is null",
        command=f"{TRAIN} training.eval_strategy=epoch",
    ),
    case(
        "two number formats",
        "training.bf16 with training.fp16 does not work",
        command=f"{TRAIN} training.bf16=true training.fp16=true",
    ),
    case(
        "adapter on no module",
        "no module of the gpt2 model",
        "nope",
        command=f"{TRAIN} lora.target_modules=[nope]",
    ),
    case(
        "model without config",
        "model.name: TOKENIZER has no config",
        command=f"{TRAIN} model.from_scratch=null model.name=TOKENIZER",
    ),
]

ALL = [
    *MISSPELT,
    *RENAMED,
    *OWNED_ELSEWHERE,
    *WRONG_VALUES,
    *WRONG_FILES,
    *WRONG_ROWS,
    *MISSING,
    *FOLDERS,
]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_level().save_pretrained(folder)
    return folder


def placed(text, folder, tokenizer):
    return text.replace("FOLDER", str(folder)).replace("TOKENIZER", str(tokenizer))


@pytest.mark.parametrize(("words", "files", "script", "arguments"), ALL)
def test_what_is_wrong_is_said_in_one_line_before_torch_is_imported(
    words, files, script, arguments, run_fork, tmp_path, tokenizer_folder
):
    write_files(tmp_path, files)
    words, arguments = (
        [placed(text, tmp_path, tokenizer_folder) for text in texts] for texts in (words, arguments)
    )
    assert_one_line(run_fork(script, *arguments), words)


@pytest.mark.parametrize(("words", "files", "script", "arguments"), LATE)
def test_what_only_the_model_can_tell_is_said_in_the_last_line(
    words, files, script, arguments, run_warm, tmp_path, tokenizer_folder
):
    write_files(tmp_path, files)
    words, arguments = (
        [placed(text, tmp_path, tokenizer_folder) for text in texts] for texts in (words, arguments)
    )
    process = run_warm(script, *arguments)
    assert process.returncode == 2, process.stderr
    assert "Traceback" not in process.stdout + process.stderr
    last = process.stderr.splitlines()[-1]  # libraries may have warned before
    assert last.startswith("error: ")
    for word in words:
        assert word in last


@pytest.mark.parametrize("script", ["preview.py", "sft.py", "generate.py"])
def test_a_misspelt_key_is_refused_by_every_script_within_seconds(
    script, run_script, run_fork, tmp_path, without_torch
):
    write_files(
        tmp_path, {"recipe.yaml": RECIPE.replace("max_steps", "max_step"), "rows.jsonl": ROWS}
    )
    started = time.monotonic()
    process = run_script(script, tmp_path / "recipe.yaml", PYTHONPATH=str(without_torch))
    assert_one_line(
        process, [f"{tmp_path}/recipe.yaml:12: unknown key training.max_step; did you mean"]
    )
    assert time.monotonic() - started < 15
    fork = run_fork(script, str(tmp_path / "recipe.yaml"))
    assert (fork.returncode, fork.stdout, fork.stderr) == (
        process.returncode,
        process.stdout,
        process.stderr,
    )


def test_the_recipe_that_the_cases_spoil_is_right_and_its_rows_need_no_torch(run_fork, tmp_path):
    write_files(tmp_path, {"recipe.yaml": RECIPE, "rows.jsonl": ROWS})
    process = run_fork("preview.py", str(tmp_path / "recipe.yaml"))
    assert "2 loaded -> 2 selected -> 2 kept" in process.stdout and "written to" in process.stdout
    assert process.returncode == 99  # only then the budget, which needs torch


def test_an_import_of_torch_would_be_seen(run_fork, tmp_path):
    write_files(tmp_path, {"recipe.yaml": RECIPE, "rows.jsonl": ROWS})
    process = run_fork("sft.py", str(tmp_path / "recipe.yaml"))
    assert process.returncode == 99
    assert "torch was imported" in process.stderr


def test_a_model_folder_without_tokenizer_is_named(run_warm, tmp_path):
    write_files(
        tmp_path,
        {"recipe.yaml": RECIPE, "rows.jsonl": ROWS, "model/config.json": '{"model_type": "gpt2"}'},
    )
    arguments = ["model.from_scratch=null", f"model.name={tmp_path}/model"]
    process = run_warm("preview.py", tmp_path / "recipe.yaml", *arguments)
    assert_one_line(process, [f"model.name: {tmp_path}/model has no tokenizer"])


def test_wandb_without_a_key_is_refused_before_torch_is_imported(
    run_script, tmp_path, without_torch
):
    write_files(tmp_path, {"recipe.yaml": RECIPE, "rows.jsonl": ROWS})
    arguments = [tmp_path / "recipe.yaml", "training.report_to=wandb"]
    environment = {"PYTHONPATH": str(without_torch), "WANDB_MODE": "online", "HOME": str(tmp_path)}
    process = run_script("sft.py", *arguments, **environment)
    assert_one_line(process, ["training.report_to: wandb is not logged in", "WANDB_MODE=offline"])


@pytest.mark.parametrize("flags", [[], ["--check"]])
def test_a_logger_that_is_not_installed_is_named_before_torch_is_imported(
    flags, run_script, tmp_path, without_torch
):
    """The extra that brings it, where there is one."""
    write_files(tmp_path, {"recipe.yaml": RECIPE, "rows.jsonl": ROWS})
    hidden = "import sys; sys.modules['wandb'] = None\n"
    write_files(tmp_path, {"site/sitecustomize.py": hidden})
    process = run_script(
        "sft.py",
        *flags,
        tmp_path / "recipe.yaml",
        "training.report_to=wandb",
        PYTHONPATH=f"{tmp_path / 'site'}:{without_torch}",
    )
    assert_one_line(
        process,
        [
            "training.report_to: wandb is not installed: "
            "pip install -c constraints.txt -e '.[wandb]'"
        ],
    )


NO_HUB = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1"}
NEEDED = [
    "http://127.0.0.1:9 could not be reached",
    "openai-community/gpt2",
    "databricks/databricks-dolly-15k",
]
LOCAL = ["model.name=/path/to/gpt2", "data.path=/path/to/databricks-dolly-15k"]


def test_without_the_hub_training_ends_at_once_and_says_what_to_write(run_script, without_torch):
    started = time.monotonic()
    process = run_script(
        "sft.py", "recipes/dolly_gpt2.yaml", PYTHONPATH=str(without_torch), **NO_HUB
    )
    assert_one_line(process, NEEDED + LOCAL, code=1)
    assert time.monotonic() - started < 15


def test_without_the_hub_accelerate_adds_no_traceback():
    launch = Path(sys.executable).with_name("accelerate")
    process = subprocess.run(
        [launch, "launch", "src/sft.py", "recipes/dolly_gpt2.yaml"],
        cwd=ROOT,
        env={**os.environ, **NO_HUB},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode != 0
    assert "Traceback" not in process.stdout + process.stderr
    errors = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    for word in NEEDED + LOCAL:
        assert word in errors[0]
