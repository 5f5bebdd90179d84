# The commands people type. Each target makes .venv and installs what is missing, so each is enough on its own.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: help demo demo-simmim test test-all lint format kernels gpu clean

help:
	@echo "make demo         train, interrupt, resume and evaluate a small Swin on handwritten digits (minutes, CPU)"
	@echo "make demo-simmim  pre-train one without labels, then fine-tune it on ten labels of each digit (minutes, CPU)"
	@echo "make test         the tests that every change must pass"
	@echo "make test-all     also the slow ones"
	@echo "make lint         style and format checks"
	@echo "make format       mend what the checks can mend"
	@echo "make kernels      compile and install the kernels: attention and MLPs on CPUs, and what --fused_window_process uses"
	@echo "make gpu          the GPU tests and benchmarks, with this machine's own python (PYTHON=...)"
	@echo "make clean        remove .venv and the digits; output/ stays"

$(INSTALLED): requirements.txt requirements-dev.txt constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV): a few GB, a minute or more ..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt -c constraints.txt
	touch $@

demo: $(INSTALLED)
	$(BIN)/python tools/demo.py

demo-simmim: $(INSTALLED)
	$(BIN)/python tools/demo_simmim.py

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-all: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "slow or not slow"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

kernels: $(INSTALLED)
	$(BIN)/python -m pip install --disable-pip-version-check --no-build-isolation ./kernels/window_attention
	$(BIN)/python -m pip install --disable-pip-version-check --no-build-isolation ./kernels/window_process
	$(BIN)/python -m pip install --disable-pip-version-check --no-build-isolation ./kernels/linear

gpu:
	$(PYTHON) benchmarks/gpu.py

clean:
	rm -rf $(VENV) datasets/digits datasets/digits-10
