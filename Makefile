# Every target sets up what it needs: Python 3.11 or newer and make are enough.
PYTHON ?= python3
PROMPT ?= a red apple, noto style
OUTPUT ?= talbot.png
PIP = PIP_DISABLE_PIP_VERSION_CHECK=1 .venv/bin/python -m pip install -q
# In two steps: what has hashes, which an editable installation cannot have, and then Calotype alone.
HASHED = $(PIP) --require-hashes --no-deps -r requirements
ITSELF = $(PIP) --no-deps --no-build-isolation -e .
# A PyTorch for processors alone is another file than the index's, so its version is pinned and its hash is not.
TORCH = $(PIP) -c constraints.txt torch

PYTEST = .venv/bin/python -m pytest
# The parts of CI: each may be run alone.
USUAL = not slow and not gpu and not browser and not ray and not packaging

.PHONY: demo bench docs test test-browser test-ray test-packaging test-pythons dist wheels lint types audit hashes clean

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
	$(PYTEST) -m "$(USUAL)" -n 2 --dist loadfile

# The server's page in Chromium; skipped, with the reason, where there is none.
test-browser: .venv/dev
	$(PYTEST) -m "browser and not slow" tests/serving

# What needs Ray. pytest answers 5 where it finds no such test.
test-ray: .venv/dev
	@$(PYTEST) -m "ray and not slow"; code=$$?; if [ $$code = 5 ]; then echo "There is no test with Ray."; else exit $$code; fi

# The wheel and the source distribution: made twice, installed into a bare environment, and used.
test-packaging: .venv/dev
	$(PYTEST) -m packaging tests/test_distributions.py

# The wheel under every Python that is here, 3.11 to 3.14: installed with its extra for the CPU, imported, one picture.
test-pythons: dist
	@.ci/pythons

# For which machines with ARM processors the package index has all that an extra needs; nothing is installed.
wheels: .venv/bin/python
	@$(PIP) uv
	@.venv/bin/python .ci/wheels.py

# The wheel and the source distribution, the same bytes each time.
dist: .venv/dev
	.venv/bin/python .ci/dist.py

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

.venv/demo: .venv/bin/python pyproject.toml requirements/cpu.txt
	$(HASHED)/cpu.txt
	$(ITSELF)
	@touch $@

.venv/bench: .venv/bin/python pyproject.toml constraints.txt requirements/training.txt
	$(HASHED)/training.txt
	$(TORCH)
	$(ITSELF)
	@touch $@

.venv/dev: .venv/bin/python pyproject.toml constraints.txt requirements/dev.txt
	$(HASHED)/dev.txt
	$(TORCH)
	$(ITSELF)
	@touch $@

# The hashes of every file of each package, for every Python and system: when a version or a dependency has changed.
# PyTorch is installed by itself; tokenizers asks for the hub's client, 30 MB with what that needs, and draws without.
hashes: .venv/bin/python
	@mkdir -p build
	$(PIP) uv
	echo "torch; python_version < '3'" > build/training.txt
	cp build/training.txt build/dev.txt
	echo "huggingface-hub; python_version < '3'" | cat build/training.txt - | tee build/cpu.txt > build/serve.txt
	for extra in cpu serve training dev; do \
		echo setuptools | .venv/bin/uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-annotate \
			--no-header -c constraints.txt --override build/$$extra.txt --extra cpu --extra $$extra \
			-o requirements/$$extra.txt pyproject.toml - || exit 1; done

clean:
	rm -rf .venv build dist *.egg-info
