# Every target sets up what it needs in .venv by itself, and only once: with uv where it is installed,
# else with the standard library's venv and pip.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin/python
# $(call install,ARGUMENTS), with arguments that mean the same to uv and pip.
install = if uv --version >/dev/null 2>&1; then uv pip install --python $(BIN) $(1); \
	else $(BIN) -m pip install --disable-pip-version-check $(1); fi

.DEFAULT_GOAL := help
# Two installs into one environment must not run at the same time (make -j).
.NOTPARALLEL:
.PHONY: help demo demo-train test lint clean distclean

help:
	@echo "make demo        show what the shipped models do: run demo.py"
	@echo "make demo-train  train a small model and measure it: run demo_train.py"
	@echo "make test        run the tests"
	@echo "make lint        check style and formatting; installs no PyTorch"
	@echo "make clean       remove caches, demo_output and notebooks/output"
	@echo "make distclean   the same, and remove $(VENV)"
	@echo "$(VENV) is made with PYTHON, now '$(PYTHON)'; for another: make distclean, make PYTHON=python3.12 demo"

demo: $(VENV)/.installed-requirements
	$(BIN) demo.py

demo-train: $(VENV)/.installed-requirements
	$(BIN) demo_train.py

# One thread per process: the workers of pytest-xdist already share out the cores. The notebooks' cells are run as well.
test: $(VENV)/.installed-requirements $(VENV)/.installed-requirements-dev
	NOTEBOOKS_FAST=1 OMP_NUM_THREADS=1 $(BIN) -m pytest --numprocesses auto --maxprocesses 8 \
		--nbmake --nbmake-timeout=300 tests notebooks

lint: $(VENV)/.installed-requirements-dev
	$(BIN) -m ruff check .
	$(BIN) -m ruff format --check .

clean:
	rm -rf .pytest_cache .ruff_cache demo_output notebooks/output
	find . \( -path ./.git -o -path ./$(VENV) -o -path ./data \) -prune -o -name __pycache__ -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)

# The stamps are written last, so that what was interrupted is done again.
$(VENV)/.installed-requirements: requirements.txt $(VENV)/.created
	@echo "Installing $< into $(VENV)"
	@$(call install,-r $<)
	@$(BIN) -c "import cv2" 2>/dev/null || { \
		echo "OpenCV lacks a desktop's libraries, such as libGL, here; installing its build for servers"; \
		$(call install,--force-reinstall --no-deps opencv-python-headless); }
	@touch $@

$(VENV)/.installed-requirements-dev: requirements-dev.txt $(VENV)/.created
	@echo "Installing $< into $(VENV)"
	@$(call install,-r $<)
	@touch $@

$(VENV)/.created:
	@"$(PYTHON)" -c "" 2>/dev/null || { \
		echo "error: '$(PYTHON)' runs no Python; name one of 3.10 or newer, as in: make PYTHON=python3.12 demo" >&2; \
		exit 1; }
	@"$(PYTHON)" -c "import sys; sys.exit(sys.version_info < (3, 10))" || { \
		echo "error: '$(PYTHON)' is $$("$(PYTHON)" --version 2>&1);" \
			"name one of 3.10 or newer, as in: make PYTHON=python3.12 demo" >&2; \
		exit 1; }
	@if uv --version >/dev/null 2>&1; then \
		uv venv --quiet --seed --allow-existing \
			--python "$$("$(PYTHON)" -c 'import sys; print(sys.executable)')" $(VENV); \
	elif "$(PYTHON)" -c "import ensurepip, venv" 2>/dev/null; then \
		"$(PYTHON)" -m venv $(VENV); \
	else \
		echo "error: '$(PYTHON)' lacks its venv module: install it (Debian: apt install python3-venv), or uv" >&2; \
		exit 1; \
	fi
	@touch $@
