# `make lab` to learn, `make test` to check. The first run makes .venv and installs the versions in constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
AS_ROOT := $(if $(filter 0,$(shell id -u)),--allow-root)

help:               ## what can be made
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:[^#]*##/:/'

install: .venv/installed  ## make .venv and install the tested versions, if not yet done

lab: install        ## open the course in JupyterLab (on the real weights: QWEN_NB_MODEL=Qwen/Qwen3-0.6B make lab)
	@echo "Opening JupyterLab on nbs/index.ipynb. Ctrl-C here stops it."
	@$(BIN)/jupyter lab $(AS_ROOT) nbs/index.ipynb

build: install      ## write a Qwen yourself: begin or go on with the building edition in my_qwen/
	@$(BIN)/qwen-nb build --lab

test: install       ## all checks and tests
	@$(BIN)/python tools/test.py

test-browser: .venv/installed-browser  ## move and time every slider, type at the chat: JupyterLab in a real browser, if there is one
	@$(BIN)/python -m pytest -q -rs -m browser tests/browser

site: .venv/installed-site  ## the course as a site, in build/site/html
	@$(BIN)/python tools/make_site.py

site-open: .venv/installed-site  ## the same, and look at it
	@$(BIN)/python tools/make_site.py --open

notebooks: install  ## run the notebooks, store what they show, export the modules, write the README
	$(BIN)/nbdev-export
	$(BIN)/python tools/notebooks.py
	$(BIN)/python tools/building.py
	$(BIN)/python tools/course.py
	$(BIN)/python tools/readme.py

clean:              ## remove .venv and what was built
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache tests/browser/shots

.venv/installed: constraints.txt settings.ini setup.py pyproject.toml
	@$(PYTHON) tools/python_ok.py
	@echo "Installing the tested versions into .venv: a few minutes the first time."
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv
	@$(PIP) -e '.[dev]'
	@echo "Installed."
	@touch $@

.venv/installed-browser: .venv/installed
	@echo "Installing Playwright, which drives the browser, into .venv."
	@$(PIP) -e '.[browser]'
	@touch $@

.venv/installed-site: .venv/installed
	@echo "Installing Sphinx, which makes the site, into .venv."
	@$(PIP) -e '.[site]'
	@touch $@

.PHONY: help install lab build test test-browser site site-open notebooks clean
