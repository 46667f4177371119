# make demo: set everything up, train a small ResNeXt (a minute, no download), evaluate it, draw its curve.
# make test: set everything up, check the style, run the tests (10 minutes on 2 cores).

PYTHON ?= python3
RUN := .venv/bin/python

demo: .venv/ready
	$(RUN) train.py --config demo.yaml --resume
	$(RUN) evaluate.py runs/demo
	$(RUN) scripts/plot_curves.py runs/demo

test: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	$(RUN) -m pytest

.venv/ready: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q --disable-pip-version-check -r requirements-dev.txt
	touch $@

.PHONY: demo test
