"""What a wheel and a source distribution carry beside the code."""

from __future__ import annotations

import tomllib
from pathlib import Path

from calotype.runtime.bundle.folder import BUNDLED
from calotype.runtime.bundle.manifest import Manifest

ROOT = Path(__file__).parent.parent


def test_the_licences_of_what_comes_along_come_along() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license-files"]
    carried = {path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern)}
    assert carried >= {"LICENSE", "NOTICE", "licenses/CC-BY-4.0.txt", "licenses/MIT.txt"}
    notice = " ".join((ROOT / "NOTICE").read_text().split())
    for source in Manifest.read(BUNDLED / "talbot").attribution:
        name, *_ = source.split(",")
        assert name.removesuffix("-data") in notice
    assert "CLIP" in notice


def test_a_source_distribution_has_what_make_needs() -> None:
    lines = [line.split() for line in (ROOT / "MANIFEST.in").read_text().splitlines()]
    listed = {name for verb, *names in lines for name in names if verb in ("include", "graft")}
    assert listed >= {"Makefile", "constraints.txt", "benchmarks", "docs", "requirements", "tests", "training"}
    assert all((ROOT / name).exists() for name in listed)
