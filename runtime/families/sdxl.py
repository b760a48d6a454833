"""Stable Diffusion XL: two text encoders, and a UNet that is told sizes; Podell et al. 2023 (arXiv 2307.01952)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from calotype.runtime.arrays import Inputs
from calotype.runtime.bundle.manifest import Manifest
from calotype.runtime.families.base import Encoder
from calotype.runtime.families.sd import SIZES, StableDiffusion
from calotype.runtime.pictures.canvas import Canvas
from calotype.runtime.request import Request


@dataclasses.dataclass(frozen=True, kw_only=True)
class StableDiffusionXL(StableDiffusion):
    """See :class:`calotype.runtime.families.base.Family`."""

    encoders: tuple[Encoder, ...] = (
        Encoder(network="text_encoder", tokenizer="tokenizer"),
        Encoder(network="text_encoder_2", tokenizer="tokenizer_2"),
    )

    def size_rows(self, manifest: Manifest, request: Request, canvas: Canvas) -> Inputs:
        """The six numbers of section 2.2: original size, crop and target size, each (height, width) or (top, left)."""
        size = (canvas.height, canvas.width)
        usual = {"original_size": size, "crops_coords_top_left": (0, 0), "target_size": size}
        pairs = [getattr(request, name) or usual[name] for name in SIZES]
        return {"time_ids": np.array(pairs, np.float32).reshape(-1)}

    def solver_settings(self, settings: Mapping[str, Any], area: int, steps: int) -> Mapping[str, Any]:
        """See :meth:`calotype.runtime.families.base.Family.solver_settings`."""
        return {**settings, "sigma_spacing": "ays-sdxl"} if settings.get("sigma_spacing") == "ays" else settings


SDXL = StableDiffusionXL(name="sdxl")
