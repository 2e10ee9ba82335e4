# The few verbs people type. Everything lives in .venv; a verb is quick when that is up to date.
# What faceprint is compared with lives in .venv-bench, away from what it is tested with; engines that some tests
# run against live in .venv-engines.
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DOCS := $(VENV)/.docs
PEERS := .venv-bench
WITH_PEERS := '.[bench,parquet]'
WITH_ENGINES := '.[train,s3,ray,postgres,milvus]'
ENGINES := .venv-engines
PYTHON ?= python3

# Where this is set, every process of the tests would compile torch, and all else, again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-engines quick lint docs bench bench-peers clean

demo: $(READY)
	$(BIN)/faceprint demo

# One more than there are cores: a sixth of the time, a test waits for processes, servers and the disk.
WORKERS := $(shell echo $$(( $$(getconf _NPROCESSORS_ONLN) + 1 )))

# Tests of one file share fixtures, so they run in one process. Files run in the order of the folders: long ones
# first, so that no process ends with one of them.
test: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 4 --dist loadfile --no-loadscope-reorder --durations 30

# Tests against servers of others; `make test` skips those that are absent. nginx comes from the system.
test-engines: $(ENGINES)/.ready
	PATH="$(CURDIR)/$(ENGINES)/bin:$$PATH" $(ENGINES)/bin/python -m pytest tests/engines --durations 10

# What to run after each edit: files of tests that start no process, train nothing and draw no large samples.
QUICK := tests/database/test_filters.py tests/database/test_identity_names.py tests/index/test_brute_force.py \
	tests/system/test_manifests.py tests/docs/test_site.py tests/search/test_question.py tests/pages \
	tests/embedding/test_outcome.py tests/gallery/test_annotate.py
quick: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -x $(QUICK)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# A reference that leads nowhere, or a public name without a docstring, fails.
docs: $(DOCS)
	$(BIN)/python -m sphinx --builder html --fresh-env --fail-on-warning --keep-going --quiet docs docs/_build

bench: $(READY)
	$(BIN)/python -m benchmarks.first_steps
	$(BIN)/python -m benchmarks.store --rows 100000

bench-peers: $(PEERS)/.ready
	$(PEERS)/bin/python -m benchmarks.peers

clean:
	rm -rf $(VENV) $(PEERS) $(ENGINES) demo docs/_build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

# uv because it installs torch and its many parts in about a minute, and from its cache in seconds.
define environment
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(@D)/bin/uv pip install --quiet --python $(@D)/bin/python --editable $(1)
	touch $@
endef

$(READY): pyproject.toml
	$(call environment,'.[train]' --group dev)

$(DOCS): $(READY)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --group docs
	touch $@

$(PEERS)/.ready: pyproject.toml
	$(call environment,$(WITH_PEERS))

$(ENGINES)/.ready: pyproject.toml
	$(call environment,$(WITH_ENGINES) --group dev --group engines)
