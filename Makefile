# SPDX-License-Identifier: Apache-2.0
# Two commands do everything: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
QUICKSTART := runs/quickstart-inputs
QUICKSTART_CHAT := runs/quickstart-chat-inputs

.DEFAULT_GOAL := help
.PHONY: help quickstart quickstart-chat test check format generate images e2e clean

$(VENV)/installed: constraints.txt requirements-quickstart.txt crds/pyproject.toml operator/pyproject.toml edge-agent/pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	# torch first and alone: with it in place nothing pulls a second build.
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --group dev \
		--editable ./crds --editable "./edge-agent[train]" --editable "./operator[local,tracking]"
	$(BIN)/pip install --quiet --no-deps --require-hashes --requirement requirements-quickstart.txt
	touch $@

$(VENV)/installed-chat: $(VENV)/installed requirements-quickstart-chat.txt
	$(BIN)/pip install --quiet --no-deps --require-hashes --requirement requirements-quickstart-chat.txt
	touch $@

help:  ## this list
	@sed -n 's/^\([a-z0-9-]*\):[^#]*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | awk -F '|' '{ printf "%-17s%s\n", $$1, $$2 }'

quickstart: $(VENV)/installed  ## the main job on this machine: four unequal nodes, a pretrained BERT
	$(BIN)/python -m fedpipe_operator.local.quickstart $(QUICKSTART)
	$(BIN)/fedpipe run crds/samples/01-quickstart.yaml --fleet $(QUICKSTART)/fleet.yaml

quickstart-chat: $(VENV)/installed-chat  ## a chat model over four unequal nodes, with its answers before and after
	$(BIN)/python -m fedpipe_operator.local.quickstart_chat $(QUICKSTART_CHAT)
	$(BIN)/fedpipe run crds/samples/06-quickstart-chat.yaml --fleet $(QUICKSTART_CHAT)/fleet.yaml
	$(BIN)/fedpipe report runs/quickstart-chat --prompts $(QUICKSTART_CHAT)/prompts.txt

test: $(VENV)/installed  ## every test
	@# The GPU's tests have it to themselves. The others run many at a time and compute on the CPU, a GPU is hidden
	@# from them; in the order of their folders: the few long ones of e2e and fault begin early, so that no worker idles.
	$(BIN)/pytest tests/gpu
	CUDA_VISIBLE_DEVICES= $(BIN)/pytest --numprocesses $$(($$(nproc) + 1)) --dist loadfile --no-loadscope-reorder --ignore tests/gpu tests

check: $(VENV)/installed  ## format, lint, types, layers, generated files
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	MYPYPATH=charts:crds/src:operator/src:edge-agent/src $(BIN)/mypy charts images --exclude charts/fedpipe/files
	$(BIN)/lint-imports
	$(BIN)/python -m fedpipe_api.crdgen --check crds
	$(BIN)/python charts/generate.py --check

format: $(VENV)/installed  ## write what `make check` asks of the format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

generate: $(VENV)/installed  ## rewrite the CRDs, the chart's copies, dashboards, tables and versions
	$(BIN)/python -m fedpipe_api.crdgen crds
	$(BIN)/python charts/generate.py
	$(BIN)/python tests/nvml/plans.py
	$(BIN)/python tests/bench/supported.py

images:  ## build the operator, probe and agent images
	images/build.sh

e2e: $(VENV)/installed  ## install the chart on the cluster that KUBECONFIG names and run a small job
	$(BIN)/python tests/e2e/cluster.py

clean:  ## remove the virtual environment and the runs
	rm -rf $(VENV) runs
