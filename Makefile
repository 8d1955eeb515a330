# Two commands: `make demo` and `make test`. Both set up their own virtual environment first.
PYTHON ?= python3
VENV ?= .venv
DEMO_DIR ?= outputs/demo
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test clean

demo: $(VENV)/demo-installed
	$(VENV)/bin/python -m tools.demo --output_dir $(DEMO_DIR)

test: $(VENV)/test-installed
	$(VENV)/bin/python -m pytest tests -n auto --maxprocesses 4 --dist loadfile

$(VENV)/demo-installed: requirements.txt requirements/demo.txt | $(VENV)/bin/python
	$(PIP) -r requirements/demo.txt
	touch $@

$(VENV)/test-installed: requirements.txt requirements/*.txt | $(VENV)/bin/python
	$(PIP) -r requirements/test.txt
	touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) outputs data
