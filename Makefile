# The Craft of Training: `make help` lists what there is. For Linux and macOS with GNU make and Python 3.11 or newer; the
# README says what to do without make, on Windows, and with conda.

# The first interpreter that runs, is new enough and can make environments; PYTHON=/path/to/python3.12 chooses another.
# Being on the PATH is not enough: version managers put names there that do not run.
NEW_ENOUGH := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
PYTHON  ?= $(shell for name in python3.11 python3.12 python3.13 python3.14 python3 python; do \
	"$$name" -c '$(NEW_ENOUGH)' >/dev/null 2>&1 && echo "$$name" && break; done)
VENV    := .venv
BIN     := $(VENV)/bin
STAMP   := $(VENV)/.installed
DOCS    := $(VENV)/.installed-docs
DEV     := $(VENV)/.installed-dev
KIT     := .venv-class
CLASS   ?= class
SITE    := docs/_build/html
PORT    ?= 8888
LEARNERS ?= 5
ARRIVAL ?= staggered
SECONDS ?= 1200
BROWSER ?= yes
FIRST   := /lab/tree/notebooks/00_start_here.ipynb

.DEFAULT_GOAL := help
.PHONY: help lab test run reset study confirm frames bench docs docs-serve docs-archive class-setup class-release class-autograde class-feedback class-slides hub class-passwords class-publish class-load class-progress class-timings class-bundle class-test clean
.SILENT:

help:  ## list these targets
	echo "The Craft of Training"
	sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' $(firstword $(MAKEFILE_LIST)) | awk -F'|' '{ printf "  make %-15s %s\n", $$1, $$2 }'

lab: $(STAMP)  ## open the course in JupyterLab (PORT=8888; BROWSER=no on a server)
	echo "JupyterLab starts at http://localhost:$(PORT)$(FIRST) (Ctrl-C ends it)"
	echo "A browser that asks for a token needs the longer address below."
	# In a container one is root, and Jupyter must be told that this is meant; it still asks for the token and listens
	# on localhost only. answer_yes: Ctrl-C ends it without a question. The last two: nothing is looked up on the network
	if [ "$$(id -u)" = 0 ]; then echo "You are root: what a notebook does, it does as root."; root=--allow-root; fi; \
	exec $(BIN)/jupyter lab --port=$(PORT) --ServerApp.port_retries=0 --ServerApp.answer_yes=True --log-level=ERROR $$root \
		--LabApp.news_url=None --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate \
		$(if $(filter no,$(BROWSER)),--no-browser) --ServerApp.root_dir="$(CURDIR)" --LabApp.default_url=$(FIRST)

test: $(DEV)  ## run everything: lint, types, unit tests, each notebook and its plots
	$(BIN)/python -m pytest

run: $(STAMP)  ## execute one chapter in place (NB=02), or all of them
	$(BIN)/python -m course_lib.proving.run_notebook $(NB)

reset: $(STAMP)  ## give a chapter back as it was (NB=02); the edited one is kept beside it
	$(BIN)/python -m course_lib.lab.reset $(NB)

study: $(STAMP)  ## run the recorded study of a chapter (NB=02), or go on with it
	$(BIN)/python -m course_lib.lab.studies $(NB)

confirm: $(STAMP)  ## after a change that is to leave a study's runs as they are: repeat some (NB=13 SINCE=HEAD)
	$(BIN)/python -m course_lib.lab.confirming $(NB) $(if $(SINCE),--since $(SINCE))

frames: $(STAMP)  ## draw the explorers' frames for the web site (NB=02), after `make run`
	$(BIN)/python -m course_lib.proving.frames $(NB)

bench: $(DEV)  ## measure what the course promises about speed, as ratios
	$(BIN)/python -m tests.benchmarks

docs: $(DOCS)  ## build the web site into docs/_build/html, from the notebooks as they are stored
	$(BIN)/python -m sphinx --builder html --nitpicky --fail-on-warning --quiet docs $(SITE)
	echo "The site is $(SITE)/index.html"

docs-serve: PORT := 8000
docs-serve: docs  ## build the web site and show it (PORT=8000)
	echo "The site is at http://localhost:$(PORT)/ (Ctrl-C ends it)"
	exec $(BIN)/python -m http.server --bind localhost --directory $(SITE) $(PORT)

docs-archive: docs  ## pack the web site into one zip that opens from disk, for a room without network
	cd docs && ../$(BIN)/python -m site_builder.archive ../$(SITE) _build/craft-of-training.zip

class-setup: $(KIT)/.installed  ## install what the classroom kit needs, into .venv-class (see classroom/README.md)

class-release: $(KIT)/.installed  ## make a chapter's student copy (NB=02, else all; OUTPUTS=keep; CLASS=class)
	$(KIT)/bin/python -m classroom.course --folder "$(CLASS)" release $(or $(NB),all) \
		$(if $(filter keep,$(OUTPUTS)),--keep-outputs)

class-autograde: $(KIT)/.installed  ## collect what lies in INBOX, if named, and mark a chapter (NB=02)
	$(if $(INBOX),$(KIT)/bin/python -m classroom.course --folder "$(CLASS)" collect $(NB) "$(INBOX)")
	$(KIT)/bin/python -m classroom.course --folder "$(CLASS)" mark $(NB)

class-feedback: $(KIT)/.installed  ## make a chapter's pages of feedback, and marks.csv (NB=02)
	$(KIT)/bin/python -m classroom.course --folder "$(CLASS)" give-back $(NB)

class-slides: $(KIT)/.installed  ## make a chapter's slides (NB=02, else all; PDF=yes; CLASS=class)
	$(KIT)/bin/python -m classroom.slides $(or $(NB),all) --out "$(CLASS)/slides" $(if $(filter yes,$(PDF)),--pdf)

hub: PORT := 8000
hub: $(KIT)/.installed  ## one server for the room (CLASS=class NAMES=names.txt HOST=0.0.0.0 PORT=8000; HUB="--cert c --key k")
	exec $(KIT)/bin/python -m classroom.hub --folder "$(CLASS)" --port $(PORT) $(if $(HOST),--host $(HOST)) \
		$(if $(NAMES),--names "$(NAMES)") $(HUB)

class-passwords: $(KIT)/.installed  ## passwords for the hub (DO="add ada", "reset ada", "remove ada", "list")
	$(KIT)/bin/python -m classroom.hub.roster --folder "$(CLASS)" $(or $(DO),list)

class-publish: $(KIT)/.installed  ## hand out to the hub's learners what has been released since it started
	$(KIT)/bin/python -m classroom.hub.publish --folder "$(CLASS)"

class-load: $(KIT)/.installed  ## what does a room need? (LEARNERS=30 NB=08 ARRIVAL=staggered or together; SECONDS=1200)
	$(KIT)/bin/python -m classroom.hub.load --folder "$(CLASS)" --learners $(LEARNERS) --chapter $(or $(NB),08) \
		--arrival $(ARRIVAL) --seconds $(SECONDS)

class-progress: PORT := 8765
class-progress: $(KIT)/.installed  ## show how far a class has come (NB=02; NAMES=invented; CLASS=class; PORT=8765)
	exec $(KIT)/bin/python -m classroom.progress "$(CLASS)" --chapter $(or $(NB),00) --port $(PORT) \
		$(if $(filter invented,$(NAMES)),--pseudonyms) $(if $(filter no,$(BROWSER)),--no-browser)

class-timings: $(KIT)/.installed  ## write how long each section takes into the guide (NB=02 or all: run it first)
	$(KIT)/bin/python -m classroom.timings $(if $(NB),--measure $(NB))

class-bundle: $(KIT)/.installed  ## pack the course onto a stick, for a room without network (OUT=stick; PLATFORM, PYTHONS)
	if [ -z "$(OUT)" ]; then echo "OUT=FOLDER names the stick, such as OUT=/media/ada/STICK"; exit 2; fi
	$(KIT)/bin/python -m classroom.bundle "$(OUT)" $(if $(PLATFORM),--platform $(PLATFORM)) \
		$(if $(PYTHONS),--python $(PYTHONS)) $(if $(DATA),--data "$(DATA)") $(if $(ZIP),--docs "$(ZIP)") \
		$(if $(filter yes,$(TEACHER)),--classroom)

class-test: $(KIT)/.installed  ## test the classroom kit (minutes; marking's attacks need Linux)
	$(KIT)/bin/python -m pytest --override-ini addopts= --numprocesses auto --maxprocesses 4 --dist loadfile classroom/tests

clean:  ## remove .venv and what tests and tools left behind (data sets stay)
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .benchmarks build *.egg-info
	rm -rf docs/_build docs/api docs/chapters docs/solutions
	find . \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

# Made once; made again only when one of these two files is newer
$(STAMP): requirements.txt pyproject.toml
	python="$(PYTHON)"; \
	if [ -z "$$python" ]; then \
		echo "The course needs Python 3.11 or newer (with its venv module), and none was found on the PATH."; \
		echo "Install one, or name it: make PYTHON=/path/to/python3.12"; exit 1; \
	elif ! "$$python" -c '$(NEW_ENOUGH)' 2>/dev/null; then \
		echo "$$python ($$("$$python" -V 2>&1 | head -n 1)) cannot make the environment: it must run, be Python 3.11 or"; \
		echo "newer, and have its venv module (on Debian and Ubuntu: apt install python3-venv)."; exit 1; \
	elif ! [ -x $(BIN)/pip ]; then \
		echo "Creating $(VENV) with $$("$$python" -V)"; "$$python" -m venv $(VENV) || exit 1; \
	fi
	echo "Installing what requirements.txt lists (once; some minutes)"
	[ -t 1 ] || quiet=--quiet; \
	$(BIN)/python -m pip install $$quiet --disable-pip-version-check --requirement requirements.txt
	touch $(STAMP)

# What the web site needs besides
$(DOCS): requirements-docs.txt $(STAMP)
	[ -t 1 ] || quiet=--quiet; \
	$(BIN)/python -m pip install $$quiet --disable-pip-version-check --requirement requirements-docs.txt
	touch $(DOCS)

# What tests and benchmarks need besides
$(DEV): requirements-dev.txt requirements-docs.txt $(STAMP)
	[ -t 1 ] || quiet=--quiet; \
	$(BIN)/python -m pip install $$quiet --disable-pip-version-check --requirement requirements-dev.txt
	touch $(DOCS) $(DEV)

# What the classroom kit needs: an environment of its own, beside the learners'
$(KIT)/.installed: classroom/requirements-classroom.txt requirements.txt
	python="$(PYTHON)"; \
	if [ -z "$$python" ]; then echo "The kit needs Python 3.11 or newer: make PYTHON=/path/to/python3.12"; exit 1; fi; \
	[ -x $(KIT)/bin/pip ] || "$$python" -m venv $(KIT)
	echo "Installing what classroom/requirements-classroom.txt lists (once; some minutes)"
	[ -t 1 ] || quiet=--quiet; \
	$(KIT)/bin/python -m pip install $$quiet --disable-pip-version-check \
		--requirement classroom/requirements-classroom.txt
	touch $(KIT)/.installed
