# make reproduce    run the notebooks headless and print their results
# make test         lint, types, unit tests, golden tests, and the notebooks under nbval: 10 to 15 minutes on two cores
# make test-all     that and what is marked slow, the notebooks as on other processors, and other versions
# make test-portable   the notebooks under nbval, computed as on other processors; PORTABLE=avx2 or plain chooses one
# make test-versions   the core's tests with the oldest and the newest versions of all that it needs; writes docs/install.md
# make test-real-size   the notebooks on random weights in Stable Diffusion 1.5's shape: hours on a CPU; ARGS="--pixels 256 00 03"
# make gpu-check    tests and times on a GPU, at most nine minutes; writes gpu_check/ and docs/gpu.md
# make support-table   run the tests of the supported pipelines and write docs/supported.md
# make docs         build the site into docs/_build/html, from the stored notebooks, offline
# make docs-links   check the links that lead out of the site, which needs the network
# make lab          open the notebooks in JupyterLab
# make notebooks    run the notebooks in place, to store new outputs
# make bench        time daamlib against plain loops; BENCH="--rows daam --repeats 1" and the like choose
# make bench-peers  the same beside the published package `daam`, in an environment of its own
# make constraints  resolve the newest versions that pyproject.toml allows and pin them; torch's pin stays
# make clean        remove the environment and caches (papermill_runs/ stays)
#
# Every target makes or updates .venv first when pyproject.toml or constraints.txt are newer than it.
# Choices for reproduce: MODEL= DEVICE= STEPS= GUIDANCE= N_IMAGES= SEED= JOBS= NOTEBOOKS="00 04", with NOTEBOOKS=06 also
# MASKS=, and any other parameter of the notebooks that run, PARAMS="-p KEEP_STEPS 50";
# for notebooks, test, test-all and test-portable: NOTEBOOKS="00 04"; for the last three also WORKERS= and DURATIONS=30,
# which prints the 30 slowest tests

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
TORCH := $(shell grep '^torch==' constraints.txt)

# A name on the path is not enough (version managers put stubs there), so each candidate is run.
IS_RECENT := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON := $(shell for p in python3.11 python3; do $$p -c '$(IS_RECENT)' >/dev/null 2>&1 && echo $$p && break; done)

# --nbval compares every printed text and value with the stored one, but for what notebooks/conftest.py takes out;
# the sanitising file masks durations. tests/test_notebooks.py reads this line.
NBVAL_FLAGS := --nbval --nbval-current-env --nbval-cell-timeout 1800 --nbval-sanitize-with notebooks/nbval_sanitize.cfg

# Copies are tested: beside the notebooks themselves lie the outputs of earlier runs, which a new one would go on from.
COPY_NOTEBOOKS = rm -rf nbval_run && mkdir nbval_run && cp $(CHOSEN) notebooks/conftest.py nbval_run

# Processes that test, a file or a notebook at a time. One thread each: two cost more than they give on small tensors.
WORKERS := 2
ONE_THREAD := OMP_NUM_THREADS=1
PYTEST = $(OFFLINE) $(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(if $(DURATIONS),--durations $(DURATIONS))

# What is stored and tested must never reach for a model on the hub; `make reproduce MODEL=...` may.
OFFLINE := HF_HUB_OFFLINE=1

# The files that `make notebooks` runs and the tests compare, by their numbers
CHOSEN = $(if $(NOTEBOOKS),$(foreach n,$(NOTEBOOKS),$(wildcard notebooks/$(n)_*.ipynb)),$(wildcard notebooks/[0-9]*.ipynb))

# Settings that make PyTorch, oneDNN and MKL compute as on another processor, so that sums round in another order
AS_avx2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 OMP_NUM_THREADS=2
AS_plain := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=AVX $(ONE_THREAD)
PORTABLE := avx2 plain

.PHONY: reproduce lint test test-all test-portable test-versions test-real-size gpu-check support-table docs docs-links \
  lab notebooks bench bench-peers constraints clean

reproduce: $(STAMP)
	@$(PY) -m daamlib_lab.runs \
	  $(if $(MODEL),--model "$(MODEL)") $(if $(DEVICE),--device "$(DEVICE)") \
	  $(if $(STEPS),--steps "$(STEPS)") $(if $(N_IMAGES),--n-images "$(N_IMAGES)") \
	  $(if $(SEED),--seed "$(SEED)") $(if $(GUIDANCE),-p GUIDANCE "$(GUIDANCE)") $(if $(MASKS),-p MASKS "$(MASKS)") \
	  $(PARAMS) $(if $(JOBS),--jobs "$(JOBS)") $(NOTEBOOKS)

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/pydoclint --quiet daamlib daamlib_lab training
	$(PY) -m mypy daamlib daamlib_lab training

# the notebooks first, because the last of what is long would run alone
test: lint
	$(COPY_NOTEBOOKS)
	$(ONE_THREAD) $(PYTEST) -m "not slow" $(NBVAL_FLAGS) nbval_run tests

# where there is a browser, the widgets must run in it
test-all: lint
	$(COPY_NOTEBOOKS)
	$(if $(shell command -v chromium),DAAMLIB_REQUIRE_BROWSER=1) $(ONE_THREAD) $(PYTEST) $(NBVAL_FLAGS) nbval_run tests
	$(MAKE) test-portable test-versions

test-portable: $(STAMP)
	$(foreach as,$(PORTABLE),$(COPY_NOTEBOOKS) && $(AS_$(as)) $(PYTEST) $(NBVAL_FLAGS) nbval_run &&) true

test-versions:
	$(PYTHON) tests/versions.py

test-real-size: $(STAMP)
	$(OFFLINE) $(PY) tests/real_size.py $(ARGS)

gpu-check: $(STAMP)
	$(OFFLINE) $(PY) tests/gpu_check.py $(ARGS)

support-table: $(STAMP)
	$(OFFLINE) $(PY) tests/support_table.py

SPHINX := -m sphinx --fail-on-warning --keep-going --quiet --conf-dir docs --doctree-dir docs/_build/doctrees

docs: $(STAMP)
	$(PY) $(SPHINX) --builder html . docs/_build/html
	@echo docs/_build/html/index.html

docs-links: $(STAMP)
	$(PY) $(SPHINX) --builder linkcheck . docs/_build/links

lab: $(STAMP)
	$(PY) -m jupyterlab notebooks

notebooks: $(STAMP)
	$(OFFLINE) CI=true $(PY) -m nbconvert --to notebook --execute --inplace \
	  --ExecutePreprocessor.record_timing=False $(CHOSEN)
	$(PY) notebooks/shrink_pictures.py $(CHOSEN)

bench: $(STAMP)
	$(OFFLINE) $(PY) tests/benchmarks/run.py $(BENCH)

# `daam` 0.2.0 works with the diffusers and transformers of its time only.
bench-peers: $(STAMP)
	test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet $(TORCH) daam==0.2.0 diffusers==0.21.2 \
	  transformers==4.30.2 accelerate==0.23.0 matplotlib
	.venv-peers/bin/python -m pip install --quiet --no-deps huggingface_hub==0.25.2
	$(OFFLINE) $(PY) tests/benchmarks/peers.py .venv-peers/bin/python

$(STAMP): pyproject.toml constraints.txt
	@test -x $(PY) || test -n "$(PYTHON)" || { echo "daamlib needs Python 3.11 or newer, as python3.11 or python3 on the PATH;" \
	  "found: $$(python3 --version 2>&1 || echo none)" >&2; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# A fresh environment without pins but torch's: another torch means new bits in every stored output, so it is changed by
# hand. `+cpu` and the like are cut off, so that the pins hold for every build of torch.
constraints:
	rm -rf .venv-pins
	$(PYTHON) -m venv .venv-pins
	.venv-pins/bin/python -m pip install --editable '.[dev]' $(TORCH)
	{ echo "# What '.[dev]' installs, pinned. Written by 'make constraints'; do not edit by hand."; \
	  echo "# The CUDA packages that torch brings on some platforms are pinned by torch itself."; \
	  .venv-pins/bin/python -m pip list --format=freeze --exclude-editable --exclude pip \
	    | sed 's/+[^+]*$$//'; } > constraints.new
	mv constraints.new constraints.txt
	rm -rf .venv-pins

clean:
	rm -rf $(VENV) .venv-pins .venv-peers .venv-oldest .venv-newest .venv-exports nbval_run docs/_build .pytest_cache .ruff_cache .mypy_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
