# Sets up VENV once and again whenever a source changed: the wheel is built, then installed.
# Other interpreters: make test PYTHON=python3.12 VENV=.venv-3.12
VENV ?= .venv
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
  $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)

sources := pyproject.toml CMakeLists.txt README.md LICENSE \
  $(shell find cmake cuda jax_flashmla -type f -not -name '*.pyc')
cpp_sources := $(shell find cuda tests -name '*.h' -o -name '*.cc' -o -name '*.cuh' -o -name '*.cu')

export CMAKE_BUILD_PARALLEL_LEVEL ?= 2

.PHONY: demo test judge gpu-test lint runner clean

demo: $(VENV)/installed  ## decode batches of a serving trace; ARGS="--trace FILE" for your own
	$(VENV)/bin/python -P -m jax_flashmla $(ARGS)

test: $(VENV)/installed  ## the tests that need no GPU
	$(VENV)/bin/pytest -m "not gpu" $(ARGS)

judge: $(VENV)/installed  ## the MLA layer against transformers; installs torch (CPU: Python 3.11)
	$(VENV)/bin/python -m pip install -q "$$(echo $(VENV)/wheel/*.whl)[judge]"
	$(VENV)/bin/pytest tests/judge --require-judge $(ARGS)

gpu-test: $(VENV)/installed runner  ## all GPU checks; writes tests/gpu_record.json
	$(VENV)/bin/python -m pip install -q "jax[cuda13]"
	$(VENV)/bin/python tests/gpu_record.py $(ARGS)

lint: $(VENV)/installed
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	@$(VENV)/bin/clang-format --dry-run -Werror $(cpp_sources)

runner:  ## build/runner/flashmla_runner and, with bounded waits, build/runner-debug/flashmla_runner
	cmake -S . -B build/runner -DJAX_FLASHMLA_CUDA=ON -DJAX_FLASHMLA_RUNNER=ON
	cmake --build build/runner
	cmake -S . -B build/runner-debug -DJAX_FLASHMLA_CUDA=ON -DJAX_FLASHMLA_RUNNER=ON -DJAX_FLASHMLA_DEBUG=ON
	cmake --build build/runner-debug

clean:
	rm -rf .venv .venv-* build dist

$(VENV)/installed: $(sources)
	@test -n "$(PYTHON)" || { echo "needs Python 3.11 or newer: make PYTHON=/path/to/python" >&2; exit 1; }
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	rm -rf $(VENV)/wheel
	$(VENV)/bin/python -m pip wheel . --no-deps --wheel-dir $(VENV)/wheel
	$(VENV)/bin/python -m pip install -q --force-reinstall --no-deps $(VENV)/wheel/*.whl
	$(VENV)/bin/python -m pip install -q "$$(echo $(VENV)/wheel/*.whl)[test,lint]"
	$(VENV)/bin/python -P -c "import jax_flashmla; print(jax_flashmla.status())"
	touch $@
