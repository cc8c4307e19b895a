# From nothing to a green test run or a finished demo, on Debian or Ubuntu with Python 3.11 or newer: `make test`, `make demo`.
SHELL := /bin/bash
.DELETE_ON_ERROR:

PYTHON ?= $(shell command -v python3.11 || command -v python3)
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
APT_INSTALL := $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends
FASHION_MNIST := /usr/share/datasets/fashion-mnist

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-6s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: venv
venv: .venv/.installed ## system libraries that are missing, and rob with all it needs in .venv

.PHONY: lint
lint: .venv/.installed ## ruff and pyright
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright

.PHONY: test
test: lint ## lint, then all tests
	.venv/bin/pytest -n auto --dist worksteal

.PHONY: docs
docs: .venv/.installed ## the documentation, in build/site
	.venv/bin/pip install -q -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict  # with --quiet it would not count warnings

.PHONY: demo
demo: .venv/.installed ## the whole idea on Fashion-MNIST, in minutes
	@[ -d $(FASHION_MNIST) ] || { $(SUDO) apt-get update -qq && $(APT_INSTALL) dataset-fashion-mnist; } || echo "no Debian package of Fashion-MNIST: rob downloads it"
	.venv/bin/rob demo --overwrite

# pyright cannot follow the import hook of an editable install, hence the link (extraPaths in pyproject.toml).
.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rob needs Python 3.11 or newer: make PYTHON=/path/to/python3.11")'
	@$(install_system_libraries)
	$(PYTHON) -m venv .venv
	@echo "installing into .venv: 6.6 GB with torch's CUDA libraries, a few minutes"
	.venv/bin/pip install -q -c constraints.txt --upgrade pip
	.venv/bin/pip install -q -c constraints.txt -e '.[dev,export,ffcv,parquet,report,standin,tensorboard]'
	mkdir -p .venv/lint
	ln -sfn ../.. .venv/lint/rob
	touch $@

# What ffcv is compiled with, and what Debian leaves out of Python.
define install_system_libraries
version=$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
include=$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))'); \
missing=(); \
command -v g++ > /dev/null || missing+=(g++); \
command -v pkg-config > /dev/null || missing+=(pkg-config); \
pkg-config --exists libturbojpeg 2> /dev/null || missing+=(libturbojpeg0-dev); \
pkg-config --exists opencv4 2> /dev/null || missing+=(libopencv-dev); \
[ -e "$$include/Python.h" ] || missing+=("python$$version-dev"); \
$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || missing+=("python$$version-venv"); \
if [ "$${#missing[@]}" = 0 ] || [ "$$(uname)" != Linux ]; then exit 0; fi; \
if ! command -v apt-get > /dev/null; then echo "missing, install with your package manager: $${missing[*]}"; exit 1; fi; \
echo "installing $${missing[*]}"; \
$(SUDO) apt-get update -qq && $(APT_INSTALL) "$${missing[@]}"
endef
