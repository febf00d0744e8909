# Two commands: `make quickstart` and `make test`; each makes .venv when there is none.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
RUNS ?= runs/quickstart
# Packages that tests and benchmarks compare with; without what they ask for beside (bitsandbytes, compilers, notebooks).
WITNESSES := $(shell sed -n '/^# witnesses/,$$p' constraints.txt | grep '==')
# torch goes first and exactly pinned: left to the resolver it may bring another build than the tested one.
TORCH := $(shell grep '^torch==' constraints.txt)

# Checkers of spelling and of packages, in an environment of their own: the pinned one stays as it is pinned.
TOOLS := codespell==2.4.3 twine==7.0.0 check-wheel-contents==0.6.3
# Libraries that quantise checkpoints, in a folder outside the environment: transformers behaves differently where they are
# installed. Tests run them in separate processes.
QUANTIZERS := compressed-tensors==0.20.1 loguru==0.7.3 bitsandbytes==0.50.2
# Tests of every room that take seconds each: what is run with other versions than the pinned ones.
FAST := tests/storage tests/geometry tests/runs tests/claims tests/test_statistics.py tests/test_recipes.py \
	tests/test_cli.py tests/optim/test_reference.py tests/optim/test_trainer_ways.py tests/optim/test_conformance.py \
	tests/adapters/test_adapter_peft.py tests/adapters/test_adapter_layers.py tests/adapters/test_registration.py \
	tests/adapters/test_lowrank_model.py tests/adapters/test_relora.py tests/hub/test_push_revisions.py \
	tests/hub/test_read_back.py tests/hub/test_bucket.py tests/hub/test_cards.py tests/downstream/test_runner.py \
	tests/measuring/test_measure.py tests/training/test_recipe.py tests/memory/test_ledger.py \
	tests/study/test_ray.py::test_results_are_those_of_local_processes
OLDEST := $(VENV)/oldest

.PHONY: quickstart test coverage test-fast test-oldest drill gpu-test audit browser-test lint format pages docs bench wheel package clean

quickstart: $(VENV)/.installed
	@$(BIN)/hf-lowrank study recipes/studies/quickstart.yaml --output $(RUNS)

# On the CPU, also where there is a GPU: many of its processes are forks, and forks cannot use CUDA.
test: $(VENV)/.installed-dev
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# The same, with the lines that no test reaches.
coverage: $(VENV)/.installed-dev
	@rm -f .coverage .coverage.*
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --cov --cov-report=term

# In the environment BIN=, with whatever versions it has.
test-fast:
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(FAST)

# The lower bounds of pyproject.toml, all at once.
test-oldest: $(OLDEST)/.installed
	$(MAKE) test-fast BIN=$(OLDEST)/bin

drill: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m drill

# On a machine with a GPU, in an environment of its own (BIN=): the pinned torch is a CPU build.
gpu-test:
	$(BIN)/python -m pytest -m gpu tests/gpu

# pip-audit gets an environment of its own: the pinned one stays as it is pinned. Its report is there only if it came to
# an end, which tells advisories that were found from a service that was not reached.
AUDIT := $(VENV)/audit
audit: $(VENV)/.installed-dev
	@$(BIN)/python -m pytest tests/test_dependencies.py
	@rm -f $(AUDIT).json
	@test -x $(AUDIT)/bin/pip-audit \
		|| { $(PYTHON) -m venv $(AUDIT) && $(AUDIT)/bin/python -m pip install --quiet --no-input pip-audit; } \
			> /dev/null 2>&1 \
		|| { echo "advisories not checked: pip-audit cannot be installed"; exit 0; }; \
	if test -x $(AUDIT)/bin/pip-audit; then \
		$(AUDIT)/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip --progress-spinner off \
			--timeout 20 --format json --output $(AUDIT).json 2> $(AUDIT).log; status=$$?; \
		if test -s $(AUDIT).json; then cat $(AUDIT).log; exit $$status; fi; \
		echo "advisories not checked: $$(tail -n 1 $(AUDIT).log | cut -c 1-200)"; \
	fi

# Needs Chromium (on the path, or CHROMIUM=) and npm.
browser-test: $(VENV)/.installed-dev node_modules/.installed
	$(BIN)/python -m pytest tests/report/browser/check_page.py -s

# The page's scripts and styles are linted by tools from npm, which need Node.js.
lint: $(VENV)/.installed-dev $(VENV)/tools/.installed node_modules/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_architecture.py
	$(VENV)/tools/bin/codespell
	npm run --silent lint

format: $(VENV)/.installed-dev node_modules/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python -m tests.report.payload_types
	npm run --silent format

# The metadata and tables of model_cards/, and the tables and quoted code of docs/, from the code and committed results.
pages: $(VENV)/.installed
	$(BIN)/python model_cards/update.py
	$(BIN)/python docs/update.py

# The documentation, in build/docs. A broken link or an undocumented public name fails.
# To read it with search: $(BIN)/python -m http.server --directory build/docs
docs: $(VENV)/.installed-dev
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs --quiet build
	@echo "documentation: build/docs/index.html"

bench: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/optimizers.py
	$(BIN)/python benchmarks/adapters.py
	$(BIN)/python benchmarks/geometry.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/memory_examples.py
	$(BIN)/python -m benchmarks.distributed
	$(BIN)/python -m benchmarks.measuring_processes
	$(BIN)/python -m benchmarks.ray_study
	$(BIN)/python -m benchmarks.ray_quickstart

wheel: $(VENV)/.installed-dev
	$(BIN)/python -m build --no-isolation --outdir dist .

# The wheel and the source distribution, and nothing else in dist/, with what they say and hold checked.
package: $(VENV)/.installed-dev $(VENV)/tools/.installed
	rm -rf dist
	$(MAKE) wheel
	$(VENV)/tools/bin/twine check --strict dist/*
	$(VENV)/tools/bin/check-wheel-contents dist/*.whl
	$(BIN)/python -m pytest tests/test_packaging.py

node_modules/.installed: package.json package-lock.json
	npm ci --silent --no-audit --no-fund
	@touch $@

$(VENV)/.installed: pyproject.toml constraints.txt
	@test -x $(BIN)/python || { echo "making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing the pinned versions into $(VENV)"
	@$(PIP) install --quiet $(TORCH)
	@$(PIP) install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "installing the tools for tests into $(VENV)"
	@$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	@$(PIP) install --quiet --no-deps $(WITNESSES)
	@rm -rf $(VENV)/quantizers
	@$(PIP) install --quiet --no-deps --target $(VENV)/quantizers $(QUANTIZERS)
	@touch $@

$(VENV)/tools/.installed: Makefile
	@test -x $(VENV)/tools/bin/python || $(PYTHON) -m venv $(VENV)/tools
	@echo "installing the checkers of spelling and packages into $(VENV)/tools"
	@$(VENV)/tools/bin/python -m pip install --quiet --no-input $(TOOLS)
	@touch $@

$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	@rm -rf $(OLDEST)
	@$(PYTHON) -m venv $(OLDEST)
	@echo "installing the oldest supported versions into $(OLDEST)"
	@$(OLDEST)/bin/python -m pip install --quiet --no-input $(shell grep '^torch==' constraints-oldest.txt)
	@$(OLDEST)/bin/python -m pip install --quiet --no-input --constraint constraints-oldest.txt --editable '.[test]'
	@$(OLDEST)/bin/python -m pip install --quiet --no-input --no-deps $(WITNESSES)
	@touch $@

clean:
	rm -rf dist build .coverage .coverage.* .mypy_cache .ruff_cache .pytest_cache node_modules
