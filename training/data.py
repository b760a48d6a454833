"""Fetch three openly licensed emoji sets as SVG, name them, render them, pack them into one file."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from training.captions import Concept, held_out
from training.config import PACKAGES, STYLES, TrainingConfig

SKIN = re.compile(r"skin tone|keycap|flag:")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """Pictures (N, S, S, 3) uint8 with the concept and the style of each."""

    pictures: NDArray[np.uint8]
    concepts: tuple[Concept, ...]
    styles: tuple[str, ...]

    def places(self) -> dict[tuple[str, str], int]:
        """The index of a picture by its concept's slug and its style."""
        return {(c.slug, s): n for n, (c, s) in enumerate(zip(self.concepts, self.styles, strict=True))}

    def split(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Indices of training pictures, and of those held out."""
        out = np.array([held_out(c.slug, s) for c, s in zip(self.concepts, self.styles, strict=True)])
        return np.flatnonzero(~out), np.flatnonzero(out)


def read_package(package: str, member: str, folder: Path) -> Any:
    """One JSON file out of an npm package, fetched into ``folder`` with ``npm pack`` when it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    name, _, version = package.rpartition("@")
    archive = folder / f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"
    if not archive.exists():
        subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    with tarfile.open(archive) as tar:
        file = tar.extractfile(f"package/{member}")
        if file is None:
            raise FileNotFoundError(f"{member} in {archive}")
        return json.load(file)


def concepts(entries: Any, groups: tuple[int, ...], drawn: list[set[str]]) -> list[Concept]:
    """Named concepts of ``groups`` in emojibase's ``entries`` that every set in ``drawn`` (slugs) draws."""
    found = []
    for entry in entries:
        label = entry["label"].lower()
        slug = re.sub(r"[^a-z0-9]+", "-", label).strip("-")
        if entry.get("group") in groups and not SKIN.search(label) and all(slug in names for names in drawn):
            words = tuple(tag.lower() for tag in entry.get("tags", ()) if tag.lower() != label)
            found.append(Concept(slug=slug, name=label, keywords=words, group=entry["group"]))
    return found


def render(body: str, view_box: str, size: int) -> NDArray[np.uint8]:
    """An SVG body on white, at twice the size and halved with a Lanczos filter; (size, size, 3) uint8."""
    import resvg_py

    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    svg = f'<svg {names} viewBox="{view_box}">{body}</svg>'
    png = resvg_py.svg_to_bytes(svg_string=svg, width=2 * size, height=2 * size, background="white")
    picture = Image.open(io.BytesIO(bytes(png))).convert("RGB")
    return np.asarray(picture.resize((size, size), Image.Resampling.LANCZOS))


def make(config: TrainingConfig) -> None:
    """Write ``data.npz`` in the work folder: the pictures of every group that a network learns from."""
    npm = config.work.parent / "npm"  # shared by all configurations
    sets = {style: read_package(PACKAGES[style], "icons.json", npm) for style in STYLES}
    names = read_package(PACKAGES["names"], "en/data.json", npm)
    groups = tuple({*config.groups, *config.autoencoder_groups})
    chosen = concepts(names, groups, [set(value["icons"]) for value in sets.values()])
    pictures, drawn, styles = [], [], []
    for concept in chosen:
        for style, value in sets.items():
            icon = value["icons"][concept.slug]
            width, height = (icon.get(key, value.get(key, 16)) for key in ("width", "height"))
            pictures.append(render(icon["body"], f"0 0 {width} {height}", config.image_size))
            drawn.append(dataclasses.asdict(concept))
            styles.append(style)
    path = data_path(config)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, pictures=np.stack(pictures), concepts=json.dumps(drawn), styles=json.dumps(styles))
    print(f"{path}: {len(pictures)} pictures of {len(chosen)} concepts", file=sys.stderr)


def data_path(config: TrainingConfig) -> Path:
    """Where the packed pictures lie."""
    return config.work / "data.npz"


def load(config: TrainingConfig, groups: tuple[int, ...] | None = None) -> Dataset:
    """Read what :func:`make` wrote, only the concepts of ``groups``; by default those that the UNet draws."""
    groups = config.groups if groups is None else groups
    with np.load(data_path(config)) as file:
        concepts = [
            Concept(**(item | {"keywords": tuple(item["keywords"])})) for item in json.loads(str(file["concepts"]))
        ]
        chosen = [n for n, concept in enumerate(concepts) if concept.group in groups]
        styles = json.loads(str(file["styles"]))
        return Dataset(
            pictures=file["pictures"][chosen],
            concepts=tuple(concepts[n] for n in chosen),
            styles=tuple(styles[n] for n in chosen),
        )
