# `make demo`, `make demo-detreg`, `make reproduce` and `make test`; each sets up the virtual environment first.
PYTHON ?= python3
VENV ?= .venv
DEMO_DIR ?= outputs/demo
REPRODUCE_DIR ?= outputs/reproduce
PRESET ?= small
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo demo-detreg reproduce test clean

demo: $(VENV)/demo-installed
	$(VENV)/bin/python -m tools.demo --output_dir $(DEMO_DIR)

# What `make demo` does, passed over where it was done before, and DETReg.
demo-detreg: $(VENV)/detreg-installed
	$(VENV)/bin/python -m tools.demo --detreg --output_dir $(DEMO_DIR)

# The papers' comparisons in small, see docs/reproduction.md; goes on where it was stopped.
reproduce: $(VENV)/detreg-installed
	$(VENV)/bin/python -m tools.reproduce --preset $(PRESET) --output_dir $(REPRODUCE_DIR)

test: $(VENV)/test-installed
	$(VENV)/bin/python -m pytest tests -n auto --maxprocesses 4 --dist loadfile

$(VENV)/demo-installed: requirements.txt requirements/demo.txt | $(VENV)/bin/python
	$(PIP) -r requirements/demo.txt
	touch $@

$(VENV)/detreg-installed: requirements.txt requirements/demo.txt requirements/detreg.txt | $(VENV)/bin/python
	$(PIP) -r requirements/demo.txt -r requirements/detreg.txt
	touch $@

$(VENV)/test-installed: requirements.txt requirements/*.txt | $(VENV)/bin/python
	$(PIP) -r requirements/test.txt
	touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) $(DEMO_DIR) $(REPRODUCE_DIR)
