"""The bundled model: it is whole, of the promised size, and its prompt steers the picture."""

from __future__ import annotations

import numpy as np

from calotype.runtime.bundle import Bundle
from calotype.runtime.pipeline import Pipeline


def test_it_is_whole_and_small() -> None:
    manifest = Bundle.open("talbot").manifest
    weights = sum(record.size for name, record in manifest.files.items() if name.endswith(".safetensors"))
    assert weights <= 32 * 2**20
    assert any("CC-BY-4.0" in line for line in manifest.attribution)
    assert all(report["float32"]["max_relative"] <= 1e-4 for report in manifest.parity.values())


def test_an_apple_is_red_and_a_tree_is_green() -> None:
    with Pipeline.load("talbot") as pipeline:
        apple, tree = pipeline(["red apple, noto style", "evergreen tree, noto style"], seed=0, output_type="np").images
    # Mean colour of the middle, where the object is: (R, G, B) in 0..1.
    apple_rgb, tree_rgb = (np.asarray(image)[16:48, 16:48].mean(axis=(0, 1)) for image in (apple, tree))
    assert apple_rgb[0] > apple_rgb[1] + 0.2
    assert apple_rgb[0] > apple_rgb[2] + 0.2
    assert tree_rgb[1] > tree_rgb[0] + 0.1
