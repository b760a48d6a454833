"""``docs/cli.md``, made from the commands themselves: ``python -m tests.command_line_reference`` writes it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from calotype.runtime.cli.main import COMMANDS, calotype
from calotype.runtime.schedulers import SCHEDULERS
from calotype.runtime.schedulers.config import SPACINGS
from calotype.runtime.sessions import BACKENDS

PAGE = Path(__file__).parent.parent / "docs" / "cli.md"
HEAD = """# The command line

This page is made from the code by `make docs`, and a test compares the two. `calotype COMMAND --help` prints the same.
Where no environment is activated, write `.venv/bin/calotype`. `python -m calotype` is the same program.

Results go to stdout, everything else to stderr. What goes wrong is one line that names the value, what is valid and the
way out; the exit code is 0 when all is well, 1 when something failed, 2 for wrong usage and 130 after Ctrl-C.
"""


def root() -> click.Context:
    """The context of ``calotype`` itself."""
    return click.Context(calotype, info_name="calotype", **calotype.context_settings)


def page() -> str:
    """The whole page."""
    context = root()
    lines = [HEAD, *_options(calotype, context)]
    for name, about in COMMANDS.items():
        command = calotype.get_command(context, name)
        assert command is not None
        lines += [f"\n## calotype {name}\n", f"*{about}*\n", *_command(command, context, name)]
    return "\n".join([*lines, *_names()]) + "\n"


def _command(command: click.Command, parent: click.Context, name: str) -> Iterator[str]:
    context = click.Context(command, parent=parent, info_name=name)
    yield f"    {' '.join([context.command_path, *command.collect_usage_pieces(context)])}\n"
    for paragraph in (command.help or "").split("\n\n"):
        yield f"{' '.join(paragraph.split())}\n"
    yield from _options(command, context)
    for part in command.commands.values() if isinstance(command, click.Group) else ():
        yield f"\n### {context.command_path} {part.name}\n"
        yield from _command(part, context, part.name or "")


def _options(command: click.Command, context: click.Context) -> Iterator[str]:
    yield "| option | |"
    yield "|---|---|"
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if isinstance(parameter, click.Option) and record is not None:
            names, about = (" ".join(text.split()).replace("|", "\\|") for text in record)
            yield f"| `{names}` | {about} |"


def _names() -> Iterator[str]:
    yield "\n## Names\n"
    for what, names in (("Schedulers", SCHEDULERS), ("Spacings of noise levels", SPACINGS), ("Backends", BACKENDS)):
        yield f"{what}: {', '.join(f'`{name}`' for name in names)}.\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
