# make demo: set everything up, train a small ResNeXt (a minute, no download), evaluate it, plot its curve.
# make test: set everything up, check style and types, run the tests (about 20 minutes on 2 cores).
# make gpu: set everything up, run the GPU tests and measurements within MINUTES=25 (docs/gpu.md).
# make test-avx2: run the reduced-precision tests as on a CPU without AVX-512 and bf16 instructions.

PYTHON ?= python3
MINUTES ?= 25
RUN := .venv/bin/python

demo: .venv/ready
	$(RUN) train.py --config demo.yaml --resume
	$(RUN) evaluate.py runs/demo
	$(RUN) scripts/plot_curves.py runs/demo

test: .venv/ready-for-tests
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	$(RUN) -m pytest

test-avx2: .venv/ready-for-tests
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(RUN) -m pytest -k "bf16 or fp16 or precision"

gpu: .venv/ready-for-tests
	$(RUN) scripts/gpu.py --minutes $(MINUTES)

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q --disable-pip-version-check -r requirements.txt
	touch $@

.venv/ready-for-tests: .venv/ready requirements-dev.txt
	.venv/bin/pip install -q --disable-pip-version-check -r requirements-dev.txt
	touch $@

.PHONY: demo gpu test test-avx2
