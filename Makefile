# make demo | test | lab: each builds the environment first where there is none.
#   PYTHON=python3.12   the Python to build it from
#   PY=/path/to/python  use an environment of your own instead
#   ARGS='--dev'        options passed on (demo)
MAKEFLAGS += --no-print-directory
PYTHON ?= python3
export PYTHONPATH := $(CURDIR)

find_py = py="$(PY)"; [ -n "$$py" ] || py=$$($(PYTHON) tools/env.py) || exit 1
bin = $$(dirname "$$(command -v "$$py")")

help:
	@echo 'make demo             train on an embedded town and recognise places in another'
	@echo 'make test             every check of the project'
	@echo 'make quick            the same without the slow ones'
	@echo 'make torture          kills, full disks, damaged files, fuzzing, mutants: hours'
	@echo 'make lowest           the quick checks with the lowest version of every requirement'
	@echo 'make audit            known weaknesses of the installed requirements (asks pypi.org)'
	@echo 'make bench            the measurements at a size for two cores, some 20 minutes'
	@echo 'make lab              the notebooks in JupyterLab'
	@echo 'make env              only the environment; prints its python'
	@echo 'make export           notebooks -> sage/'
	@echo 'make clean-notebooks  strip what a notebook does not need'

env:
	@$(find_py); echo "$$py"

demo:
	@$(find_py); "$$py" tools/command.py sage_demo $(ARGS)

test:
	@$(find_py); "$$py" tools/check.py

quick:
	@$(find_py); "$$py" tools/check.py quick

browser:
	@$(find_py); "$$py" -m pytest -q tests/test_browser.py

torture:
	@$(find_py); failed=''; try() { name=$$1; shift; echo "== $$name"; "$$@" || failed="$$failed, $$name"; }; \
	  try 'faults' env SAGE_TORTURE=1 "$$py" -m pytest -q -s tests/faults; try 'long run' "$$py" tests/faults/long.py; try 'long records' "$$py" tests/faults/long.py --records 1000; \
	  try 'mutants' "$$py" tools/mutate.py $(ARGS); [ -z "$$failed" ] || { echo "failed: $${failed#, }"; exit 1; }

lowest:
	@py=$$($(PYTHON) tools/env.py lowest) && "$$py" tools/check.py quick

audit:
	@$(find_py); audit=$$($(PYTHON) tools/env.py audit) && "$$(dirname "$$audit")/pip-audit" --strict --path "$$("$$py" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"

lab:
	@$(find_py); "$(bin)/jupyter" lab nbs $(ARGS)

bench:
	@$(find_py); failed=''; took=''; sum=0; for script in bench/*.py; do name=$$(basename $$script .py); [ $$name = common ] && continue; echo "== $$script"; start=$$(date +%s); \
	  "$$py" $$script --out bench/results/quick/$$name.json || failed="$$failed $$name"; s=$$(($$(date +%s) - start)); sum=$$((sum + s)); took="$$took$$name $$s "; done; \
	  echo '== seconds'; printf '%-12s %5s\n' $$took sum $$sum; [ -z "$$failed" ] || { echo "failed:$$failed"; exit 1; }

export:
	@$(find_py); "$(bin)/nbdev_export"

clean-notebooks:
	@$(find_py); "$(bin)/nbdev_clean"

.PHONY: help env demo test quick browser torture lowest audit lab bench export clean-notebooks
