"""``calotype doctor``."""

from __future__ import annotations

import dataclasses
import json

import click


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def command(as_json: bool) -> None:
    """Say what this machine has, which backends can run on it, and what would install the others."""
    from calotype.runtime.diagnostics.doctor import examine, machine

    findings = examine()
    if as_json:
        click.echo(json.dumps({"machine": machine(), "backends": [dataclasses.asdict(item) for item in findings]}))
        return
    for name, value in machine().items():
        click.echo(f"{name + ':':<15}{value}")
    for item in findings:
        version = "" if item.version is None else f" ({item.version})"
        state = "ready" if item.usable else "not ready"
        click.echo(f"{item.backend + ':':<15}{state}{version}{item.advice and f': {item.advice}'}")
