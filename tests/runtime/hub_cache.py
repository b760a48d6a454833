"""A bundle as a cache of the Hugging Face Hub holds it: every file a link to one named after its contents."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path


def in_hub_cache(bundle: Path, cache: Path) -> Path:
    """Copy ``bundle`` into ``cache``; the folder of its snapshot."""
    repository = cache / "models--owner--name"
    snapshot, blobs = repository / "snapshots" / "c0ffee", repository / "blobs"
    blobs.mkdir(parents=True)
    for path in sorted(path for path in bundle.rglob("*") if path.is_file()):
        blob, link = blobs / hashlib.sha256(path.read_bytes()).hexdigest(), snapshot / path.relative_to(bundle)
        shutil.copyfile(path, blob)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot
