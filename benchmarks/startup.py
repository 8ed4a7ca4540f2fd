"""From the command to the end of the first optimizer step, on dolly, beside a plain trl script.

python benchmarks/startup.py --data dolly.jsonl --tokenizer gpt2-folder

Both train a very small GPT-2 for one step through `accelerate launch` on the CPU: cold, with
nothing prepared, and again. Wall seconds; the ratio is what counts. Then what each part costs.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dolly import dolly_parser

ROOT = Path(__file__).parents[1]

TRL = """
import sys
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

data, model, output = sys.argv[1:]
source = {"path": "json", "data_files": data} if ".json" in data else {"path": data}
rows = load_dataset(**source, split="train")
rows = rows.filter(lambda row: row["context"] == "")
rows = rows.map(
    lambda row: {
        "prompt": f"### Question: {row['instruction']}\\n### Answer:",
        "completion": f" {row['response']}",
    },
    remove_columns=rows.column_names,
)
trainer = SFTTrainer(
    model=AutoModelForCausalLM.from_pretrained(model),
    args=SFTConfig(
        output_dir=output, max_length=512, max_steps=1, per_device_train_batch_size=8,
        use_cpu=True, bf16=False, gradient_checkpointing=False, save_strategy="no",
        report_to="none",
    ),
    processing_class=AutoTokenizer.from_pretrained(model),
    train_dataset=rows,
)
trainer.train()
"""


PARTS = """
import os, sys, time
sys.path.insert(0, "src")
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
start = time.process_time()

def part(name):
    global start
    print(f"PART {name}: {time.process_time() - start:.2f}", flush=True)
    start = time.process_time()

from finetuning.recipe.recipe import load_recipe
recipe = load_recipe(sys.argv[1], sys.argv[2:])
part("recipe checked")
from finetuning.data.cache import cache_folder, prepare
from finetuning.model.tokenizer import load_tokenizer
tokenizer = load_tokenizer(recipe.model, [])
prepared = prepare(recipe.data, tokenizer, cache_folder())
part("tokenizer and data, from the cache")
import torch
part("import torch")
sys.modules["bitsandbytes"] = None
from finetuning.launch.strategy import requested_strategy
from finetuning.training.prepared_run import PreparedRun
from finetuning.training.train import make_trainer
part("import transformers, peft")
trainer = make_trainer(PreparedRun(recipe, requested_strategy(), tokenizer, prepared))
part("model and trainer")
trainer.train()
part("first step")
"""


def main() -> None:
    parser = dolly_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp())
    make_model(options.tokenizer, work / "model")
    (work / "stock.py").write_text(TRL)
    commands = {
        "trl": [str(work / "stock.py"), options.data, str(work / "model"), str(work / "out")],
        "ours": [
            *("src/sft.py", "recipes/dolly_gpt2.yaml", f"data.path={options.data}"),
            *(f"model.name={work / 'model'}", "training.max_steps=1", "training.save_strategy=no"),
            *("data.eval=null", "training.eval_strategy=no", "generation.prompts=[]"),
        ],
    }
    print("| command to the end of the run of one step | cold s | warm s |")
    print("|---|---|---|")
    for name, command in commands.items():
        cold, warm = [], []
        for repeat in range(options.repeats):
            shutil.rmtree(work / "home", ignore_errors=True)
            cold.append(launch(command, work, f"{name}-{repeat}-cold"))
            warm.append(launch(command, work, f"{name}-{repeat}-warm"))
        print(f"| {name} | {min(cold):.1f} | {min(warm):.1f} |", flush=True)
    print_parts(commands["ours"][1:], work)


def print_parts(recipe: list[str], work: Path) -> None:
    """CPU seconds of each part of a warm start, and of the launcher around it."""
    (work / "empty.py").write_text("")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    launch([str(work / "empty.py")], work, "")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    launcher = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    (work / "parts.py").write_text(PARTS)
    output = [f"training.output_dir={work / 'parts'}"]
    command = [sys.executable, str(work / "parts.py"), *recipe, *output]
    environment = {**os.environ, "HF_HOME": str(work / "home")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{json.dumps(command)} failed:\n{done.stderr[-2000:]}")
    print("\n| part of a warm start | CPU s |\n|---|---|")
    print(f"| accelerate launch of an empty script | {launcher:.2f} |")
    for line in done.stdout.splitlines():
        if line.startswith("PART "):
            name, _, seconds = line.removeprefix("PART ").rpartition(": ")
            print(f"| {name} | {seconds} |")


def make_model(tokenizer: str, folder: Path) -> None:
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2)).save_pretrained(folder)


def launch(command: list[str], work: Path, name: str) -> float:
    extra = [f"training.output_dir={work / name}"] if command[0].startswith("src") else []
    accelerate = str(Path(sys.executable).with_name("accelerate"))
    config = str(ROOT / "accelerate_configs" / "cpu.yaml")
    home = {"HF_HOME": str(work / "home")}
    start = time.perf_counter()
    done = subprocess.run(
        [accelerate, "launch", "--config_file", config, *command, *extra],
        cwd=ROOT,
        env={**os.environ, **home},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{json.dumps(command)} failed:\n{done.stderr[-2000:]}")
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
