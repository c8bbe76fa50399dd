# The three targets a user needs: quickstart, test, check. `make help` lists all.

PYTHON ?= python3
# torch's build, as pip understands it: make quickstart TORCH="torch==2.13.0 --index-url ..."
TORCH  ?= torch==2.13.0
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: help install install-tests quickstart test test-matrix test-cluster check mutations format clean

help:
	@echo "make quickstart [TORCH=...]  install, fetch a corpus, train, resume, evaluate, generate, report, export"
	@echo "make test                    the tests (CPU, no network, at most 15 minutes on 2 cores)"
	@echo "make test-matrix             the rest of the layout matrix (at most 25 minutes on 2 cores)"
	@echo "make test-cluster            launchers on clusters of this machine: root, Slurm, sshd (about 10 minutes)"
	@echo "make check                   format, lint, types, floors, links"
	@echo "make mutations               plant faults in copies of the code and see the tests fail (some minutes)"
	@echo "make format                  mend the format"

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	# All at the tested versions but torch, whose build may be another, and triton, which comes with those for GPUs.
	grep -v -e '^torch==' -e '^triton==' constraints.txt > $(VENV)/constraints.txt
	$(BIN)/pip install --quiet --constraint $(VENV)/constraints.txt $(TORCH)
	$(BIN)/pip install --quiet --constraint $(VENV)/constraints.txt --editable '.[dev]'
	@touch $@

# What only tests need: lm-evaluation-harness, DeepSpeed, schemas of Kubernetes, and Triton's interpreter.
$(VENV)/installed-tests: $(VENV)/installed
	$(BIN)/pip install --quiet --constraint $(VENV)/constraints.txt --editable '.[dev,eval,deepspeed,cluster]'
	@$(BIN)/python -c 'import triton' 2> /dev/null || $(BIN)/pip install --quiet "$$(grep '^triton==' constraints.txt)"
	@touch $@

install: $(VENV)/installed

install-tests: $(VENV)/installed-tests

quickstart:
	@echo "[1/12] make $(VENV)/ and install $(TORCH) and the packages of constraints.txt"
	@began=$$(date +%s); $(MAKE) --no-print-directory install TORCH='$(TORCH)'; \
	echo "      ($$(( $$(date +%s) - began )) s)"
	@$(BIN)/python -m launch.quickstart

test: install-tests
	# The documents are read in `make check`.
	$(BIN)/python -m pytest -m "not matrix and not cluster" --ignore tests/test_documents.py

test-matrix: install-tests
	$(BIN)/python -m pytest -m "matrix and not cluster"

# Programs that are not Python's: apt-get install slurm-wlm munge openssh-server pdsh iproute2 libaio-dev. What is not there, or
# may not be started, is skipped with the reason.
test-cluster: install-tests
	$(BIN)/python -m pytest -m cluster -rs

check: install-tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m pytest tests/test_documents.py

mutations: install-tests
	$(BIN)/python -m tests.mutations

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) runs data
