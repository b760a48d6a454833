"""The benchmark of image prompts: its adapters change what both sides compute."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks import ip_adapter
from calotype.export.bundle import export_checkpoint


def test_its_adapters_change_what_both_sides_compute(tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    files, bundles = {}, {}
    for kind in ("plain", "plus"):
        files[kind] = tmp_path / kind / f"{kind}.safetensors"
        files[kind].parent.mkdir()
        ip_adapter.save_adapter(kind, tiny_checkpoint, files[kind])
        bundles[kind] = tmp_path / kind / "bundle"
        export_checkpoint(files[kind], bundles[kind], precision="fp32")
    cases = {"without": (), **ip_adapter.STAGES["prompted"]}
    theirs = ip_adapter.Diffusers(tiny_checkpoint, files, 64)
    ours = ip_adapter.Calotype(tiny_bundle, bundles, 64, cases)
    made, moved = [], []
    with ours.pipeline:
        for case, kinds in cases.items():
            theirs.use(kinds)
            made.append(theirs.step().numpy())
            ours.steps(case)()
            moved.append(ours._jobs[case].latents.copy())
    for found in (made, moved):
        assert all(float(np.abs(found[0] - other).max()) > 1e-4 for other in found[1:])
