"""``calotype plans``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from calotype.runtime.cli.terminal import show

if TYPE_CHECKING:
    from calotype.engine.trust import Trust
    from calotype.runtime.sessions.records import PlanRecord

SHA256 = click.option("--sha256", help="The archive has to have this one, as calotype plans pack printed it.")
KEY = click.option(
    "--key", metavar="KEY", help="It has to be signed by this public key of minisign: the key itself, or its file."
)
SIGNATURE = click.option(
    "--signature",
    type=click.Path(path_type=Path),
    help="Where the signature lies.  [default: ARCHIVE.minisig]",
)


@click.group("plans", no_args_is_help=True)
def command() -> None:
    """List the plans of the cache, and carry them to other machines."""


@command.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print their records as JSON.")
def list_command(as_json: bool) -> None:
    """List the plans of the cache: what each is for, and whether it runs here."""
    from calotype.runtime.sessions.plans import list_plans, plan_trouble, read_record

    rows: list[dict[str, Any]] = []
    for path in list_plans():
        record, trouble = read_record(path), plan_trouble(path)
        if record is None or trouble is not None:
            rows.append({"plan": str(path), "trouble": trouble})
        else:
            rows.append({"plan": str(path), "record": dataclasses.asdict(record), "misfits": _misfits(record)})
        if as_json:
            continue
        if record is None or trouble is not None:
            show(f"{path.name}\n            cannot be used: {trouble}")
        else:
            _show(path.name, record)
    if as_json:
        show(json.dumps(rows, indent=2))


@command.command("pack")
@click.argument("plans", nargs=-1, type=click.Path(path_type=Path))
@click.option("--bundle", help="All plans of this bundle's networks that the cache has.")
@click.option("--output", "-o", type=click.Path(path_type=Path), required=True, help="The archive, which is new.")
def pack_command(plans: tuple[Path, ...], bundle: str | None, output: Path) -> None:
    """Put PLANS, files of the cache, into one archive, and print its sha256.

    Sign it with minisign -Sm ARCHIVE where those who unpack it know your key.
    """
    from calotype.engine.archive import pack
    from calotype.runtime.bundle.folder import Bundle
    from calotype.runtime.sessions.plans import plans_of

    if bool(plans) == (bundle is not None):
        raise click.UsageError("give PLANS, as calotype build printed them, or --bundle for all of one bundle's")
    chosen = list(plans) if bundle is None else plans_of(Bundle.open(bundle).manifest)
    record = pack(chosen, output)
    show(f"{record.sha256}  {output}")


@command.command("verify")
@click.argument("archive", type=click.Path(path_type=Path))
@SHA256
@KEY
@SIGNATURE
def verify_command(archive: Path, sha256: str | None, key: str | None, signature: Path | None) -> None:
    """Check an archive's files and, where --sha256 or --key says so, where it comes from; install nothing."""
    from calotype.engine.archive import open_archive
    from calotype.runtime.bundle.manifest import FileRecord

    trust = None if sha256 is None and key is None and signature is None else _trust(sha256, key, signature)
    if trust is not None:
        trust.check(archive, archive)
    with open_archive(archive) as found:
        found.check()
        show(f"sha256:     {FileRecord.of(archive).sha256}")
        show(f"packed by:  Calotype {found.manifest.calotype}")
        for name, record in found.records.items():
            _show(name, record)
    vouched = [word for word, given in (("its sha256", sha256), ("the signature", key)) if given is not None]
    show(f"sound; {' and '.join(vouched)} agrees" if vouched else "sound; nothing says yet who made it")


@command.command("unpack")
@click.argument("archive", type=click.Path(path_type=Path))
@SHA256
@KEY
@SIGNATURE
@click.option("--force", is_flag=True, help="Replace sound plans that are there, too.")
def unpack_command(archive: Path, sha256: str | None, key: str | None, signature: Path | None, force: bool) -> None:
    """Put the plans of an archive that you trust into the cache. Plans are programs: --sha256 or --key is needed."""
    from calotype.engine.archive import unpack

    installed, there = unpack(archive, _trust(sha256, key, signature), force=force)
    _name("installed", installed)
    _name("there already", there)


def _trust(sha256: str | None, key: str | None, signature: Path | None) -> Trust:
    from calotype.engine.trust import Trust

    return Trust(sha256=sha256, key=key, signature=signature)


def _name(what: str, plans: Iterable[Path]) -> None:
    for path in plans:
        show(f"{what}: {path}")


def _show(name: str, record: PlanRecord) -> None:
    from calotype.runtime.sessions.plans import target_of

    key, size = record.key, record.size + (0 if record.weights is None else record.weights.size)
    driver = "" if key.get("driver", "none") == "none" else f", driver {key['driver']}"
    reasons = _misfits(record)
    show(name)
    show(f"            {key['network']} of {key['bundle']}, {key['precision']}, {size / 2**20:.1f} MiB")
    show(f"            for {target_of(key)}{driver}, by {key['backend']} {key['version']}")
    show(f"            {'runs here' if not reasons else 'does not run here: ' + '; '.join(reasons)}")


def _misfits(record: PlanRecord) -> list[str]:
    from calotype.runtime.diagnostics.fitting import misfits

    return misfits(record.key)
