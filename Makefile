# The verbs of this project. Each does its whole set-up itself; run again, it takes seconds to start.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := nse_tools experiments tests benchmarks notebooks docs/conf.py

.PHONY: demo check test test-long bench figures docs lab lint model clean

demo: model            ## the main job: 100 edits in 5 rounds; table and figures in runs/demo
	$(BIN)/nse-tools demo --out runs/demo

check: lint test       ## what a change has to pass

test: model            ## every test, each notebook once; notebooks first, because they take longest
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest notebooks tests --nbmake --nbmake-timeout=900 -m "not long" \
		-n 2 --dist loadfile --no-loadscope-reorder --durations=15

test-long: model       ## what takes hours: more edits, seeds, architectures, kills, damaged files
	$(BIN)/python -m pytest -m long

bench: model           ## every benchmark, engine next to the plain implementation; csv files in runs/bench
	$(BIN)/python benchmarks/run_all.py

figures: .venv/ready   ## every figure of README and docs, from stored results, into docs/images; no model
	$(BIN)/python -m experiments.regenerate

docs: $(if $(QUICK),.venv/ready,model)  ## the documentation as a site in build/site; QUICK=1 executes no notebook
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going -c docs $(if $(QUICK),-D nb_execution_mode=off) . build/site

lab: .venv/ready       ## JupyterLab on the notebooks
	$(BIN)/jupyter lab --notebook-dir=notebooks

lint: .venv/ready      ## format, style, types, order of packages
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports

model: .venv/ready     ## fetch and convert the embedded model, once
	@$(BIN)/python -c "import nse_tools.models.embedded as e; e.embedded_model_folder()"

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[ui,ability,share,export,cluster,docs,dev]"
	touch $@

clean:                 ## remove the environment, the site and all runs
	rm -rf .venv build runs
