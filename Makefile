# Two commands matter: `make demo` (install + the whole way from raw video to a Gaussian scene)
# and `make test`. Everything lives in .venv; nothing is installed on the machine itself.
PYTHON ?= python3
# What is installed beside the core; a list of pyproject's extras: make install EXTRAS=gpu,viewer
EXTRAS ?= dev
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo test test-slow lint format docs build clean

install: $(STAMP)

# The stamp is written last, so an interrupted install is done again.
$(STAMP): requirements.txt constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(not (3, 11) <= v < (3, 14))' || \
		{ echo "error: see3d_jax needs Python 3.11, 3.12 or 3.13; point PYTHON at one: make install PYTHON=python3.11" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ echo "error: cannot create $(VENV); on Debian: apt-get install python3-venv" >&2; exit 2; }
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@$(BIN)/python -m data_prep.install_detector || \
		echo "note: everything else is installed; curation uses OpenCV's weaker detector until that works" >&2
	@touch $(STAMP)

demo: install
	$(BIN)/python -m tools.demo --output demo_output

# A file's tests run in one process, for many share a fixture that takes long.
test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

test-slow: install
	$(BIN)/python -m pytest -m slow

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The documentation as a site, from disk: site/index.html. A dead link is an error.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

# A wheel and a source archive in dist/.
build: install
	$(BIN)/python -m build --no-isolation --outdir dist .

clean:
	rm -rf $(VENV) demo_output build dist site *.egg-info
