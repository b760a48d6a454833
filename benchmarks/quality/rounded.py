"""Talbot in float16 on the CPU: its graphs, rounded as a GPU would round."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

from calotype.export.precision import write_rounded
from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.bundle.manifest import MANIFEST_NAME, FileRecord


def rounded(folder: Path) -> Bundle:
    """Talbot in ``folder``, each network computing what its float16 graph does."""
    bundle = Bundle.open("talbot")
    networks = {}
    shutil.copytree(bundle.path, folder, dirs_exist_ok=True)
    for name, spec in bundle.manifest.networks.items():
        islands = bundle.manifest.parity[name]["float16"]["float32_islands"]
        write_rounded(folder / spec.graphs["float32"], islands, folder / f"{name}.rounded.onnx")
        networks[name] = dataclasses.replace(spec, graphs={"float32": f"{name}.rounded.onnx"})
    files = {path.name: FileRecord.of(path) for path in folder.glob("*.rounded.onnx")}
    manifest = dataclasses.replace(bundle.manifest, networks=networks, files={**bundle.manifest.files, **files})
    (folder / MANIFEST_NAME).write_text(manifest.dumps(), encoding="utf-8")
    return Bundle(folder, manifest)
