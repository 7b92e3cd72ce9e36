# Every command a contributor runs. Targets that need the virtual environment make it first; `make` alone lists them.

PYTHON ?= python3
# Pass options on, e.g. `make test ARGS="-k philox"`.
ARGS ?=
# `make lock TORCH=<version>` moves the pin of torch; without it the pin stays as it is.
TORCH ?= $(shell sed -n 's/^torch==//p' requirements-torch.txt 2>/dev/null)

# For the interpreter and the static checks where torch brings no Triton of its own (its CPU builds).
TRITON ?= 3.9.0

VENV := .venv
LOCK_VENV := .venv-lock
OLDEST := .venv-oldest
BIN := $(VENV)/bin
# Written last, so a set-up that was cut short is not taken for a finished one.
STAMP := $(VENV)/.installed
# After a change to its sources the extension is built again; ninja compiles what the change concerns.
# CUDA for all architectures takes minutes: make ELLE_FAST_CUDA=1 builds it too.
export ELLE_FAST_CUDA ?= 0
NATIVE := $(VENV)/.native
SOURCES := setup.py elle_fast/__init__.py $(shell find csrc -type f -not -path '*/__pycache__/*')
C_FILES = $(shell git ls-files '*.c' '*.cpp' '*.cu' '*.cuh' '*.h')
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check
CHECK_PYTHON = $(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 10) or sys.exit( \
	"elle_fast needs Python 3.10 or newer, got %d.%d from $(PYTHON).\n" \
	"Choose another one with: make PYTHON=/path/to/python3 ..." % v[:2])'
# uv where it is there, which is faster, else pip: `make setup UV=` takes pip. uv does not read pip's variables, by which a
# machine may say where its own build of torch is.
UV ?= $(shell command -v uv 2>/dev/null)
ifneq ($(UV),)
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
MAKE_VENV = $(UV) venv --quiet --clear --python $(PYTHON) $(VENV)
INSTALL = $(UV) pip install --quiet --python $(BIN)/python
else
# Python itself says what to install where its venv module is missing.
MAKE_VENV = $(PYTHON) -m venv --clear $(VENV)
INSTALL = $(BIN)/python $(PIP_INSTALL)
endif

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-long test-fast test-integrations test-oldest bench bench-step bench-train bench-scale gpu-report paper detector-curves evidence evidence-pause evidence-resume detector-loop tables figures sanitize sanitize-asan sanitize-tsan lint format lock build clean guard-table guard-clock docs

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-17s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(NATIVE) ## make .venv: the locked dependencies and this checkout, editable

# Without dependencies: the lock file has them all, and nothing here may choose another version. torch comes last, for what
# it needs is there then, but the libraries of its own build, which requirements-torch.txt says nothing of.
$(STAMP): requirements.lock requirements-torch.txt pyproject.toml setup.py
	@$(CHECK_PYTHON)
	@if [ -f $@ ] && $(BIN)/python -c '' 2>/dev/null; then rm -f $@; \
	else echo "making $(VENV)"; $(MAKE_VENV); fi
	@echo "installing the packages of requirements.lock and requirements-torch.txt"
	@$(INSTALL) --require-hashes --no-deps -r requirements.lock
	@$(INSTALL) -r requirements-torch.txt
	@$(BIN)/python -c 'import importlib.util, sys; sys.exit(sys.platform == "linux" and not importlib.util.find_spec("triton"))' \
	|| $(INSTALL) triton==$(TRITON)
	@PYTHONWARNINGS="ignore:Editable installation" $(INSTALL) --no-deps --no-build-isolation --editable .
	@$(BIN)/python -m pip check --disable-pip-version-check
	@touch $@

$(NATIVE): $(STAMP) $(SOURCES)
	@$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

demo: $(NATIVE) ## the demonstration: FGSM and ELLE-A on digits
	@$(BIN)/python -m elle_fast.recipes.demo $(ARGS)

# The variable silences a notice about other projects of the theme's authors.
docs: $(STAMP) ## build the pages of docs/ into site/, with every warning an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet $(ARGS)
	@echo "open site/index.html"

# One thread per worker: two workers that each take every core slow each other down.
test: $(NATIVE) ## run the tests (ARGS="-k name" to choose)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --durations=10 -m "not long" $(ARGS)

test-long: $(NATIVE) ## the tests that make test leaves out: whole programs, compilers
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --durations=10 -m long $(ARGS)

# The files that `make test-fast` runs, less what is marked as slow or other_kernels.
CORE := $(addprefix tests/,ops/pack_points ops/elle_loss ops/test_philox.py ops/test_any_case.py loss step errors \
	test_adaptive.py test_attacks.py test_presets.py test_floors.py test_import.py)

test-fast: $(NATIVE) ## the core alone: the ops on the reference and one instruction set, the loss, the step
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --durations=10 -m "not slow and not other_kernels" $(CORE) $(ARGS)

test-integrations: $(NATIVE) ## the adapters with Lightning, transformers, accelerate and timm, and the examples
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --durations=10 tests/integrations tests/examples $(ARGS)

# torch and its CUDA libraries are 5 GB installed, as the registry has no other build of it for Linux on x86. That torch brings
# a Triton too old for the kernels, and itself calls what it has deprecated.
test-oldest: $(OLDEST)/.installed ## the core and a training on the oldest torch (PYTHON=python3.10: the oldest Python)
	ELLE_FAST_CUDA=0 $(OLDEST)/bin/python setup.py --quiet build_ext --build-lib $(OLDEST)/built --build-temp $(OLDEST)/temp
	export OMP_NUM_THREADS=1 ELLE_FAST_EXTENSION=$$(ls $(CURDIR)/$(OLDEST)/built/elle_fast/_C*.so) && \
	$(OLDEST)/bin/python -m pytest -n 2 --durations=10 -m "not slow and not other_kernels" -W ignore::FutureWarning \
	-p no:cacheprovider $(CORE) $(ARGS) && \
	$(OLDEST)/bin/python -m elle_fast train --epochs 2 --out $$(mktemp -d)/run

$(OLDEST)/.installed: requirements-oldest.txt
	@[ -x $(OLDEST)/bin/python ] || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python $(PIP_INSTALL) -r requirements-oldest.txt
	@touch $@

bench: $(NATIVE) ## time the ops on the CPU (ARGS="--only TEXT" to choose)
	$(BIN)/python -m benchmarks.ops.bench_ops $(ARGS)

bench-step: $(NATIVE) ## time a training step of each method (ARGS="--methods elle-a,gradalign" to choose)
	$(BIN)/python -m benchmarks.step.bench_step $(ARGS)

bench-train: $(NATIVE) ## time whole training epochs against the authors' trainer (ARGS="--quick" to try it)
	$(BIN)/python -m benchmarks.step.bench_train $(ARGS)

bench-scale: $(NATIVE) ## time and memory of a step against its sizes, ten minutes (ARGS="--quick" to try it)
	$(BIN)/python -m benchmarks.scale.bench_scale $(ARGS)

gpu-report: $(NATIVE) ## test, time and train on a GPU, in 11 minutes (ARGS="--dry-run" to try it without one)
	$(BIN)/python -m benchmarks.gpu.gpu_report $(ARGS)

paper: $(NATIVE) ## the paper's comparison, a grid of trainings (ARGS="--scale smoke --out smoke.json")
	$(BIN)/python -m benchmarks.paper.grid $(ARGS)

tables: $(STAMP) ## write the tables of README and docs from their JSON files (ARGS="--check" to look alone)
	@$(BIN)/python -m benchmarks.tables.write $(ARGS)

figures: $(NATIVE) ## draw the figures of benchmarks/results from their JSON files (ARGS="bench_ops.json" to choose)
	@$(BIN)/python -m benchmarks.tables.redraw $(ARGS)

detector-curves: $(NATIVE) ## judge detectors of a collapse on the recorded trainings (ARGS="--out curves.json")
	$(BIN)/python -m benchmarks.detector.curves $(ARGS)

evidence: $(NATIVE) ## long trainings in order of worth, at the lowest priority (ARGS="--root DATA")
	$(BIN)/python -m benchmarks.evidence.queue $(ARGS)

# Without $(NATIVE): what is to be timed may be in the middle of a change.
evidence-pause: ## stop make evidence for a while, and wait until it has
	@$(BIN)/python -m benchmarks.evidence.pause $(ARGS)

evidence-resume: ## let make evidence go on
	@$(BIN)/python -m benchmarks.evidence.pause --resume $(ARGS)

detector-loop: $(NATIVE) ## trainings with each rule of ELLE-A's detector (ARGS="--root DATA --only n-fgsm-eps16-seed0")
	$(BIN)/python -m benchmarks.detector.closed_loop $(ARGS)

guard-table: $(NATIVE) ## trainings with and without CollapseGuard (ARGS="--root DATA --only fgsm-eps16-seed0", or "--table")
	$(BIN)/python -m benchmarks.guard.trainings $(ARGS)

guard-clock: $(NATIVE) ## the time that CollapseGuard adds to a step, in four minutes
	$(BIN)/python -m benchmarks.guard.clock $(ARGS)

# The cpp backend's tests with an instrumented extension. Python and torch are not instrumented: the sanitizer's library goes
# first, and ThreadSanitizer is told to overlook them. It also wants addresses where it expects them, hence setarch.
sanitize: sanitize-asan sanitize-tsan ## the extension under AddressSanitizer, UndefinedBehaviorSanitizer, ThreadSanitizer

sanitize-asan: SANITIZERS := address,undefined
sanitize-asan: LIBRARY := libasan.so
sanitize-tsan: SANITIZERS := thread
sanitize-tsan: LIBRARY := libtsan.so
sanitize-asan sanitize-tsan: $(STAMP)
	CXXFLAGS="-O1 -g -fno-omit-frame-pointer -fsanitize=$(SANITIZERS) -fno-sanitize-recover=all" \
	LDFLAGS="-fsanitize=$(SANITIZERS)" ELLE_FAST_CUDA=0 \
	$(BIN)/python setup.py --quiet build_ext --build-lib build/$@ --build-temp build/$@
	extension=$$(ls $(CURDIR)/build/$@/elle_fast/_C*.so) && \
	libraries="$$($(CXX) -print-file-name=$(LIBRARY)) $$($(CXX) -print-file-name=libstdc++.so.6)" && \
	setarch -R env LD_PRELOAD="$$libraries" ELLE_FAST_EXTENSION=$$extension OMP_NUM_THREADS=1 \
	ASAN_OPTIONS=detect_leaks=0:halt_on_error=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
	TSAN_OPTIONS=halt_on_error=1:ignore_noninstrumented_modules=1 \
	$(BIN)/python -m pytest tests/ops tests/csrc -n 2 -p no:cacheprovider -k cpp $(ARGS)

lint: $(STAMP) ## ruff, clang-format and mypy, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(C_FILES)
	$(BIN)/mypy

format: $(STAMP) ## let ruff and clang-format lay out the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(C_FILES)

# For every platform and Python of pyproject.toml, with the hash of each file; versions stay as they are where they still fit.
# ARGS=--upgrade moves all of them, ARGS="--upgrade-package ruff" one. torch, torchvision and what only torch's builds bring
# are without hashes: a machine may have a build of its own, and pip takes hashes for all of a file or for none.
lock: ## write the requirements anew (TORCH=version to move torch, ARGS=--upgrade to move the rest)
	@test -n "$(TORCH)" || { echo "no version of torch in requirements-torch.txt: make lock TORCH=<version>" >&2; exit 1; }
	@[ -n "$(UV)" ] || { $(PYTHON) -m venv --clear $(LOCK_VENV) && $(LOCK_VENV)/bin/python $(PIP_INSTALL) uv; }
	@mkdir -p $(LOCK_VENV)
	@cp requirements.lock $(LOCK_VENV)/resolved.txt
	@echo "torch==$(TORCH)" > $(LOCK_VENV)/torch.txt
	$(or $(UV),$(LOCK_VENV)/bin/uv) pip compile --quiet --universal --python-version 3.10 --generate-hashes --no-annotate --no-header \
	--extra dev --constraint $(LOCK_VENV)/torch.txt --output-file $(LOCK_VENV)/resolved.txt $(ARGS) pyproject.toml
	@{ echo "# The exact packages of the development environment: the dev extra of pyproject.toml and what it needs, for Linux,"; \
	echo "# macOS and Windows, less torch and what its builds bring (requirements-torch.txt). \`make setup\` installs it;"; \
	echo "# \`make lock\` writes it: do not edit it by hand."; \
	awk '/^[a-z0-9]/ { kept = !/^(torch|torchvision|triton)==/ && !/^(nvidia|cuda)-/ } kept' $(LOCK_VENV)/resolved.txt; } > requirements.lock
	@{ echo "# The development environment's torch, whatever its build. \`make lock TORCH=<version>\` writes it."; \
	sed -n 's/^\(torch\(vision\)\{0,1\}==[0-9.]*\).*/\1/p' $(LOCK_VENV)/resolved.txt | sort -u; } > requirements-torch.txt
	$(or $(UV),$(LOCK_VENV)/bin/uv) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --no-header \
	--output-file .github/requirements.txt $(ARGS) .github/requirements.in
	@rm -rf $(LOCK_VENV)

build: $(STAMP) ## sdist and wheel into dist/
	$(BIN)/python -m build --no-isolation

clean: ## remove .venv, caches and build outputs
	rm -rf $(VENV) $(LOCK_VENV) $(OLDEST) build dist site *.egg-info elle_fast/_C*.so elle_fast/_build_failure.txt
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name .git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
