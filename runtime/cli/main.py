"""``calotype``: commands are imported when they are called, so that ``--help`` is quick."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Sequence

import click

from calotype.runtime.errors import CalotypeError, InputError
from calotype.runtime.version import __version__

COMMANDS = {
    "generate": "draw pictures from a prompt",
    "info": "show a bundle, or the settings in a picture",
    "doctor": "say which backends can run here, and what is missing",
    "export": "turn a checkpoint into a bundle",
    "build": "turn a bundle into plans for a GPU, or engines for this processor",
    "verify": "check a bundle's files",
    "bench": "measure a bundle on this machine",
}


class LazyGroup(click.Group):
    """A group whose commands live in modules of their names."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Import the command; None when there is no such one."""
        if name not in COMMANDS:
            return None
        command = getattr(importlib.import_module(f"calotype.runtime.cli.{name}"), "command")  # noqa: B009
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="calotype")
@click.option("-v", "--verbose", is_flag=True, help="Say more, on stderr.")
def calotype(verbose: bool) -> None:
    """Run Stable Diffusion models fast, without PyTorch."""
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr
    )


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code; what the user can mend is one line on stderr."""
    try:
        result = calotype.main(args=arguments, prog_name="calotype", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return 2
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx is not None else "calotype"
        return _failed(f"{error.format_message().rstrip('.')}; see {where} --help", 2)
    except InputError as error:
        return _failed(error, 2)
    except CalotypeError as error:
        return _failed(error, 1)
    except MemoryError:
        return _failed("there is not enough memory; use a smaller size, fewer images, --vae-tiling or --low-memory", 1)
    except click.Abort:
        raise KeyboardInterrupt from None
    except OSError as error:
        if error.filename is not None:
            return _failed(f"{error.filename}: {error.strerror}", 1)
        _drop_results()
        return (
            1 if isinstance(error, BrokenPipeError) else _failed(f"the result cannot be printed: {error.strerror}", 1)
        )
    return result if isinstance(result, int) else 0


def _failed(message: object, code: int) -> int:
    one_line = " ".join(str(message).split())  # what libraries say, and it quotes, can be several
    click.echo(f"calotype: {one_line}", err=True)
    return code


def _drop_results() -> None:
    """What stdout did not take would fail once more when the interpreter ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
