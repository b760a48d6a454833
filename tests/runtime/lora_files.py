"""LoRA files, for talbot where nothing else is said, small and of random numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from calotype.runtime.bundle.folder import BUNDLED
from calotype.runtime.bundle.safetensors import SafetensorsFile

RANK = 2
UNET, TEXT = "unet", "text_encoder"
# Linear, a convolution of 1 x 1 and of 3 x 3 pixels, and one of the text encoder's.
MODULES = {
    UNET: (
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "mid_block.attentions.0.proj_in",
        "mid_block.resnets.0.conv1",
        "up_blocks.0.resnets.0.time_emb_proj",
        "conv_out",
    ),
    TEXT: ("text_model.encoder.layers.0.mlp.fc1",),
}


def write_lora(
    path: Path,
    seed: int,
    networks: tuple[str, ...] = (UNET, TEXT),
    strength: float = 0.1,
    modules: Mapping[str, tuple[str, ...]] = MODULES,
    bundle: Path = BUNDLED / "talbot",
) -> Path:
    """A LoRA that changes ``modules`` of each of ``networks`` of ``bundle``."""
    rng, state = np.random.default_rng(seed), {}
    for network in networks:
        own = SafetensorsFile(bundle / f"{network}.safetensors")
        for module in modules[network]:
            rows, *columns = own.shape(f"{module}.weight")
            name = f"{network}.{module}"
            state[f"{name}.lora_A.weight"] = rng.standard_normal((RANK, *columns), np.float32)
            up = strength * rng.standard_normal((rows, RANK, *(1 for _ in columns[1:])), np.float32)
            state[f"{name}.lora_B.weight"] = up.astype(np.float32)
    save_file(state, path)
    return path
