PYTHON ?= python3
VENV := .venv
IN_VENV := $(VENV)/bin/
OLDEST := .venv-oldest-jax

.DEFAULT_GOAL := help
.PHONY: help demo test test-gpu-code lint format sanitize fuzz bench bench-gpu bench-quick clean

help: ## Show this list.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16

# .venv/test, say, is there once the extra "test" is installed, and anew when a source has changed.
SOURCES := pyproject.toml CMakeLists.txt $(wildcard build_backend/* csrc/*/*) $(shell find src -name '*.py*' -not -name '*.pyc')
$(VENV)/test $(VENV)/gpu-code $(VENV)/dev: export BATCHNORM_REQUIRE_NATIVE := 1

$(IN_VENV)python:
	@echo "Making $(VENV) with $$($(PYTHON) --version)."
	$(PYTHON) -m venv $(VENV)

$(VENV)/%: $(SOURCES) | $(IN_VENV)python
	@echo "Building batchnorm, and installing it with what its extra '$*' names in $(VENV)."
	$(IN_VENV)pip install '.[$*]'
	@touch $@

# The oldest JAX that pyproject.toml allows, where it has a wheel, and the oldest Flax and Equinox; all
# else it takes from .venv.
PRINT_SITE := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
$(OLDEST)/ready: Makefile pyproject.toml | $(IN_VENV)python
	@echo "Installing the oldest JAX that is supported in $(OLDEST)."
	$(PYTHON) -m venv --clear $(OLDEST)
	$(OLDEST)/bin/pip install "jax==0.6.2; python_version < '3.14'" \
	  "jax==0.7.1; python_version >= '3.14'" "flax==0.11.0" "equinox==0.13.2"
	$(IN_VENV)python $(PRINT_SITE) > "$$($(OLDEST)/bin/python $(PRINT_SITE))/all_else.pth"
	@touch $@

demo: $(VENV)/demo ## Train a network on handwritten digits in MLX and in JAX; writes demo.png.
	$(IN_VENV)python examples/demo.py --picture demo.png

# In two halves side by side, which take about as long. In the second, whose tests are of habits and
# derivatives, programs of JAX are compiled with fewer optimizations, and sooner.
OF_JAX := tests/test_doors.py tests/test_jax.py tests/test_jax_compat.py tests/test_jax_devices.py \
  tests/test_jax_programs.py tests/flax_nn
OF_LIBRARIES := tests/test_layers.py tests/test_linen.py tests/test_nnx.py tests/test_equinox.py
BESIDE := $(OF_LIBRARIES) tests/test_jax.py tests/test_jax_devices.py tests/test_jax_programs.py tests/test_keras.py
define RUN_BESIDE
export JAX_DISABLE_MOST_OPTIMIZATIONS=1; \
$(OLDEST)/bin/python -m pytest -p no:cacheprovider \
  -k "(jax or flax_nn or layers or linen or nnx or equinox) and not without-native" $(OF_JAX) $(OF_LIBRARIES); oldest=$$?; \
$(IN_VENV)python -m pytest -p no:cacheprovider $(BESIDE); test $$? -eq 0 -a $$oldest -eq 0
endef

test: $(VENV)/test $(OLDEST)/ready ## Run every test, and those of JAX with its oldest version, too.
	@echo "Running half of the tests, and beside them the others and those with the oldest JAX, which follow."
	@{ $(RUN_BESIDE); } > $(OLDEST)/tests.log 2>&1 & beside=$$!; \
	$(IN_VENV)python -m pytest $(BESIDE:%=--ignore=%); half=$$?; \
	wait $$beside; beside=$$?; cat $(OLDEST)/tests.log; \
	test $$half -eq 0 -a $$beside -eq 0

# With Triton's own variable its kernels are interpreted; what they are compiled to is read beside that.
# Left out: a test of thousands of calls, and those that compare with what other stages compute, to the bit.
NOT_INTERPRETED := narrow_layers or holds_a_model or default_device or without_axes
COMPILED := tests/gpu_code/test_compiled.py
test-gpu-code: export TRITON_INTERPRET := 1
test-gpu-code: $(VENV)/gpu-code ## Test the kernels for GPUs without one: interpreted, and compiled to be read.
	@mkdir -p build; $(IN_VENV)python -m pytest -p no:cacheprovider $(COMPILED) > build/compiled.log 2>&1 & beside=$$!; \
	$(IN_VENV)python -m pytest -k "not ($(NOT_INTERPRETED))" --ignore=$(COMPILED) tests/gpu_code \
	  tests/test_doors.py tests/test_torch.py tests/test_torch_inputs.py tests/test_torch_derivatives.py; interpreted=$$?; \
	wait $$beside; beside=$$?; cat build/compiled.log; test $$interpreted -eq 0 -a $$beside -eq 0

lint: $(VENV)/dev ## Check formatting, types, style and who imports whom.
	$(IN_VENV)ruff format --check .
	$(IN_VENV)ruff check .
	$(IN_VENV)mypy
	PYTHONPATH=src $(IN_VENV)lint-imports --no-cache
	$(IN_VENV)clang-format --dry-run --Werror csrc/*/* tests/native/* benchmarks/*.cc

format: $(VENV)/dev ## Format Python and C++.
	$(IN_VENV)ruff format .
	$(IN_VENV)ruff check --fix .
	$(IN_VENV)clang-format -i csrc/*/* tests/native/* benchmarks/*.cc

# Frame pointers and -Og keep the reports readable (-O1 compiles twice as long). ThreadSanitizer cannot follow a fork.
SANITIZED := -DCMAKE_BUILD_TYPE=None \
  -DCMAKE_CXX_FLAGS="-Og -g1 -fno-omit-frame-pointer -fno-sanitize-recover=all -fsanitize=$$sanitizer"
sanitize: $(VENV)/dev ## Run the native tests under the address, undefined and thread sanitizers; fuzz for a minute.
	for sanitizer in address,undefined thread; do \
	  $(IN_VENV)cmake -S . -B build/$$sanitizer $(SANITIZED) && \
	  $(IN_VENV)cmake --build build/$$sanitizer --parallel && \
	  $(IN_VENV)ctest --test-dir build/$$sanitizer --output-on-failure || exit 1; \
	done
	$(MAKE) fuzz SECONDS=60

# A package of its own, whose native module has the sanitizers; Python has not, and so loads them first.
SECONDS ?= 180
SEED ?=
FUZZED := build/fuzz
fuzz: $(VENV)/dev ## Make random calls under sanitizers, for three minutes or SECONDS=20, say.
	sanitizer=address,undefined && \
	  $(IN_VENV)cmake -S . -B $(FUZZED) -DSKBUILD=1 -DBATCHNORM_MLX=OFF \
	  -DPython_EXECUTABLE=$(CURDIR)/$(IN_VENV)python $(SANITIZED)
	$(IN_VENV)cmake --build $(FUZZED) --parallel
	mkdir -p $(FUZZED)/package
	cp -R src/batchnorm $(FUZZED)/package/
	cp $(FUZZED)/_cpu.*so $(FUZZED)/package/batchnorm/native/
	$(IN_VENV)python tests/fuzz.py --seconds $(SECONDS) $(SEED:%=--seed %) \
	  --package $(FUZZED)/package \
	  --preload "$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)"

bench: $(VENV)/bench ## Time the kernels and the layers beside their peers; writes docs/benchmarks.md.
	$(IN_VENV)python benchmarks/report.py

bench-gpu: $(VENV)/bench ## Time the PyTorch door on a GPU, if there is one; writes docs/benchmarks-gpu.md.
	$(IN_VENV)python benchmarks/gpu.py

bench-quick: $(VENV)/bench ## See that the benchmarks run.
	$(IN_VENV)python benchmarks/report.py --quick
	$(IN_VENV)python benchmarks/gpu.py --quick

clean: ## Remove what the other targets made.
	rm -rf $(VENV) $(OLDEST) build .hypothesis .mypy_cache .pytest_cache .ruff_cache demo.png
