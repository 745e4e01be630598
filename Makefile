# Entry points for users and developers; `make help` lists them.  Every target may be run again at once: an install
# is skipped while the files it is made from are unchanged, whatever their dates say.

VENV ?= .venv
# For a machine without a GPU: the package index that holds PyTorch's CPU builds (PyTorch's install page names it).
TORCH_INDEX ?=
# Further arguments of `helexa up` and of pytest, e.g. make up ARGS="--port 8000", make test ARGS="-k sampler".
ARGS ?=

# The first interpreter that is new enough and able to make virtual environments.
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
    $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
        && { echo $$python; break; }; done)

RUN := $(VENV)/bin/python
# Quiet but for the first time, when much is fetched and progress is worth seeing.
PIP := $(RUN) -m pip install --disable-pip-version-check -c constraints.txt $(if $(wildcard $(VENV)/installed-*),--quiet)
SOURCES := $(sort pyproject.toml constraints.txt CMakeLists.txt \
    $(shell find csrc python -type f ! -path '*/.*' ! -name '*.pyc' ! -name '*.so'))
KEY := $(shell { echo $(SOURCES) $(TORCH_INDEX); cat $(SOURCES); } | cksum | tr ' ' -)
# `make dev` leaves this file; from then on the package is installed in place.
EDITABLE := $(wildcard $(VENV)/editable)

.PHONY: help up test test-emulated test-cuda dev lint format clean
help:
	@echo 'make up      install, fetch the starter model, start gateway and neuron on loopback, and answer'
	@echo 'make test    install what the tests need and run them (ARGS="-k word" narrows them)'
	@echo 'make test-cuda      the tests of CUDA kernels and of models on them, on a device of this machine'
	@echo 'make test-emulated  the same on the host, kernels thread by thread: needs the headers of CUDA, no device'
	@echo 'make dev     install in place: Python edits count at once, C++ is rebuilt on import'
	@echo 'make lint    ruff, mypy and clang-format, changing nothing;  make format  changes the files'
	@echo 'make clean   remove the virtual environment and the build folder'

up: $(VENV)/installed-neuron-$(KEY)
	@exec $(VENV)/bin/helexa up $(ARGS)

test: $(VENV)/installed-neuron,dev-$(KEY)
	@$(VENV)/bin/helexa pull starter || echo 'no starter model: the tests that need it are skipped'
	$(RUN) -m pytest -m "not cuda" $(ARGS)

test-cuda: $(VENV)/installed-neuron,dev-$(KEY)
	$(RUN) -m pytest -m cuda $(ARGS)

test-emulated: $(VENV)/installed-neuron,dev-$(KEY)
	@PATH="$(abspath $(VENV))/bin:$$PATH" cmake -S . -B build/emulated -G Ninja -DPython_EXECUTABLE="$(abspath $(RUN))" \
	    -DHELEXA_CUDA=EMULATED >build/emulated.log || { cat build/emulated.log; exit 1; }
	@PATH="$(abspath $(VENV))/bin:$$PATH" cmake --build build/emulated
	HELEXA_EMULATED=build/emulated $(RUN) -m pytest -m "cuda and not multigpu" $(ARGS)

dev: $(VENV)/ready
	@touch $(VENV)/editable
	@$(MAKE) --no-print-directory EDITABLE=1 '$(VENV)/installed-neuron,dev-$(KEY)'
	@echo 'installed in place; activate it with: . $(VENV)/bin/activate'

lint: $(VENV)/installed-neuron,dev-$(KEY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $$(find csrc -name '*.[ch]*')

format: $(VENV)/installed-neuron,dev-$(KEY)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(VENV)/bin/clang-format -i $$(find csrc -name '*.[ch]*')

clean:
	rm -rf $(VENV) build

# A file whose name holds the checksum of everything that the install is made from.
$(VENV)/installed-%-$(KEY): $(VENV)/ready
	@echo 'installing helexa[$*] into $(VENV) ...'
	@if [ -n '$(TORCH_INDEX)' ]; then $(PIP) --no-deps --index-url '$(TORCH_INDEX)' torch; \
	elif [ ! -e /dev/nvidia0 ] && ! $(RUN) -c 'import torch' 2>/dev/null; then \
	    echo 'no NVIDIA GPU found; if this fetches gigabytes of CUDA libraries, stop it and see TORCH_INDEX in README.md'; fi
	@$(PIP) --no-build-isolation $(if $(EDITABLE),-Ceditable.rebuild=true -e) '.[$*]'
	@rm -f $(VENV)/installed-*
	@touch '$@'
	$(if $(findstring dev,$*),@touch '$(VENV)/installed-neuron-$(KEY)')

# The environment with the build's own needs, which stay in it, so that a rebuild needs no network.
$(VENV)/ready:
	@[ -n '$(PYTHON)' ] || { echo 'helexa needs Python 3.11 or newer with its venv module (Debian: python3-venv); set PYTHON=/path/to/python'; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || { echo 'helexa needs a C++17 compiler (Debian: g++); set CXX=/path/to/compiler'; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' \
	    || { echo 'helexa needs the header files of $(PYTHON) (Debian: python3-dev)'; exit 1; }
	@echo 'making a virtual environment in $(VENV) with $(PYTHON) ...'
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) scikit-build-core pybind11 cmake ninja
	@touch $@
