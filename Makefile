# The Logit Book. `make help` says what there is.
PYTHON ?= python3
BIN := .venv/bin
SCALE ?= ci
SEED ?= 1
# chapters run in parallel, one thread each
PARALLEL := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TQDM_DISABLE=1

.PHONY: help book test lab chapter new bench lock clean
.DEFAULT_GOAL := help

help: ## say what each command does
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /make \1\t/' | expand -t 14

.venv/installed: requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps -e .
	touch $@

book: .venv/installed ## execute stale chapters and build the HTML book (FRESH=1 executes all)
	@status=0; $(BIN)/python -m lib.book run $(if $(FRESH),--fresh) || status=$$?; \
	$(BIN)/sphinx-build -q -j auto -c site chapters _build/html && echo "The book: file://$(CURDIR)/_build/html/index.html" && exit $$status

test: .venv/installed ## run every test: library, kernels, chapters (papermill and nbval), site
	$(PARALLEL) $(BIN)/pytest -n auto --dist loadscope --nbval --nbval-sanitize-with tests/nbval_sanitize.cfg tests chapters

lab: .venv/installed ## open the book in JupyterLab
	$(BIN)/jupyter lab chapters

chapter: .venv/installed ## run one chapter: C=<slug> [SCALE=full] [SEED=3]
	@notebook=$$($(BIN)/python -m lib.book path "$(C)") && mkdir -p _build/chapters && \
	$(BIN)/papermill "$$notebook" "_build/chapters/$(C).ipynb" -p scale $(SCALE) -p seed $(SEED)

new: .venv/installed ## start a planned chapter from the template: C=<slug>
	@$(BIN)/python -m lib.book new "$(C)"

bench: .venv/installed ## measure time and memory against named peers
	$(BIN)/python -m kernels.bench

lock: ## write requirements.lock from pyproject.toml, with a fresh environment
	rm -rf _build/lock && $(PYTHON) -m venv _build/lock
	_build/lock/bin/python -m pip install --quiet --upgrade pip
	_build/lock/bin/python -m pip install --quiet torch==2.13.0 triton==3.7.1 -e . --group test
	_build/lock/bin/python -m pip freeze --exclude-editable | sed -E 's/^(torch==[0-9.]+)\+.*/\1/; s/^triton==.*/&; platform_system == "Linux"/' > requirements.lock

clean: ## remove what was built (not the environment, not the cached models)
	rm -rf _build
