"""Supervised fine-tuning: one recipe in, one trained model or LoRA adapter out.

accelerate launch src/sft.py recipes/dolly_gpt2.yaml
accelerate launch src/sft.py recipes/dolly_gpt2.yaml training.max_steps=10
accelerate launch --config_file accelerate_configs/cpu.yaml src/sft.py recipes/quickstart.yaml
accelerate launch --config_file accelerate_configs/zero3.yaml --num_processes 8 \\
  src/sft.py recipes/dolly_gpt2.yaml
python src/sft.py --check recipes/dolly_gpt2.yaml

Arguments after the recipe are overrides, section.key=value. The run folder (training.output_dir)
then holds weights or adapter, tokenizer, recipe.yaml, environment.json, metrics.jsonl and
samples.md. The same command resumes a run that was stopped from its last checkpoint; Ctrl-C,
SIGTERM and SIGUSR1 have it write one first. --check ends before a model is loaded, when recipe,
data and run folder are known to be right and the libraries take every setting; --config_file and
--num_processes say how it would be launched. --verbose shows what the libraries log and warn of.
"""

from finetuning.script import run
from finetuning.training_script import read_arguments, train_recipe


def main(arguments: list[str]) -> None:
    train_recipe(read_arguments(arguments), "src/sft.py")


if __name__ == "__main__":
    run(main, __doc__, when_interrupted="; the same command resumes from the last checkpoint")
