"""The wheel and the source distribution, the same bytes whenever and wherever they are made: ``make dist``.

What git tracks is copied to a new folder, with its modes and the time of the last commit (or SOURCE_DATE_EPOCH), and
setuptools builds there. The tar file that it makes has times and owners of its own, so it is written anew.
"""

from __future__ import annotations

import gzip
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = "from setuptools import build_meta as b; b.build_{kind}({target!r})"


def main(target: Path) -> None:
    """Write both into the folder ``target``."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH") or git("log", "-1", "--format=%ct").strip()
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        copy(source, int(epoch))
        environment = os.environ | {"SOURCE_DATE_EPOCH": epoch, "PYTHONHASHSEED": "0"}
        for kind in ("wheel", "sdist"):
            code = BUILD.format(kind=kind, target=folder)
            # What it says beside is of folders of data, which setuptools takes for packages.
            command = [sys.executable, "-c", code]
            ran = subprocess.run(command, cwd=source, env=environment, umask=0o022, capture_output=True, text=True)
            if ran.returncode:
                sys.exit(ran.stderr)
        for path in sorted(Path(folder).glob("calotype-*")):
            made = target / path.name
            made.write_bytes(plain(path, int(epoch)) if path.name.endswith(".tar.gz") else path.read_bytes())
            print(made)


def git(*arguments: str) -> str:
    """What git says."""
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def copy(target: Path, epoch: int) -> None:
    """The tracked files as they are now, with plain modes."""
    for name in git("ls-files", "-z").split("\0"):
        if name and (ROOT / name).is_file():
            place = target / name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, place)
            place.chmod(0o755 if os.access(ROOT / name, os.X_OK) else 0o644)
            os.utime(place, (epoch, epoch))


def plain(path: Path, epoch: int) -> bytes:
    """A .tar.gz with its files sorted, of nobody, and all of one time."""
    data, packed = io.BytesIO(), io.BytesIO()
    with tarfile.open(path) as old, tarfile.open(fileobj=data, mode="w", format=tarfile.PAX_FORMAT) as new:
        for member in sorted(old.getmembers(), key=lambda item: item.name):
            member.mtime, member.uid, member.gid, member.uname, member.gname = epoch, 0, 0, "", ""
            member.mode, member.pax_headers = 0o755 if member.isdir() or member.mode & 0o100 else 0o644, {}
            new.addfile(member, old.extractfile(member) if member.isfile() else None)
    with gzip.GzipFile("", "wb", 9, packed, mtime=epoch) as file:
        file.write(data.getvalue())
    return packed.getvalue()


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "dist"))
