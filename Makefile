# On a fresh machine:  make demo   make test
# Each sets up .venv first (Python 3.10 where there is one). What may be set:
#   BACKENDS="torch paddle"   frameworks to install and use; empty for none     (default: all three)
#   PYTHON=/usr/bin/python3   interpreter to build the environment with         (default: searched)
#   VENV=.venv                where the environment is
SHELL := bash
.DEFAULT_GOAL := help
.PHONY: help demo demo-all results test parallel soak fuzz bench gpu-check lint test-paddle26 test-onnx

VENV ?= .venv
BACKENDS ?= torch oneflow paddle
comma := ,
space := $(subst ,, )
backends := $(sort $(filter-out none,$(subst $(comma),$(space),$(BACKENDS))))
stamp = $(VENV)/stamp-$(subst $(space),-,$(or $(strip $(backends)),core))
python = $(VENV)/bin/python
inputs := setup.cfg pyproject.toml $(wildcard constraints/*.txt scripts/*.sh)
# A stamp holds the backends that could be installed. Naming them to the tests makes one that is
# missing or broken fail, where it would be left out otherwise.
under_test = TRIPTYCH_BACKENDS="$$(cat $(stamp))"
# The frameworks' own defaults oversubscribe a machine that runs three of them.
export OMP_NUM_THREADS ?= $(shell python3 -c 'import runpy; \
	print(runpy.run_path("core/machine/environment.py")["cores"]())' 2>/dev/null || getconf _NPROCESSORS_ONLN)

help:  ## this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(stamp): $(inputs)
	scripts/setup.sh $@ constraints/pins.txt dev $(backends)

demo: $(stamp)  ## the same spec on every backend, then the curves side by side in runs/demo
	$(python) tools/demo.py $$(cat $(stamp))

demo-all: $(stamp)  ## every short recipe of the digits on every backend, in runs/demo-all
	$(python) tools/demo.py --all $$(cat $(stamp))

results: $(stamp)  ## what is missing of docs/results.md: hours, in which it may be ended and run again
	$(python) tools/results.py

# Two processes side by side: most tests are too small for a second thread. A process may hold three
# frameworks, so there are no more than two, whatever the number of cores.
test: $(stamp)  ## the test suite
	$(under_test) $(python) -m pytest -n $$(( OMP_NUM_THREADS > 1 ? 2 : 1 )) --dist loadfile

parallel: $(stamp)  ## what make test leaves out of several processes: more of them, longer runs, kills
	$(under_test) $(python) -m pytest -m parallel

soak: $(stamp)  ## long campaigns, such as kills at random moments, and large cases of all tests
	$(under_test) $(python) -m pytest -m soak

fuzz: $(stamp)  ## 100,000 damaged files of weights, 2,000 changed ones: no crash, hang, bomb or execution
	$(python) tests/support/fuzz.py 100000
	$(python) tests/support/fuzz_trees.py 2000

bench: $(stamp)  ## speed beside plain loops and other programs, in docs/speed.md; may be ended and run again
	$(python) tools/bench.py speed

gpu-check: $(stamp)  ## eight minutes on a GPU: numbers, determinism, waits, copies, speed, in runs/gpu
	$(python) tools/bench.py gpu --out runs/gpu

lint: $(stamp)  ## style and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy -p triptych.core -p triptych.backends

test-paddle26: .venv-paddle26/stamp  ## the Paddle backend's tests on PaddlePaddle 2.6.2
	TRIPTYCH_BACKENDS=paddle .venv-paddle26/bin/python -m pytest -k "paddle or comparison"

.venv-paddle26/stamp: $(inputs)
	scripts/setup.sh $@ constraints/paddle26.txt dev paddle

test-onnx: .venv-onnx/stamp  ## ONNX files of PyTorch and Paddle, with the packages that they need
	TRIPTYCH_BACKENDS="torch paddle" .venv-onnx/bin/python -m pytest tests/test_sharing_export.py

.venv-onnx/stamp: $(inputs)
	scripts/setup.sh $@ constraints/pins.txt dev,onnx,onnx-paddle torch paddle
