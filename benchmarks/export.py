"""What an export takes: ``python -m benchmarks.export [talbot|sd1|sdxl]``. Seconds, memory and bytes, as JSON.

A checkpoint of the real size is made on the spot in diffusers' layout, in float16, and exported by the command line in
a process of its own, whose largest resident size the kernel counts (mapped files are part of it).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import onnxscript
import torch

from benchmarks.checkpoints import SIZES
from benchmarks.machine import machine, origin
from calotype.runtime.bundle.manifest import Manifest


def main() -> None:
    """Make, export, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.export", description=__doc__)
    parser.add_argument("family", nargs="?", choices=("talbot", *SIZES), default="sd1")
    family = parser.parse_args().family
    with tempfile.TemporaryDirectory() as folder:
        source, bundle = Path(folder) / "checkpoint", Path(folder) / "bundle"
        # In a process of its own, so that its memory is not counted as the export's.
        subprocess.run(
            [sys.executable, "-c", f"import benchmarks.checkpoints as c; c.make({family!r}, {str(source)!r})"],
            check=True,
        )
        made = resource.getrusage(resource.RUSAGE_CHILDREN)
        load, start = os.getloadavg()[0], time.perf_counter()
        command = [sys.executable, "-m", "calotype.runtime", "export", str(source), str(bundle)]
        subprocess.run(command, check=True, stdout=sys.stderr)
        seconds = time.perf_counter() - start
        spent = resource.getrusage(resource.RUSAGE_CHILDREN)
        if spent.ru_maxrss <= made.ru_maxrss:
            sys.exit("making the checkpoint took more memory than its export, whose own cannot be told then")
        report = {
            **origin(f"python -m benchmarks.export {family}"),
            "machine": {
                **machine(),
                "load_before_and_after": [round(load, 1), round(os.getloadavg()[0], 1)],
                **{module.__name__: module.__version__ for module in (torch, onnx, onnxruntime, onnxscript)},
            },
            "seconds": round(seconds),
            "cpu_seconds": round(spent.ru_utime + spent.ru_stime - made.ru_utime - made.ru_stime),
            "peak_resident_gb": round(spent.ru_maxrss * 1024 / 1e9, 1),
            **_sizes(bundle),
        }
    print(json.dumps(report, indent=2))


def _sizes(bundle: Path) -> dict[str, Any]:
    manifest = Manifest.read(bundle)
    return {
        "graphs_mb": {
            name: round(file.size / 1e6, 2) for name, file in manifest.files.items() if name.endswith("onnx")
        },
        "weights_mb": {
            name: round(file.size / 1e6, 1) for name, file in manifest.files.items() if name.endswith("safetensors")
        },
        "parity": {
            network: {
                precision: {key: len(value) if isinstance(value, dict) else value for key, value in figures.items()}
                for precision, figures in report.items()
            }
            for network, report in manifest.parity.items()
        },
    }


if __name__ == "__main__":
    main()
