# Everything that can be done here, each from a fresh clone; `make help` lists it.
PYTHON ?= python3
VENV   ?= .venv
PORT   ?= 8000
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
COVERED := core connection streams handler aio response
METADATA := settings.ini setup.py pyproject.toml

.DEFAULT_GOAL := help
.PHONY: help test lint frontends demo demo-caddy readme clean

help: ## say what can be done
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

test: lint frontends ## run everything: ruff, mypy, pytest, the notebooks, coverage
	$(BIN)/pytest -n auto --cov --cov-report= $(ARGS)
	@for o in $(COVERED); do $(BIN)/coverage report --include="fastcgi/$$o.py" --fail-under=95 || exit; done

lint: $(READY) ## run ruff and mypy
	$(BIN)/ruff check
	$(BIN)/mypy --strict fastcgi

frontends: ## install the web servers that the tests need, where that is allowed
	@sh tests/frontends/install.sh

demo: $(READY) ## run examples/hello.py behind the built-in front end
	@command -v caddy >/dev/null && echo "Caddy is here: \`make demo-caddy\` shows the same behind it." || true
	$(BIN)/fastcgi dev examples/hello.py --port $(PORT)

demo-caddy: $(READY) ## run examples/hello.py behind Caddy, as in Caddyfile.example
	@command -v caddy >/dev/null || { echo "Caddy is not installed; \`make demo\` needs nothing else." >&2; exit 1; }
	@echo "Caddy serves it at the address that Caddyfile.example begins with; Ctrl-C ends both."
	@$(BIN)/python examples/hello.py & app=$$!; trap 'kill $$app' EXIT; trap exit INT TERM; \
	 caddy run --adapter caddyfile --config Caddyfile.example

readme: $(READY) ## run the notebooks in place, and write README.md from nbs/index.ipynb
	$(BIN)/python nbs/refresh.py

clean: ## remove what the other targets made
	rm -rf $(VENV) build dist *.egg-info .coverage* htmlcov .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

$(READY): $(METADATA)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@
