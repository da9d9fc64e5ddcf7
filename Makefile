# The verbs of this project. Each does its whole set-up itself; run again, it takes seconds to get going.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := nse_tools tests benchmarks notebooks docs/site

.PHONY: demo test test-long bench figures docs lab lint model clean

demo: model            ## the main job: 100 edits in 5 rounds; table and figures into runs/demo
	$(BIN)/nse-tools demo --out runs/demo

test: model            ## every test, notebooks included
	$(BIN)/python -m pytest -m "not long" -n 2 --dist loadfile --durations=15
	$(BIN)/python -m pytest --nbmake --nbmake-timeout=900 notebooks

test-long: model       ## what takes long: more edits, more seeds
	$(BIN)/python -m pytest -m long

bench: model           ## every benchmark, engine beside the plain way; csv files into runs/bench
	$(BIN)/python benchmarks/run_all.py

figures: .venv/ready   ## every figure of README and docs anew, from stored results, into docs/images; no model
	$(BIN)/python -m nse_tools.figures.regenerate

docs: model            ## the documentation as a site in build/site; notebooks are executed if their copies are older than the code
	$(BIN)/python docs/site/build.py $(if $(QUICK),--quick)

lab: .venv/ready       ## JupyterLab on the notebooks
	$(BIN)/jupyter lab --notebook-dir=notebooks

lint: .venv/ready      ## style, types, and the floors of the house
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

clean:                 ## remove the environment and all runs
	rm -rf .venv runs
