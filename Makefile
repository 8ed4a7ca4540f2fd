# Each target makes .venv and installs what it needs, in the versions of constraints.txt; a second call is instant.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin

# Every package is compared with its hash in requirements/ and, but for rouge-score and DeepSpeed, is a wheel: no code of
# it runs while it is installed. torch goes by version alone; requirements/left_out.txt says why.
# Python compiles what is imported, when it is: a third of the packages' files, and half the time of an installation.
# It must be allowed to keep it, which images of containers forbid: importing what trains takes 6 CPU seconds, else 15.
export PYTHONDONTWRITEBYTECODE :=
PIP := $(RUN)/python -m pip install --quiet --disable-pip-version-check --no-compile
LOCKED := $(PIP) --no-deps --require-hashes

.PHONY: help quickstart quickstart-dpo test test-cluster test-gpu bench lint format schema tables docs lock audit clean
.DEFAULT_GOAL := help

help:  ## what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(RUN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'Python 3.11 or newer is needed: make PYTHON=python3.11'; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.base: pyproject.toml constraints.txt requirements/base.txt | $(RUN)/python
	$(LOCKED) --only-binary :all: --requirement requirements/base.txt
	$(PIP) --constraint constraints.txt torch
	$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.base requirements/dev.txt
	$(LOCKED) --only-binary :all: --no-binary rouge-score --no-build-isolation --requirement requirements/dev.txt
	@touch $@

$(VENV)/.deepspeed: $(VENV)/.dev requirements/deepspeed.txt
	$(LOCKED) --no-build-isolation --requirement requirements/deepspeed.txt
	@touch $@

$(VENV)/.docs: $(VENV)/.base requirements/docs.txt
	$(LOCKED) --only-binary :all: --requirement requirements/docs.txt
	@touch $@

$(VENV)/.lock: constraints.txt | $(RUN)/python
	$(PIP) --constraint constraints.txt pip-audit uv
	@touch $@

quickstart: $(VENV)/.base  ## train the embedded default on the CPU (a minute) and ask it
	@# One thread: the model is too small to share, and threads that wait for each other crawl on a busy machine.
	@test -f outputs/quickstart/model.safetensors || OMP_NUM_THREADS=1 \
	  $(RUN)/accelerate launch --config_file accelerate_configs/cpu.yaml src/sft.py recipes/quickstart.yaml
	$(RUN)/python src/generate.py outputs/quickstart 'What is the capital of Japan?'

quickstart-dpo: quickstart  ## tune the quickstart on preferences (less than a minute) and ask it
	@test -f outputs/quickstart_dpo/model.safetensors || OMP_NUM_THREADS=1 \
	  $(RUN)/accelerate launch --config_file accelerate_configs/cpu.yaml src/dpo.py recipes/quickstart_dpo.yaml
	$(RUN)/python src/generate.py outputs/quickstart_dpo 'What is the capital of Japan?'

test: $(VENV)/.dev  ## every test that one CPU can run (about five minutes)
	$(RUN)/python -m pytest -m 'not cluster' --numprocesses 2 --dist worksteal $(PYTEST_ARGS)

test-cluster: $(VENV)/.deepspeed  ## tests with several processes, and on a Slurm cluster of virtual nodes (root)
	$(RUN)/python -m pytest -m cluster $(PYTEST_ARGS)

test-gpu: $(VENV)/.deepspeed  ## what a GPU has to prove, in five minutes: a report to send
	PYTHONPATH=tests $(RUN)/python -m pytest -p gpu_report -m gpu --tb=short $(PYTEST_ARGS)

# Dolly and GPT-2's tokenizer: Hub ids, or local copies as in `make bench DATA=dolly.jsonl TOKENIZER=gpt2-folder`.
DATA ?= databricks/databricks-dolly-15k
TOKENIZER ?= openai-community/gpt2
BENCH = --data $(DATA) --tokenizer $(TOKENIZER)

bench: $(VENV)/.base  ## speed and memory beside trl and transformers, about an hour and a half on two cores
	@mkdir -p benchmarks/results
	$(RUN)/python benchmarks/train.py $(BENCH) --model gpt2 --json benchmarks/results/gpt2_full.json
	$(RUN)/python benchmarks/train.py $(BENCH) --model gpt2 --method lora --json benchmarks/results/gpt2_lora.json
	$(RUN)/python benchmarks/train.py $(BENCH) --model small --json benchmarks/results/small_full.json
	$(RUN)/python benchmarks/train.py $(BENCH) --model bloom --method lora --json benchmarks/results/bloom_lora.json
	$(RUN)/python benchmarks/plot.py benchmarks/results/gpt2_full.json benchmarks/results/gpt2_lora.json \
	  benchmarks/results/small_full.json benchmarks/results/bloom_lora.json
	$(RUN)/python benchmarks/dpo.py $(BENCH) --model gpt2 --json benchmarks/results/dpo_gpt2_full.json
	$(RUN)/python benchmarks/dpo.py $(BENCH) --model gpt2 --method lora --json benchmarks/results/dpo_gpt2_lora.json
	$(RUN)/python benchmarks/dpo.py $(BENCH) --model small --json benchmarks/results/dpo_small_full.json
	$(RUN)/python benchmarks/memory.py --json benchmarks/results/memory_cpu.json
	$(RUN)/python benchmarks/data.py $(BENCH)
	$(RUN)/python benchmarks/rows.py $(BENCH) --rows 15000
	$(RUN)/python benchmarks/rows.py $(BENCH) --rows 300000
	$(RUN)/python benchmarks/startup.py $(BENCH)

lint: $(VENV)/.dev  ## ruff and mypy
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

format: $(VENV)/.dev  ## let ruff mend what it can
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .

schema: $(VENV)/.dev  ## write the settings of the libraries and the schema for editors again
	PYTHONPATH=src $(RUN)/python -m finetuning.recipe.library_fields
	PYTHONPATH=src $(RUN)/python -m finetuning.recipe.schema

tables: $(VENV)/.base  ## write the tables of the pages that come from code again
	PYTHONPATH=src $(RUN)/python docs/tables.py

docs: $(VENV)/.docs  ## build the pages into build/site/, both languages, with search
	rm -rf build/pages build/site
	mkdir -p build/pages
	cp --parents *.md LICENSE docs/*.md notebooks/* benchmarks/README.md benchmarks/*.png recipes/*.* build/pages
	find src examples -name '*.py' -exec cp --parents -t build/pages {} +
	$(RUN)/zensical build --strict --clean --config-file mkdocs.yml

LOCK = $(RUN)/uv pip compile pyproject.toml --quiet --universal --python-version 3.11.5 --generate-hashes --no-annotate \
  --custom-compile-command 'make lock' --constraint constraints.txt --excludes requirements/left_out.txt \
  --no-emit-package torch

lock: $(VENV)/.lock  ## write requirements/ from pyproject.toml and constraints.txt again
	$(LOCK) --output-file requirements/base.txt
	for extra in benchmarks deepspeed dev docs export wandb; do \
	  $(LOCK) --extra $$extra --output-file requirements/$$extra.txt \
	    $$(ls requirements/left_out_of_$$extra.txt 2>/dev/null | sed 's/^/--excludes /') \
	    $$(sed -n 's/^\([a-z0-9.-]*\)==.*/--no-emit-package \1/p' requirements/base.txt) || exit; \
	done

audit: $(VENV)/.lock  ## ask for known holes in what requirements/ pins (needs the network)
	$(RUN)/pip-audit --disable-pip --require-hashes $(addprefix --requirement ,$(filter-out requirements/left_out%,$(wildcard requirements/*.txt)))

clean:  ## remove .venv and caches; outputs/ stays
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis
