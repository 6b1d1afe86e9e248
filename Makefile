# anybatch: `make demo` shows it, `make test` checks it, `make check` reads it.
# Everything runs in .venv, with the versions that constraints.txt pins (PINS= for the newest).

PYTHON ?= python3
BIN := .venv/bin
TRAINERS := transformers,lightning,accelerate,skorch,keras
TESTED := demo,data,text,huggingface,tensorboard,mlflow,wandb,audit,report,$(TRAINERS),test
PINS ?= -c constraints.txt
PYTEST := .venv/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder
FAST := smoke or not (process or documents or slow)
PIP := $(BIN)/python -m pip install --disable-pip-version-check $(PINS)
OLD := Python 3.11 or newer is needed. Name one that is installed: make demo PYTHON=python3.12

.PHONY: install demo test test-all test-rest test-ray test-torchtitan check bench performance \
  torture fuzz mutants scaling systems scaling-rules screenshots course docs clean

install: .venv/installed-demo

demo: install
	$(BIN)/anybatch demo

# Under four minutes on two cores: all subjects, and one real case of each promise.
test: .venv/installed-test
	$(PYTEST) --hypothesis-profile=fast -m "$(FAST)" --ignore=tests/house

# Everything, under thirty minutes on two cores.
test-all: .venv/installed-dev
	$(PYTEST)

# What `make test` leaves out: the two make all tests, once each.
test-rest: .venv/installed-dev
	$(PYTEST) -m "not ($(FAST))" --ignore=tests/house

# Ray Train, which is too large for `make test`: 80 MB. Three minutes.
test-ray: .venv/installed-ray
	$(PYTEST) -n 1 tests/processes/test_integrations_ray.py \
	  'tests/pages/test_documents.py::test_a_document_runs[ray]'

# Models of torchtitan, in an environment of its own: it needs other versions of packages.
test-torchtitan: .venv-torchtitan/installed
	.venv-torchtitan/bin/python -m pytest -W ignore::DeprecationWarning \
	  tests/processes/test_integrations_torchtitan.py \
	  'tests/pages/test_documents.py::test_a_document_runs[torchtitan]'

check: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/house

bench: .venv/installed-test
	$(BIN)/python benchmarks/demo_accuracy.py --write
	$(BIN)/python benchmarks/loop.py --write
	$(BIN)/python benchmarks/compiled.py --write
	$(BIN)/python benchmarks/growth.py --write
	$(BIN)/python benchmarks/roofline.py --write
	$(BIN)/python benchmarks/larger_than_memory.py --write
	$(BIN)/python benchmarks/flipped_labels.py --write
	$(BIN)/python benchmarks/similar.py --write
	$(BIN)/python benchmarks/spikes.py --write
	$(BIN)/python benchmarks/observed_step.py --write
	$(BIN)/python benchmarks/bitwise.py --write
	$(BIN)/python benchmarks/overlap.py --write
	$(BIN)/python benchmarks/self_check.py --write
	$(BIN)/python benchmarks/integrations.py --write
	$(BIN)/python benchmarks/cost.py --write
	$(BIN)/python benchmarks/soak.py --write

# docs/performance.md: its tables and plots, from the raw results that are there. Some seconds.
performance: .venv/installed-test
	$(BIN)/python benchmarks/performance.py

# Commands that are struck at every call that changes a run's folder; 200 runs that are killed and
# taken up by other numbers of ranks; machines that come and go on every network there is. Half an
# hour to an hour.
torture: .venv/installed-test
	$(BIN)/python benchmarks/torture.py --write
	$(BIN)/python benchmarks/torture_ranks.py --write
	ANYBATCH_TORTURE=1 $(BIN)/python -m pytest tests/processes/test_elastic.py

# A million damaged and hostile inputs of all that is read, half an hour on a quiet core.
fuzz: .venv/installed-test
	$(BIN)/python benchmarks/fuzz.py --write

# Small seeded changes of the code that the tests must notice: benchmarks/results/mutants.json names
# those that they do not. Hours; MUTANTS="--number 10 --tier subject" for a look.
mutants: .venv/installed-test
	$(BIN)/python benchmarks/mutants.py $(MUTANTS) --write

# docs/systems.md: each system over 3 seeds on Fashion-MNIST, about an hour on two cores.
systems: install
	$(BIN)/python benchmarks/systems.py --write

# docs/scaling-rules.md: where the rules of the learning rate hold, under an hour on two cores.
# Where Fashion-MNIST's files are missing: docs/scaling-rules-digits.md, some minutes on two free cores.
scaling-rules: .venv/installed-test
	$(BIN)/python benchmarks/scaling_rules.py --write

# docs/scaling.md: what the exact sum costs on more ranks, some minutes.
scaling: .venv/installed-test
	$(BIN)/python benchmarks/scaling.py --write

# docs/sample-page.html, and docs/explain/: pictures of pages, taken in a headless Chromium.
screenshots: .venv/installed-test
	$(BIN)/python benchmarks/screenshots.py

# The notebooks of examples/course/ and the pictures of docs/course.md, from the scripts.
course: install
	$(BIN)/python examples/course/make_notebooks.py
	cd docs/course && for script in ../../examples/course/[0-9]_*.py; do ../../$(BIN)/python $$script; done

# The documentation site, into site/; a broken link or an unknown name stops it.
docs: .venv/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf .venv .venv-torchtitan

# One stamp an extra: installed again when the project's requirements change.
.venv/installed-demo: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("$(OLD)" if sys.version_info < (3, 11) else 0)'
	@echo 'Installing into .venv. PyTorch is a large download, so this may take some minutes.'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) -e '.[demo]'
	touch $@

.venv/installed-test: .venv/installed-demo
	$(PIP) --quiet -e '.[$(TESTED)]'
	touch $@

.venv/installed-ray: .venv/installed-test
	$(PIP) --quiet -e '.[ray]'
	touch $@

.venv-torchtitan/installed: pyproject.toml
	$(PYTHON) -m venv .venv-torchtitan
	.venv-torchtitan/bin/python -m pip install --quiet -e '.[torchtitan,test]' torch==2.13.0
	touch $@

.venv/installed-docs: .venv/installed-demo
	$(PIP) -e '.[docs]'
	touch $@

.venv/installed-dev: .venv/installed-test
	$(PIP) --quiet -e '.[$(TESTED),dev]'
	touch $@
