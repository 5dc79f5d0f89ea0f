# Every target starts from a bare checkout: it builds the environment it needs, once, from pyproject.toml and
# constraints/. Python 3.11 or later is all that has to be there (3.12 for test-next).

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help demo test test-fast test-next test-page chromium soak harnesses eval proofs bitwise report results compiled \
    plans docs pictures lint clean

# The first of the candidates that starts (a pyenv shim may not), is new enough and can make an environment.
find_python = $(shell for p in $(2); do \
	"$$p" -c 'import ensurepip, sys; sys.exit(sys.version_info[:2] < (3, $(1)))' >/dev/null 2>&1 \
	&& { echo "$$p"; break; }; done)
PYENV_ROOT ?= $(HOME)/.pyenv
PYTHON ?= $(call find_python,11,python3.11 python3 python3.12 python3.13 $(wildcard $(PYENV_ROOT)/versions/3.1[1-3]*/bin/python3))
PYTHON_NEXT ?= $(call find_python,12,python3.12 $(wildcard $(PYENV_ROOT)/versions/3.12*/bin/python3))

# 3.11 has its own pins: jax and flax went on without it.
pins = constraints/py$$($(1)/bin/python -c 'import sys; print(min(312, 300 + sys.version_info[1]))').txt
install = $(1)/bin/pip install --quiet --disable-pip-version-check --constraint $(pins)
CPU_TORCH_INDEX := https://download.pytorch.org/whl/cpu

# Tests mostly compile, on one core each; a file stays in one process, which shares its fixtures and compiled programs.
WORKERS ?= 2
parallel := --numprocesses $(WORKERS) --dist loadfile

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: .venv/.runtime  ## train a tiny model, decode with it, check the result (CPU; no torch)
	.venv/bin/idlm demo

test: lint  ## lint and all tests but the longest (proofs) and those that need another machine's compiler
	.venv/bin/pytest $(parallel)

test-fast: .venv/.dev  ## tests that take seconds
	.venv/bin/pytest $(parallel) -m "not slow and not compile and not proof and not browser"

# Where a newer Python or jax is likely to break something: what is compiled for H200 and TPU, the decode loop, a training
# step, checkpoints, the engine's programs. `make proofs` adds what takes longer; everything else is tested on 3.11 alone.
next := compile model decoding/test_identity.py train/test_checkpoint.py train/test_step.py \
    $(addprefix serve/test_, compiled.py tensor_parallel_compiled.py)
next_proofs := $(addprefix decoding/test_, bitwise.py coupled.py kernels.py loop.py) \
    train/test_mesh.py train/test_objective.py $(addprefix serve/test_, engine.py tensor_parallel.py)

test-next: .venv-next/.dev  ## Python 3.12 and the newest jax: what they touch, without slow; compile for H200 and TPU
	.venv-next/bin/pytest $(parallel) -m "not torch and not slow and not proof and not browser" $(addprefix tests/,$(next))

CHROMIUM ?= /usr/bin/chromium

test-page: chromium .venv/.browser  ## the server's page in a headless Chromium (CHROMIUM=/usr/bin/chromium)
	CHROMIUM="$(CHROMIUM)" .venv/bin/pytest -m browser tests/serve/test_page_in_browser.py

chromium:
	@test -x "$(CHROMIUM)" || { echo "No Chromium at $(CHROMIUM). Install one (Debian: apt install chromium) or name it:" \
	    "make test-page CHROMIUM=/path/to/chromium" >&2; exit 1; }

soak: .venv/.dev  ## benchmarks/results/soak/: ten minutes of random traffic on the real server, which must come out clean
	.venv/bin/python -m benchmarks.soak

harnesses: .venv-eval/.installed .venv-evalscope/.installed  ## lm-eval and evalscope, for idlm eval --suite (docs/evaluation.md)

eval: .venv/.dev harnesses  ## both harnesses measure through the server, on questions of our own
	.venv/bin/pytest -m proof tests/serve/test_lm_eval.py tests/evaluation

proofs: .venv/.dev .venv-next/.dev harnesses  ## the longest tests: twenty kills, several processes, every mesh, the device kit, the demo
	.venv/bin/pytest $(parallel) -m "proof and not compile"
	.venv-next/bin/pytest $(parallel) -m "proof and compile"
	.venv-next/bin/pytest $(parallel) -m "not torch and not slow and not proof" $(addprefix tests/,$(next_proofs))

bitwise: .venv/.dev  ## benchmarks/results/bitwise/: AR and ISD in the bit-for-bit mode on 1,120 held-out prompts
	.venv/bin/python -m benchmarks.bitwise

report: .venv/.dev  ## docs/results.md and its pictures; measures anew what takes minutes (half an hour on two cores)
	.venv/bin/python -m benchmarks.report --measure

results: .venv/.dev  ## docs/results.md, from the committed results
	.venv/bin/python -m benchmarks.report

compiled: .venv-next/.dev  ## benchmarks/results/compiled/: every kernel compiled for H200 and TPU, without either
	JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1 .venv-next/bin/python -W ignore -m benchmarks.compiled

plans: .venv-next/.dev  ## benchmarks/results/plans.md: does every config fit its devices? (compiled, no accelerator)
	JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1 .venv-next/bin/python -W ignore -m benchmarks.plans

pictures: .venv/.dev  ## docs/images/*.svg of the concepts page, from the code that they explain
	.venv/bin/python -m benchmarks.pictures

docs: .venv-docs/.installed  ## site/: the documentation, with the reference from docstrings; any warning fails it
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

lint: .venv/.dev  ## ruff (rules, format) and pyright
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright

clean:  ## remove environments, caches and build outputs (never runs/ or out/)
	rm -rf .venv .venv-next .venv-eval .venv-evalscope .venv-docs site .cache build dist *.egg-info .pytest_cache .ruff_cache \
	    .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: a second call costs nothing, an edited requirement reinstalls.
.venv/.created:
	@test -n "$(PYTHON)" || { echo "No Python >= 3.11 with venv found. Install one (Debian: apt install python3.11-venv;" \
	    "macOS: brew install python@3.11) or name it: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	touch $@

.venv/.runtime: .venv/.created pyproject.toml $(wildcard constraints/*.txt)
	$(call install,.venv) --editable .
	touch $@

# PyPI's torch for Linux brings gigabytes of CUDA. A CPU wheel that pip already knows comes first, then PyTorch's own index.
.venv/.dev: .venv/.runtime
	$(call install,.venv) "torch==2.13.0+cpu" || $(call install,.venv) --extra-index-url $(CPU_TORCH_INDEX) torch
	$(call install,.venv) --editable ".[dev,parity]"
	touch $@

.venv/.browser: .venv/.dev
	$(call install,.venv) --editable ".[browser]"
	touch $@

# Apart from .venv: forty packages that nothing here imports. transformers is for its tokenizers; math and ifeval are
# what those tasks' scoring imports.
.venv-eval/.installed: $(wildcard constraints/*.txt)
	@test -n "$(PYTHON)" || { echo "No Python >= 3.11 with venv found: make eval PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv .venv-eval
	$(call install,.venv-eval) "lm_eval[api,math,ifeval]==0.4.13" transformers
	touch $@

# Apart from both: it pins the math_verify that it scores with, and brings ModelScope's client. What it pins is its own
# affair, so without our constraints.
.venv-evalscope/.installed: Makefile
	@test -n "$(PYTHON)" || { echo "No Python >= 3.11 with venv found: make harnesses PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv .venv-evalscope
	.venv-evalscope/bin/pip install --quiet --disable-pip-version-check "evalscope==1.14.1"
	touch $@

# Apart from .venv: nothing here imports them, and they import nothing of ours.
.venv-docs/.installed: docs/requirements.txt
	@test -n "$(PYTHON)" || { echo "No Python >= 3.11 with venv found: make docs PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/pip install --quiet --disable-pip-version-check --requirement docs/requirements.txt
	touch $@

.venv-next/.created:
	@test -n "$(PYTHON_NEXT)" || { echo "No Python 3.12 with venv found on PATH or under pyenv. Install one (apt install" \
	    "python3.12-venv; pyenv install 3.12) or name it: make test-next PYTHON_NEXT=/path/to/python3.12" >&2; exit 1; }
	$(PYTHON_NEXT) -m venv .venv-next
	touch $@

# The CUDA plugin is installed without its dependencies: a compiler needs neither cuDNN nor NCCL, which are gigabytes.
# jax-triton likewise: it asks for jax with CUDA.
.venv-next/.dev: .venv-next/.created pyproject.toml $(wildcard constraints/*.txt)
	$(call install,.venv-next) --editable ".[dev]" "jax[tpu]"
	$(call install,.venv-next) --no-deps jax-cuda13-plugin jax-cuda13-pjrt nvidia-cuda-nvcc \
	    jax-triton triton
	touch $@
