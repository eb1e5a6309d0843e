# Two commands from zero: `make quickstart` and `make test`. Both need only python3.

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
WORKDIR ?= runs/quickstart
PROJECTION ?= memory
PROMPT := def read_lines(path):

.PHONY: quickstart quickstart-dense test test-core test-slow test-optimised test-peers test-slurm mutants mutants-sampled golden golden-add golden-configs lint docs clean

# Large pages spare the step some 35,000 page faults (glibc >= 2.35; ignored elsewhere).
quickstart: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

# Train, evaluate, sample, draw, compare.
quickstart: $(VENV)/.core
	$(RUN) train.py --config=configs/quickstart.py:$(PROJECTION) --workdir=$(WORKDIR)
	$(RUN) eval.py --workdir=$(WORKDIR) --output=$(WORKDIR)/eval.json
	$(RUN) -m memoryformer.generation --workdir=$(WORKDIR) --prompt='$(PROMPT)'
	$(RUN) -m memoryformer.report curves $(WORKDIR)
ifeq ($(PROJECTION),memory)
	$(RUN) -m memoryformer.report utilisation --workdir=$(WORKDIR)
endif
	$(RUN) -m memoryformer.report quickstart --workdir=$(WORKDIR)

quickstart-dense:
	$(MAKE) quickstart PROJECTION=dense WORKDIR=$(WORKDIR)-dense

test: $(VENV)/.dev lint
	$(RUN) -m pytest -n 2 --dist worksteal

# What does not need the whole data pipeline: the suite for a second jax.
test-core: $(VENV)/.dev
	$(RUN) -m pytest tests/ops/test_hashing.py tests/ops/test_lookup.py \
	    tests/model/test_layers.py tests/model/test_model.py tests/test_sharding.py \
	    tests/training/test_loop.py tests/training/test_optimizer.py \
	    tests/runs/test_checkpoint.py

test-slow: $(VENV)/.dev
	$(RUN) -m pytest -m slow

# The tests again on programs that are compiled as users compile them, none found compiled.
test-optimised: export XLA_FLAGS :=
test-optimised: export JAX_ENABLE_COMPILATION_CACHE := false
test-optimised: $(VENV)/.dev
	$(RUN) -m pytest -n 2 --dist worksteal

# What compares with PyTorch, transformers, the lm-evaluation-harness and mamba2-jax, and with
# llama.cpp and CTranslate2 where the extra `decode` is installed.
test-peers: $(VENV)/.peers
	$(RUN) -m pytest tests/convert tests/harness tests/data/test_run_tokenizer.py \
	    tests/test_names.py tests/model/test_mamba2.py \
	    tests/benchmarks/test_benchmarks_decode.py -rs

# The launch scripts and sweeps under a real SLURM, started in a temporary folder.
test-slurm: $(VENV)/.dev
	@for program in munged slurmctld slurmd sbatch; do \
	    PATH="$$PATH:/usr/sbin:/usr/local/sbin" command -v $$program > /dev/null || \
	    { echo "$$program is missing; on Debian, as root:" \
	      "apt-get install -y --no-install-recommends slurm-wlm munge"; exit 1; }; \
	done
	$(RUN) -m pytest -m slow tests/slurm

# Every promise of reliability, and a mistake that its test must notice.
mutants: $(VENV)/.dev
	$(RUN) -m tests.mutants

# Random changes of the source, each against the tests of its module; what survives is listed.
SEED ?= 0
COUNT ?= 300
JOBS ?= 2
mutants-sampled: $(VENV)/.dev
	$(RUN) -m tests.sampled_mutants --seed=$(SEED) --count=$(COUNT) --jobs=$(JOBS)

# The losses of the installed jax, after a change that is meant to change them; `golden-add`
# puts those of another processor beside them.
golden: $(VENV)/.dev
	$(RUN) -m tests.golden_losses --update

golden-add: $(VENV)/.dev
	$(RUN) -m tests.golden_losses --add

# Every shipped config as text, after a change that is meant to change one.
golden-configs: $(VENV)/.dev
	$(RUN) -m tests.golden_configs --update

lint: $(VENV)/.dev
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy

# The site, in docs/_build/html; a warning is an error.
docs: $(VENV)/.docs
	$(RUN) -m sphinx --fail-on-warning --keep-going --quiet -b html docs docs/_build/html

PIP := $(RUN) -m pip install --quiet --disable-pip-version-check

$(VENV)/.core: requirements.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements.txt
	touch $@

# Extras of pyproject.toml.
$(VENV)/.dev: pyproject.toml $(VENV)/.core
	$(PIP) -e '.[dev]'
	touch $@

$(VENV)/.peers: $(VENV)/.dev
	$(PIP) -e '.[peers]'
	touch $@

$(VENV)/.docs: pyproject.toml $(VENV)/.core
	$(PIP) -e '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build docs/_build docs/_generated
