"""The files that make installs from: of every package one version, and the hashes of all of that version's files."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name as plain

ROOT = Path(__file__).parent.parent
EXTRAS = {"cpu": ("cpu",), "serve": ("cpu", "serve"), "training": ("cpu", "training"), "dev": ("cpu", "dev")}
MADE = EXTRAS.keys() - {"serve"}  # that is what the Dockerfile installs
HASHED = re.compile(r"(\S+)==([^\s;]+)(?: ; .+)?((?: --hash=sha256:[0-9a-f]{64})+)")
PINNED = {
    plain(name): version
    for name, _, version in (line.partition("==") for line in (ROOT / "constraints.txt").read_text().split())
}
# The client of the Hugging Face Hub, which tokenizers asks for and never imports by itself.
UNUSED = {"cpu": {"huggingface-hub"}, "serve": {"huggingface-hub"}}
BY_PLATFORM = "torch"  # one for processors alone is another file than the index's: it has a version and no hash


def hashed(extra: str) -> dict[str, str]:
    """The versions of a file, every line of which has hashes."""
    lines = (ROOT / "requirements" / f"{extra}.txt").read_text().replace(" \\\n   ", "").splitlines()
    found = [HASHED.fullmatch(line) for line in lines]
    assert all(found), [line[:60] for line, match in zip(lines, found, strict=True) if match is None]
    return {plain(match[1]): match[2] for match in found if match is not None}


def needed(extra: str) -> Iterator[str]:
    """The packages that ``pyproject.toml`` asks for, and those that these ask for here, without PyTorch's own."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    waiting = [Requirement(text) for text in project["dependencies"]]
    waiting += [Requirement(text) for name in EXTRAS[extra] for text in extras[name]]
    known = set[str]()
    while waiting:
        requirement = waiting.pop()
        if str(requirement) in known or plain(requirement.name) in {BY_PLATFORM, *UNUSED.get(extra, ())}:
            continue
        known.add(str(requirement))
        if requirement.name == project["name"]:
            waiting += [Requirement(text) for name in requirement.extras for text in extras[name]]
            continue
        yield plain(requirement.name)
        for text in importlib.metadata.requires(requirement.name) or ():
            own = Requirement(text)
            if own.marker is None or any(own.marker.evaluate({"extra": name}) for name in (*requirement.extras, "")):
                waiting.append(own)


@pytest.mark.parametrize("extra", EXTRAS)
def test_everything_that_is_installed_has_its_hashes_and_the_pinned_version(extra: str) -> None:
    found = hashed(extra)
    assert set(needed(extra)) <= found.keys(), "run: make hashes"
    assert found.items() <= PINNED.items(), "run: make hashes"
    assert "setuptools" in found  # which builds Calotype, that is installed after these


def test_make_installs_nothing_else_but_pytorch_and_calotype() -> None:
    lines = (ROOT / "Makefile").read_text().splitlines()
    given = {name: value for name, _, value in (line.partition(" = ") for line in lines)}
    assert "--require-hashes --no-deps" in given["HASHED"]
    assert given["ITSELF"].endswith("--no-deps --no-build-isolation -e .")
    assert given["TORCH"].endswith("-c constraints.txt torch")
    steps = ("$(HASHED)", "$(ITSELF)", "$(TORCH)", "$(PIP)")
    assert {line.strip() for line in lines if line.lstrip("\t").startswith(steps) and line.startswith("\t")} == {
        *(f"$(HASHED)/{extra}.txt" for extra in MADE),
        *("$(ITSELF)", "$(TORCH)", "$(PIP) uv"),
    }
