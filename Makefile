# Every target sets up what it needs: Python 3.11 or newer and make are enough.
PYTHON ?= python3
PROMPT ?= a red apple, noto style
OUTPUT ?= talbot.png
PIP = PIP_DISABLE_PIP_VERSION_CHECK=1 .venv/bin/python -m pip install -q -c constraints.txt

.PHONY: demo bench docs test lint types audit clean

demo: .venv/demo
	@.venv/bin/calotype generate "$(PROMPT)" --output "$(OUTPUT)" --seed 0 --overwrite > /dev/null
	@echo 'The picture is $(abspath $(OUTPUT)). To go on:'
	@echo '  make demo PROMPT="a green apple, fluent style"'
	@echo '  .venv/bin/calotype generate "cat face, noto style" --images 4 --output cat.png'
	@echo '  .venv/bin/calotype doctor       # what can run here, and what installs the rest'
	@echo 'README.md says what the model knows, and how a model of your own is drawn with.'

# The reference of the command line, from the commands.
docs: .venv/demo
	.venv/bin/python -m tests.command_line_reference

# What can be measured, once what that needs is installed.
bench: .venv/bench
	@.venv/bin/python -m benchmarks.micro
	@echo "More, with a first look at each: benchmarks/README.md"

test: lint types
	.venv/bin/python -m pytest -m "not slow and not gpu" -n 2 --dist loadfile

# Known vulnerabilities of the packages in constraints.txt.
audit:
	@mkdir -p build
	@.ci/audit

lint: .venv/dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types: .venv/dev
	@mkdir -p build/types/calotype
	@for file in __init__.py __main__.py py.typed; do ln -sfn ../../../calotype/$$file build/types/calotype/$$file; done
	@for room in export engine runtime serving; do ln -sfn ../../../$$room build/types/calotype/$$room; done
	cd build/types && ../../.venv/bin/mypy --config-file ../../pyproject.toml -p calotype

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) -e '.[cpu]'
	@touch $@

.venv/bench: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) -e '.[training]'
	@touch $@

.venv/dev: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv build *.egg-info
