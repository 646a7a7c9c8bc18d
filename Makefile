# make install   into .venv, without a demo
# make demo   train, compress, prove and sample a small model (three minutes after installation)
# make test   lint and test, in JOBS processes (2; each test takes one thread and up to 2 GB)
# make test-full   every published recipe at full size, one step each, from data to score (10 GB, minutes)
# make test-cpus   tests that compare numbers, as on other CPUs: half an hour, then call it again to go on;
#                 AGAIN=1 starts over
# make test-faults   kills, full disks, failing reads and lost processes, hundreds of times: an hour at most, then call it
#                 again to go on; the table of docs/robustness.md
# make test-install   the wheel in fresh environments, also with what your index resolves its dependencies to (gigabytes)
# PYTHON names the interpreter that makes .venv; PIP_ARGS goes to pip.
#
# On a machine with a GPU, from a bare checkout, without network and without installing anything (torch, triton, pytest,
# numpy and matplotlib are enough; gpu-step also needs sentencepiece):
# make gpu-check PYTHON=python3 [OUT=folder]   the five below, in order, each within 8 minutes; the report at the end
# make gpu-test   the tests that are about a GPU; files that have none are not imported, because they need tyro, zstandard
#                 and brotli
# make gpu-bench  every kernel against eager, torch.compile and the measured roof
# make gpu-tune   the check and timing that impl="auto" reads, then the search for tiles
# make gpu-choose   what a run's first minutes do: try which execution of a step is fastest, recipe by recipe. A second
#                 call goes on
# make gpu-step   one training step: golfgpt against eager and the published form, recipe by recipe. DATA=folder
#                 trains on prepared text, not on made-up tokens
# Results go to OUT as JSON, written as they come. make gpu-check LIMIT=130 fits all into 10 minutes.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

JOBS ?= 2
OUT ?= bench/results
LIMIT ?= 400
GPU = PYTHONPATH=kernels:.$(if $(PYTHONPATH),:$(PYTHONPATH)) PYTHONUNBUFFERED=1 timeout --kill-after=10

.PHONY: install demo test test-full test-cpus test-faults test-install lint clean gpu-check gpu-test gpu-bench gpu-tune gpu-choose gpu-step

install: $(VENV)/installed

demo: $(VENV)/installed
	$(BIN)/golfgpt demo

test: lint
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

test-full: $(VENV)/installed
	$(BIN)/python -m pytest -m long

test-cpus: $(VENV)/installed
	$(BIN)/python tests/cpus.py --jobs $(JOBS) $(if $(AGAIN),--again)

test-faults: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m experiments.faults

test-install: $(VENV)/installed
	PIP_ARGS="$(PIP_ARGS)" $(BIN)/python -m pytest tests/test_install.py -m "slow or download"

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# torch first: what depends on it then finds it installed. The marker is newer than what it installs from.
$(VENV)/installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e ".[test]"
	touch $@

# A limit that is reached by itself ends in order; timeout is for what hangs.
gpu-test:
	$(GPU) 480 $(PYTHON) -m bench.gpu_test --seconds $(LIMIT) --out $(OUT)

gpu-bench:
	$(GPU) 480 $(PYTHON) -m bench.kernels --seconds $(LIMIT) --out $(OUT)

gpu-tune:
	$(GPU) 70 $(PYTHON) -m golfgpt_kernels tune --out $(OUT)
	$(GPU) 410 $(PYTHON) -m bench.tune --seconds $$(($(LIMIT) - 60)) --out $(OUT)

gpu-choose:
	$(GPU) 480 $(PYTHON) -m bench.step --choose --seconds $(LIMIT)

gpu-step:
	$(GPU) 480 $(PYTHON) -m bench.step --seconds $(LIMIT) --out $(OUT) $(if $(DATA),--data $(DATA))

gpu-check:
	failed=; for target in gpu-test gpu-bench gpu-tune gpu-choose gpu-step; do $(MAKE) $$target || failed="$$failed $$target"; done; \
	$(GPU) 60 $(PYTHON) -m bench.report --results $(OUT) || failed="$$failed report"; \
	if [ -n "$$failed" ]; then echo "failed:$$failed"; exit 1; fi

clean:
	rm -rf $(VENV) build *.egg-info
