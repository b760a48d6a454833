"""``calotype serve``."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from calotype.runtime.cli.main import LineFormatter
from calotype.runtime.errors import one_line

if TYPE_CHECKING:
    from calotype.serving.config import ServeConfig

FILE = click.Path(path_type=Path)


class FieldLines(LineFormatter):
    """Log records for people: the message, and behind it what the ``fields`` of a request's line have."""

    def format(self, record: logging.LogRecord) -> str:
        """See :meth:`logging.Formatter.format`."""
        fields: dict[str, Any] = getattr(record, "fields", {})
        told = [f"{name}={value}" for name, value in fields.items() if value not in (None, "")]
        return one_line(" ".join([super().format(record), *told]))


class Whole(click.ParamType[Any]):
    """Whole numbers with commas between them."""

    name = "number,…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """A tuple of them."""
        try:
            return value if isinstance(value, tuple) else tuple(int(item) for item in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is no whole number, and no such numbers with commas between them", param, ctx)


@click.command("serve")
@click.argument("models", nargs=-1, metavar="[NAME=]BUNDLE…")
@click.option("--config", type=FILE, help="A TOML file that may say any of this, and more; the command line wins.")
@click.option(
    "--control",
    "controls",
    multiple=True,
    metavar="NAME=BUNDLE",
    help="A ControlNet that requests may name; may be repeated.",
)
@click.option("--host", help="The address to listen at; another than this machine's needs keys.  [default: 127.0.0.1]")
@click.option("--port", type=int, help="0 is any that is free.  [default: 8000]")
@click.option("--uds", type=FILE, help="A socket file to listen at, in place of an address.")
@click.option("--api-key-file", type=FILE, help="The keys that clients have, a line NAME:KEY for each.")
@click.option("--admin-key-file", type=FILE, help="The keys that operators have; without, nobody gets in there.")
@click.option("--allowed-host", "hosts", multiple=True, help="A name that requests may come under; may be repeated.")
@click.option("--allowed-origin", "origins", multiple=True, help="A site whose pages may ask; may be repeated.")
@click.option("--trusted-proxy", "proxies", multiple=True, help="An address whose X-Forwarded-For is believed.")
@click.option("--log-prompts", is_flag=True, default=None, help="Have prompts in the log, too.")
@click.option("--devices", type=Whole(), help="GPUs by number, 0,1 say, a worker for each.  [default: the first]")
@click.option("--workers", type=int, help="How many share the processor where no GPU is used.  [default: 1]")
@click.option("--threads", type=int, help="How many a CPU computes with.  [default: as many as may be used]")
@click.option("--backend", help="auto, tensorrt, tensorrt-rtx, cuda or cpu.  [default: auto]")
@click.option("--max-running", type=int, help="Pictures that share the workers' runs.  [default: 16]")
@click.option("--max-queue", type=int, help="Pictures that may wait beside them.  [default: 64]")
@click.option(
    "--max-seconds", type=float, help="Refuse requests once so many seconds of work are waiting.  [default: 600]"
)
@click.option(
    "--hang-seconds",
    type=float,
    help="Restart a worker that is silent for longer than this, and than its work takes.  [default: 30]",
)
@click.option(
    "--stop-seconds", type=float, help="Seconds to finish what was accepted in, once told to stop.  [default: 30]"
)
@click.option("--output-filter", metavar="MODULE:FUNCTION", help="A Python callable that every picture has to pass.")
@click.option("--safety-checker", is_flag=True, default=None, help="Refuse what a model's own takes exception to.")
@click.option("--build", is_flag=True, default=None, help="Build plans and engines first, where there are none.")
def command(models: tuple[str, ...], config: Path | None, **options: Any) -> None:
    """Serve models over HTTP; a NAME is a folder's own unless it is given.

    SIGTERM or Ctrl-C finishes what is being drawn, a second one does not wait for it. SIGHUP reads the configuration
    and the keys again.
    """
    from calotype.runtime.errors import InputError, MissingPackageError

    try:
        import calotype.serving.server as serving
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("calotype"):
            raise
        raise MissingPackageError(error.name, "serve") from error
    from calotype.serving.config import ServeConfig, model_names
    from calotype.serving.http.logs import JsonLines

    if not models and config is None:
        raise click.UsageError("name a model to serve, such as talbot; or a file with --config")
    if options["host"] is not None and options["uds"] is not None:
        raise InputError("--host and --uds exclude each other; give one of them")
    root = logging.getLogger()
    root.setLevel(min(root.level, logging.INFO))
    for handler in (own for own in root.handlers if isinstance(own.formatter, LineFormatter)):
        handler.setFormatter(FieldLines() if sys.stderr.isatty() else JsonLines())
    logging.getLogger("uvicorn").setLevel(logging.WARNING)

    def read() -> ServeConfig:
        given = {name: None if value == () else value for name, value in options.items()}
        given["controls"] = None if given["controls"] is None else model_names(given["controls"], "control")
        return ServeConfig.read(config, model_names(models), given)

    def announce(where: str) -> None:
        click.echo(f"Calotype serves at {where}")

    serving.Server(read, announce).run()
