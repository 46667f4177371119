# make demo: set everything up, train a small ResNeXt (a minute, no download), evaluate it, draw its curve.
# make test: set everything up, check the style, run the tests (some minutes on 2 cores).

PYTHON ?= python3
RUN := .venv/bin/python

demo: .venv/ready
	$(RUN) train.py --config demo.yaml --resume
	$(RUN) evaluate.py runs/demo
	$(RUN) scripts/plot_curves.py runs/demo

test: .venv/ready-for-tests
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	$(RUN) -m pytest

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q --disable-pip-version-check -r requirements.txt
	touch $@

.venv/ready-for-tests: .venv/ready requirements-dev.txt
	.venv/bin/pip install -q --disable-pip-version-check -r requirements-dev.txt
	touch $@

.PHONY: demo test
