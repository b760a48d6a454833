"""Checkpoints of random weights say of themselves what the released ones do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import nn

from benchmarks import checkpoints


@pytest.mark.parametrize(("family", "latents", "pixels"), [("sd1", 64, 512), ("sdxl", 128, 1024)])
def test_a_family_has_its_own_size(
    family: str, latents: int, pixels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the weights, which are gigabytes."""
    sizes = {name: (lambda _: nn.Identity(), config) for name, (_, config) in checkpoints.SIZES[family].items()}
    monkeypatch.setitem(checkpoints.SIZES, family, sizes)  # type: ignore[arg-type]
    checkpoints.make(family, str(tmp_path))
    size = {name: json.loads((tmp_path / name / "config.json").read_text())["sample_size"] for name in ("unet", "vae")}
    assert size == {"unet": latents, "vae": pixels}
