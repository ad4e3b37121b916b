# Everything that can be done here, each from a fresh clone; `make help` lists it.
PYTHON ?= python3
VENV   ?= .venv
PORT   ?= 8000
BIN    := $(VENV)/bin
COMPILED := $(VENV)-compiled
LIGHT  := $(VENV)/.light
READY  := $(VENV)/.ready
# with a process group of its own, as a terminal's Ctrl-C, which all get, would be a second signal beside ours
APART  := import os, sys; os.setpgrp(); os.execv(sys.argv[1], sys.argv[1:])
COVERED := core framing connection channel streams session handler flow aio aiosession response
METADATA := settings.ini setup.py pyproject.toml

.DEFAULT_GOAL := help
.PHONY: help test test-compiled bench lint frontends fuzz demo demo-caddy readme clean

help: ## say what can be done
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

test: lint frontends ## run everything: ruff, mypy, pytest, the notebooks, coverage
	$(BIN)/pytest -n auto --cov --cov-report= $(ARGS)
	@for o in $(COVERED); do $(BIN)/coverage report --include="fastcgi/$$o.py" --fail-under=95 || exit; done

test-compiled: $(READY) ## run the tests with the hot modules compiled by mypyc, in an environment of their own
	test -x $(COMPILED)/bin/python || $(PYTHON) -m venv $(COMPILED)
	FASTCGI_COMPILE=1 $(COMPILED)/bin/python -m pip install --quiet --disable-pip-version-check '.[dev]'
	$(COMPILED)/bin/pytest -n auto $(ARGS)

bench: $(READY) ## measure ours beside its peers; ARGS=--quick for a look, ARGS=--help for more
	$(BIN)/python benchmarks/run.py $(ARGS)

lint: $(READY) ## run ruff and mypy
	$(BIN)/ruff check
	$(BIN)/mypy --strict fastcgi

frontends: ## install the web servers that the tests need, where that is allowed
	@sh tests/frontends/install.sh

fuzz: $(READY) ## send a million streams to the engine, and thousands to live servers: for every night
	PYTHONPATH=tests:. $(BIN)/python -m fuzz $(ARGS)

demo: $(LIGHT) ## run examples/hello.py behind the built-in front end
	@command -v caddy >/dev/null && echo "Caddy is here: \`make demo-caddy\` shows the same behind it." || true
	$(BIN)/fastcgi dev examples/hello.py --port $(PORT)

demo-caddy: $(LIGHT) ## run examples/hello.py behind Caddy, as in Caddyfile.example
	@command -v caddy >/dev/null || { echo "Caddy is not installed; \`make demo\` needs nothing else." >&2; exit 1; }
	@$(BIN)/python -c "$(APART)" $(BIN)/python examples/hello.py & app=$$!; \
	 sed 's/:8000/:$(PORT)/' Caddyfile.example | caddy run --adapter caddyfile --config - & web=$$!; \
	 trap 'kill $$app $$web 2>/dev/null; wait' EXIT; trap 'exit 0' INT TERM HUP; \
	 port='import socket; socket.create_connection(("127.0.0.1", $(PORT)), 1)'; told=; \
	 while sleep .2; kill -0 $$app 2>/dev/null && kill -0 $$web 2>/dev/null; do \
	   test "$$told" || ! $(BIN)/python -c "$$port" 2>/dev/null || \
	     { told=1; echo "examples/hello.py is behind Caddy at http://127.0.0.1:$(PORT)/  (Ctrl-C ends both)"; }; \
	 done; echo "One of the two has ended: it says why above." >&2; exit 1

readme: $(READY) ## run the notebooks in place, and write README.md from nbs/index.ipynb
	$(BIN)/python nbs/refresh.py

clean: ## remove what the other targets made
	rm -rf $(VENV) $(COMPILED) .venv-peers build dist *.egg-info .coverage* htmlcov .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

$(LIGHT): $(METADATA)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(READY): $(LIGHT)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@
