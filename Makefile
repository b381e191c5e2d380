# make demo: set everything up and watch a small network's spectrum; make test: set everything up and run the tests.
# make pythons: set everything up, install wheel and sdist on every Python of this machine and use them there.
# make papers: set everything up, reproduce the papers and write docs/papers.md, some ten minutes.
# make docs: set everything up and build the documentation in site/, strictly.
# make bench: set everything up, compare with other libraries and time the fence, by hand (benchmarks/README.md).
# Needs Python 3.10 or newer and make, nothing else.
PYTHON ?= python3
VENV ?= .venv
BENCH_VENV ?= .venv-bench
BIN := $(VENV)/bin
# its dependency backpack declares torchvision, which neither needs here
CURVLINOPS = $(BIN)/python -m pip install -q --no-deps -c constraints.txt curvlinops-for-pytorch backpack-for-pytorch
# One thread per process: bitwise tests, and two cores shared with the processes of the distributed tests. Bytecode is kept,
# whatever the environment says, since the tests start many processes.
THREADS := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1

.PHONY: demo papers test pythons lint docs bench clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	$(CURVLINOPS)
	touch $@

$(VENV)/.installed-demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[examples]'
	$(CURVLINOPS)
	touch $@

demo: $(VENV)/.installed-demo
	$(BIN)/python examples/demo.py

papers: $(VENV)/.installed-demo
	$(THREADS) $(BIN)/python examples/papers/run_all.py

test: $(VENV)/.installed
	$(THREADS) $(BIN)/python -m pytest --numprocesses auto --dist loadfile --durations 30

pythons: $(VENV)/.installed
	$(THREADS) $(BIN)/python tests/installed/every_python.py

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(BENCH_VENV)/.installed: pyproject.toml benchmarks/requirements.txt
	$(PYTHON) -m venv $(BENCH_VENV)
	echo '*' > $(BENCH_VENV)/.gitignore
	$(BENCH_VENV)/bin/python -m pip install -q -e . -r benchmarks/requirements.txt
	touch $@

bench: $(BENCH_VENV)/.installed $(VENV)/.installed
	$(THREADS) $(BENCH_VENV)/bin/python benchmarks/peers.py
	$(THREADS) $(BIN)/python benchmarks/fence.py

clean:
	rm -rf $(VENV) $(BENCH_VENV) demo_output long_run_logs lightning_logs site
