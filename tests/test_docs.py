"""What the pages say: the files, tests, targets, commands and options that they name exist, and the examples run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from calotype.runtime.cli.main import COMMANDS, calotype
from tests import command_line_reference

ROOT = Path(__file__).parent.parent
DOCS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))
PAGES = ["README.md", "SECURITY.md", "CHANGELOG.md", *DOCS]
LINKED = [*PAGES, "benchmarks/README.md", "training/README.md"]
# Words that stand for what a reader puts there.
PLACEHOLDER = re.compile(r"[A-Z]{3,}|[*$~…{]")
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^    .*\n)+", re.MULTILINE)
INLINE = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def inline(page: str) -> list[str]:
    """What stands between backticks, blocks of code left out."""
    return [" ".join(found.split()) for found in INLINE.findall(INDENTED.sub("", FENCED.sub("", text(page))))]


def anchors(page: Path) -> set[str]:
    """The headings as links name them."""
    heads = re.findall(r"^#+ (.*)$", FENCED.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_the_readme_is_short_and_begins_with_what_is_typed_first() -> None:
    lines = text("README.md").splitlines()
    assert len(lines) <= 200
    assert lines.index("## Install") < lines.index("## First picture") < lines.index("## Your own model")
    assert "make demo" in text("README.md")
    assert "make test" in text("README.md")


@pytest.mark.parametrize("page", LINKED)
def test_links_lead_somewhere(page: str) -> None:
    for target in LINK.findall(FENCED.sub("", text(page))):
        if target.startswith(("https://", "http://")):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), f"{page} links to {target}"
        assert not anchor or anchor in anchors(path), f"{page} links to {target}"


@pytest.mark.parametrize("page", PAGES)
def test_files_and_tests_that_are_named_exist(page: str) -> None:
    for name in inline(page):
        if re.fullmatch(r"[\w.-]+(/[\w.-]+)*(/|\.(py|md|toml|txt|json|png))(::\w+)?", name) is None:
            continue
        path, _, function = name.partition("::")
        if PLACEHOLDER.search(path) or "/" not in path:
            continue
        found = next((place / path for place in (ROOT, ROOT / "runtime") if (place / path).exists()), None)
        assert found is not None, f"{page} names {path}"
        assert not function or f"def {function}(" in found.read_text(encoding="utf-8"), f"{page} names {name}"


@pytest.mark.parametrize("page", PAGES)
def test_targets_and_modules_that_are_named_exist(page: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", text("Makefile"), re.MULTILINE))
    for target in re.findall(r"(?:`|^    )make ([a-z-]+)", text(page), re.MULTILINE):
        assert target in targets, f"{page} names make {target}"
    for module in re.findall(r"python -m ((?:benchmarks|training|tests|calotype)[\w.]*)", text(page)):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), f"{page} names python -m {module}"


def command_lines(block: str) -> Iterator[list[str]]:
    """The words of every line of a block that calls Calotype."""
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words and words[0] in ("calotype", ".venv/bin/calotype"):
            yield words[1:]


def opened(name: str) -> tuple[click.Command, click.Context]:
    root = command_line_reference.root()
    command = calotype.get_command(root, name)
    assert command is not None, f"there is no command {name}"
    return command, click.Context(command, parent=root, info_name=name)


def check_command_line(name: str, *given: str) -> None:
    """Raises what click raises of a wrong line, and assertions; nothing is run."""
    command, context = opened(name)
    words = list(given)
    if isinstance(command, click.Group):
        part, *words = words
        assert part in command.commands, f"calotype {name} has no command {part}"
        command = command.commands[part]
        context = click.Context(command, parent=context, info_name=part)
    options, arguments, _ = command.make_parser(context).parse_args(words)
    parameters = {parameter.name: parameter for parameter in command.params}
    for option, value in options.items():
        if isinstance(parameters[option], click.Option) and value is not None:
            parameters[option].type_cast_value(context, value)
    assert not arguments, f"{arguments} are too many"


@pytest.mark.parametrize("page", PAGES)
def test_command_lines_are_legal(page: str) -> None:
    for block in INDENTED.findall(FENCED.sub("", text(page))):
        for words in command_lines(block):
            if "[OPTIONS]" not in words:
                check_command_line(*words)


def options_of(command: click.Command) -> set[str]:
    """Those of the command, and of the commands in it."""
    parts = command.commands.values() if isinstance(command, click.Group) else ()
    own = {option for parameter in command.params for option in parameter.opts}
    return {"--help"}.union(own, *map(options_of, parts))


@pytest.mark.parametrize("page", PAGES)
def test_options_that_are_named_exist(page: str) -> None:
    known = {name: options_of(opened(name)[0]) for name in COMMANDS}
    known[""] = {option for own in calotype.params for option in own.opts} | {"--help"}
    for words in (found.split() for found in inline(page)):
        options = {word.partition("=")[0].rstrip(",") for word in words if re.fullmatch(r"--[a-z].*", word)}
        if words[0] == "calotype" and len(words) > 1 and not PLACEHOLDER.match(words[1]):
            command = words[1] if words[1][0].isalpha() else ""
            assert options <= known.get(command, set()), f"{page} names {' '.join(words)}"
        elif words[0].startswith("--"):
            assert options <= set().union(*known.values()), f"{page} names {' '.join(words)}"


@pytest.mark.parametrize("page", PAGES)
def test_python_compiles(page: str) -> None:
    for number, (language, code) in enumerate(FENCED.findall(text(page))):
        if language == "python":
            compile(code, f"{page}, example {number}", "exec")


def test_the_examples_of_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    examples = [code for language, code in FENCED.findall(text("README.md")) if language == "python"]
    assert len(examples) == 2
    for code in examples:
        exec(re.sub(r"num_inference_steps=\d+", "num_inference_steps=2", code), {})
    assert (tmp_path / "red-apple.png").is_file()


def test_the_reference_of_the_command_line_is_what_the_code_gives() -> None:
    page = command_line_reference.PAGE.read_text(encoding="utf-8")
    assert page == command_line_reference.page(), "docs/cli.md is not what the commands say; run: make docs"
