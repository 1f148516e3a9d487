# `make repro` and `make test` need nothing but Python 3.11 or later, pip and git.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# Over three processes, of which one often waits, in the order of tests/conftest.py; the tests of a
# file share what is slow to make, and stay in one.
SPREAD := -n 3 --dist loadfile --no-loadscope-reorder

CHECK := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14) and "expected Python 3.11 to 3.13, got " + sys.version)

.PHONY: help env repro submit search test check soak ui report paper clean
help:  ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

env: $(STAMP)  ## build or update .venv
$(STAMP): pyproject.toml
	$(PYTHON) -c '$(CHECK)'
	$(BIN)/python -c '$(CHECK)' 2> /dev/null || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

repro: $(STAMP)  ## the whole pipeline on the parameters in params.yaml, then its table
	PATH="$(CURDIR)/$(BIN):$$PATH" dvc repro
	@$(BIN)/python -m bnncore.report
	@echo; echo "plots and tables: $(CURDIR)/reports    runs in MLflow: make ui"

submit: $(STAMP)  ## the pipeline as a job on a cluster: make submit RAY_ADDRESS=http://HEAD:8265 (docs/cluster.md)
	$(BIN)/python -m pipeline.submit $(SUBMIT)

search: $(STAMP)  ## the best ensemble under search.budget_kib; SEARCH='--trials 10 --finish' for options
	$(BIN)/python -m pipeline.search $(SEARCH)

test: $(STAMP)  ## the whole test suite
	$(BIN)/python -m pytest $(SPREAD)

check: $(STAMP)  ## format, lint, types and the fast tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -m 'not slow and not soak' -q $(SPREAD)

soak: $(STAMP)  ## the long versions of the kill and fuzz tests
	$(BIN)/python -m pytest -m soak

ui: $(STAMP)  ## MLflow's pages, on this machine only
	$(BIN)/python -m bnncore.tracking --ui

report: $(STAMP)  ## reports/index.html, one page that needs no network
	$(BIN)/python -m bnncore.report --html

paper: $(STAMP)  ## finished runs in the form of the papers' tables and figures: make paper RESULTS="DIR ..."
	$(BIN)/python -m bnncore.paper $(RESULTS)

clean:  ## remove what the pipeline's stages made; searches, MLflow's store, DVC's cache and .venv stay
	rm -rf models packed reports/*.* $(addprefix checkpoints/,inputs pretrain binarize ensemble-train)
