"""Networks that take turns draw the same picture, one open at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from calotype.runtime.pipeline import Pipeline
from calotype.runtime.sessions.onnxruntime_cpu import OnnxRuntimeCpuSession


class Counted(OnnxRuntimeCpuSession):
    """Counts how many are open."""

    now = most = total = 0

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        Counted.total += 1
        Counted.now += 1
        Counted.most = max(Counted.most, Counted.now)

    def close(self) -> None:
        Counted.now -= 1
        super().close()


def test_one_network_is_open_at_a_time(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"seed": 3, "num_inference_steps": 3, "num_images_per_prompt": 2, "output_type": "np"}
    with Pipeline.load(tiny_bundle, "cpu") as pipeline:
        wanted = pipeline("red apple", **settings).images
        picture = Image.fromarray((wanted[0] * 255).astype(np.uint8))
        again = pipeline("red apple", image=picture, strength=0.5, **settings).images
    monkeypatch.setattr("calotype.runtime.sessions.onnxruntime_cpu.OnnxRuntimeCpuSession", Counted)
    with Pipeline.load(tiny_bundle, "cpu", low_memory=True) as pipeline:
        assert Counted.total == 0
        np.testing.assert_array_equal(pipeline("red apple", **settings).images, wanted)
        assert Counted.total == 3
        pictures = pipeline("red apple", image=picture, strength=0.5, **settings).images
        np.testing.assert_array_equal(pictures, again)
        assert (Counted.most, Counted.now) == (1, 1)
    assert Counted.now == 0
