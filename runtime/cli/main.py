"""``calotype``: commands are imported when they are called, so that ``--help`` is quick."""

from __future__ import annotations

import contextlib
import errno
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Sequence

import click

from calotype.runtime.errors import CalotypeError, InputError, one_line
from calotype.runtime.version import __version__

COMMANDS = {
    "generate": "draw pictures from a prompt",
    "info": "show a bundle, or the settings in a picture",
    "doctor": "say which backends can run here, and what is missing",
    "export": "turn a checkpoint into a bundle",
    "build": "turn a bundle into plans for a GPU, or engines for this processor",
    "plans": "list plans, and carry them to other machines",
    "verify": "check a bundle's files",
    "bench": "measure a bundle on this machine",
    "serve": "draw for other programs and people, over HTTP",
}


# What to do about errors of the system that name no file.
ADVICE = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.ENOLCK: "its file system has no locks; use a folder on another",
    errno.ENOSYS: "its file system lacks what is needed; use a folder on another",
    errno.EMFILE: "raise the limit with ulimit -n",
}


class LineFormatter(logging.Formatter):
    """A record is one line, whatever it quotes."""

    def format(self, record: logging.LogRecord) -> str:
        """See :meth:`logging.Formatter.format`."""
        return one_line(super().format(record))


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
        for part in (command, *(command.commands.values() if isinstance(command, click.Group) else ())):
            if not any(parameter.name == "verbose" for parameter in part.params):
                part.params.append(verbose_option())
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def verbose_option() -> click.Option:
    """``-v``, which may stand before a command and behind it."""
    return click.Option(
        ["-v", "--verbose"],
        expose_value=False,
        is_eager=True,
        help="Say more, on stderr; given twice, all there is.",
        count=True,
        callback=be_verbose,
    )


def be_verbose(_: click.Context, __: click.Parameter, times: int) -> None:
    """Lower what is logged; before a command and behind it add up to the more of both."""
    if times:
        level = logging.INFO if times == 1 else logging.DEBUG
        logging.getLogger().setLevel(min(level, logging.getLogger().level or level))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="calotype")
def calotype() -> None:
    """Run Stable Diffusion models fast, without PyTorch."""


calotype.params.append(verbose_option())


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code; what the user can mend is one line on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    for stream in (sys.stdout, sys.stderr):  # what a terminal's encoding lacks is written as Python escapes it
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
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
        return _system_failed(error)
    return result if isinstance(result, int) else 0


def _system_failed(error: OSError) -> int:
    """Say what the system refused: to print the result, or anything else."""
    if any(frame.f_code is click.echo.__code__ for frame, _ in traceback.walk_tb(error.__traceback__)):
        _drop_results()
        return 1 if isinstance(error, BrokenPipeError) else _failed(f"the result cannot be printed: {_why(error)}", 1)
    if error.filename is not None:
        return _failed(f"{os.fsdecode(error.filename)}: {_why(error)}", 1)
    if isinstance(error, FileNotFoundError):  # the module tempfile's own
        return _failed(f"{_why(error)}; set TMPDIR to a folder that can be written", 1)
    advice = ADVICE.get(error.errno or 0)
    return _failed(_why(error) if advice is None else f"{_why(error)}; {advice}", 1)


def _why(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__


def _failed(message: object, code: int) -> int:
    with contextlib.suppress(OSError):  # stderr may be closed or full, and then nobody listens
        click.echo(f"calotype: {one_line(str(message))}", err=True)
    return code


def _drop_results() -> None:
    """What stdout did not take would fail once more when the interpreter ends."""
    with contextlib.suppress(OSError, ValueError):  # a stdout that is no file is another program's business
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
