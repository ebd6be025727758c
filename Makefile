# make demo    a real language model answers a question through Tiny-GEMM, and the speed is compared with plain PyTorch
# make test    all tests that this machine can run
# make docs    the documentation site, into site/; open site/index.html, no server or network needed
# All set up ./.venv by themselves: once, and again when pyproject.toml or the constraints change.

unexport PYTHONDONTWRITEBYTECODE  # packages are installed without bytecode; the first run leaves it

VENV := .venv
FLAVOUR := $(shell scripts/setup.sh flavour)
SETUP := scripts/setup.sh pyproject.toml constraints/$(FLAVOUR).txt
DEMO_READY := $(VENV)/.ready-demo-$(FLAVOUR)
TEST_READY := $(VENV)/.ready-test-$(FLAVOUR)
DOCS_READY := $(VENV)/.ready-docs

# Tests run side by side, one thread each: small tensors gain nothing from more threads.
WORKERS := $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); echo $$((n > 8 ? 8 : n)))
PYTEST := $(VENV)/bin/python -m pytest -q
PARALLEL := -n $(WORKERS) --dist worksteal

.PHONY: demo test docs lint format clean help
.DEFAULT_GOAL := help

help:
	@sed -n '1,4s/^# //p' Makefile

demo: $(DEMO_READY)
	$(VENV)/bin/python examples/demo.py

# The interpreter is chosen when a kernel is decorated, so its tests have a process of their own. Every part runs, even
# after one has failed.
test: $(TEST_READY)
	@export OMP_NUM_THREADS=1; status=0; \
	echo "== kernels in Triton's interpreter"; \
	TRITON_INTERPRET=1 $(PYTEST) $(PARALLEL) -m interp || status=1; \
	if [ $(FLAVOUR) = gpu ]; then echo "== on the GPU"; $(PYTEST) $(PARALLEL) -m gpu || status=1; fi; \
	echo "== everything else"; \
	$(PYTEST) $(PARALLEL) -m "not interp and not gpu" || status=1; \
	exit $$status

# mkdocs.yml is strict: a link, an anchor or a figure that leads nowhere is an error.
docs: $(DOCS_READY)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build

lint: $(TEST_READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(TEST_READY)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis
	find tiny_gemm tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

$(DEMO_READY): $(SETUP)
	scripts/setup.sh install $(FLAVOUR) gguf,hf
	@rm -f $(VENV)/.ready-* && touch $@

$(TEST_READY): $(SETUP)
	scripts/setup.sh install $(FLAVOUR) dev
	@rm -f $(VENV)/.ready-* && touch $@ $(DEMO_READY) $(DOCS_READY)

$(DOCS_READY): $(SETUP)
	scripts/setup.sh docs
	@touch $@
