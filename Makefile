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

.PHONY: quickstart test drill gpu-test audit browser-test lint format pages bench wheel clean

quickstart: $(VENV)/.installed
	@$(BIN)/hf-lowrank study recipes/studies/quickstart.yaml --output $(RUNS)

# On the CPU, also where there is a GPU: many of its processes are forks, and forks cannot use CUDA.
test: $(VENV)/.installed-dev
	@rm -f .coverage .coverage.*
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --cov --cov-report=term

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
lint: $(VENV)/.installed-dev node_modules/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_architecture.py
	npm run --silent lint

format: $(VENV)/.installed-dev node_modules/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python -m tests.report.payload_types
	npm run --silent format

# The tables of settings in model_cards/, from the methods' entries.
pages: $(VENV)/.installed
	$(BIN)/python model_cards/update.py

bench: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/optimizers.py
	$(BIN)/python benchmarks/adapters.py
	$(BIN)/python benchmarks/geometry.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python -m benchmarks.distributed
	$(BIN)/python -m benchmarks.measuring_processes

wheel: $(VENV)/.installed-dev
	$(BIN)/python -m build --no-isolation --outdir dist .

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
	@touch $@

clean:
	rm -rf dist build .coverage .coverage.* .mypy_cache .ruff_cache .pytest_cache node_modules
