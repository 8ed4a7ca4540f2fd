"""Preference tuning: pairs of responses and a model in, the model that prefers the chosen ones out.

accelerate launch src/dpo.py recipes/quickstart_dpo.yaml
accelerate launch src/dpo.py recipes/quickstart_dpo.yaml training.beta=0.05
python src/dpo.py --check recipes/quickstart_dpo.yaml

Direct preference optimization (DPO) and the losses that trl.DPOConfig names, on a recipe whose
data.reader reads pairs. model.name is what training starts from, mostly the run folder of
src/sft.py, and what it is held to: its log-probabilities are computed once, before the first step.
Arguments, run folder, resuming, signals, --check and --verbose are those of src/sft.py.
"""

from finetuning.script import run
from finetuning.training_script import read_arguments, train_recipe


def main(arguments: list[str]) -> None:
    train_recipe(read_arguments(arguments), "src/dpo.py")


if __name__ == "__main__":
    run(main, __doc__, when_interrupted="; the same command resumes from the last checkpoint")
