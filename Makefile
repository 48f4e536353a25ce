# Each target is one line to read. `make demo` and `make test` work on a fresh machine.
PYTHON ?= python3
VENV   := .venv/bin
DATA   ?= data
BENCH_PYTHON ?= $(VENV)/python
SERMLL_CORPORA ?= corpora
export OMP_NUM_THREADS ?= 1

.PHONY: setup demo matrix-small test unit ray cluster-test gpu-test check fmt audio bench bench-gpu bench-campaign audit clean

setup: .venv/installed  ## make .venv and install everything, pinned
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "sermll needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv .venv
	@echo "installing into .venv (about 6 GB, some minutes the first time)"
	$(VENV)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup  ## the main job on the built-in corpus: prepare, train and score every fold, report
	$(VENV)/sermll prepare synthetic --out $(DATA)/synthetic
	$(VENV)/sermll train experiments/synthetic.yaml data.path=$(DATA)/synthetic

matrix-small: setup  ## cross-corpus matrix of synthetic, RAVDESS and EMO-DB; SERMLL_CORPORA holds ravdess/ and emodb/
	$(VENV)/sermll prepare synthetic --out data/synthetic
	test -d data/ravdess || $(VENV)/sermll prepare ravdess --root $(SERMLL_CORPORA)/ravdess --out data/ravdess
	test -d data/emodb || $(VENV)/sermll prepare emodb --root $(SERMLL_CORPORA)/emodb --out data/emodb
	$(VENV)/sermll matrix experiments/cross_corpus.yaml

test: unit ray  ## every test that needs no recordings

unit: setup  ## fast tests, no Ray
	$(VENV)/python -m pytest -q -m 'not ray and not audio and not cluster and not gpu'

ray: setup  ## tests on a real Ray cluster on this machine
	$(VENV)/python -m pytest -q -m 'ray and not audio and not gpu'

cluster-test: setup  ## jobs and faults on clusters of several nodes on this machine
	$(VENV)/python -m pytest -q -m cluster

gpu-test:  ## tests on a GPU; with BENCH_PYTHON, of another environment that has torch and Ray
	PYTHONPATH=. $(BENCH_PYTHON) -m pytest -q tests/ray/test_gpu.py

audio: setup  ## tests on real recordings, where SERMLL_CORPORA has them
	$(VENV)/python -m pytest -q -m audio

bench: setup  ## measurements beside other libraries, 15 minutes on two cores; writes benchmarks/results
	$(VENV)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,bench]'
	$(VENV)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps audiomentations
	$(VENV)/python benchmarks/cpu.py

bench-gpu:  ## the same on one GPU, 8 minutes; with BENCH_PYTHON, no .venv is needed, only torch and transformers
	PYTHONPATH=. $(BENCH_PYTHON) benchmarks/gpu.py

bench-campaign: setup  ## what a campaign costs beyond training, what a feature bank saves, without peers: 15 minutes
	$(VENV)/python benchmarks/campaign.py
	$(VENV)/python benchmarks/bank.py

check: setup  ## format, lint, types, floors
	$(VENV)/ruff format --check .
	$(VENV)/ruff check .
	$(VENV)/pyright --pythonpath $(VENV)/python
	$(VENV)/lint-imports

audit: setup  ## known vulnerabilities of the pinned packages; asks an advisory service on the internet
	$(VENV)/pip-audit --strict --no-deps --disable-pip --progress-spinner off -r constraints.txt

fmt: setup  ## format the code
	$(VENV)/ruff format .
	$(VENV)/ruff check --fix .

clean:  ## remove what the targets made, but for the data and runs
	rm -rf .venv .pytest_cache .ruff_cache build *.egg-info
