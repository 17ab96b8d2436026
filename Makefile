# Each target makes its own environment: `make demo` and `make test` work in a bare clone.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint tables clean

demo: .venv/.done
	$(BIN)/python train.py --config configs/ticoserec/demo.yaml

test: .venv/.done
	$(BIN)/python -m pytest -n auto --dist worksteal

lint: .venv/.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

tables: .venv/.done
	$(BIN)/python -m zoo.common.tables

clean:
	rm -rf runs build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache

.venv/.done: pyproject.toml constraints.txt
	@echo "Preparing the environment in .venv (once, a few minutes) ..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@
