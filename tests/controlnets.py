"""Small ControlNets of random weights, as diffusers writes them, whose zero convolutions have values."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any


def controlnet(seed: int = 0, *, union: bool = False, **settings: Any) -> Any:
    """A ``ControlNetModel`` of those settings; untrained it would add nothing, so what makes it so is made random.

    ``union`` makes a ``ControlNetUnionModel``.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers
        import torch

        torch.manual_seed(seed)
        made = (diffusers.ControlNetUnionModel if union else diffusers.ControlNetModel)(**settings)
        zeros = [*made.controlnet_down_blocks, made.controlnet_mid_block, made.controlnet_cond_embedding.conv_out]
        if union:
            zeros.append(made.spatial_ch_projs)
        for zero in zeros:
            torch.nn.init.normal_(zero.weight, std=zero.weight[0].numel() ** -0.5)
            torch.nn.init.normal_(zero.bias, std=0.1)
        return made.eval()


def write_controlnet(folder: Path, seed: int = 0, *, union: bool = False, **settings: Any) -> Path:
    """The same in ``folder``, in float16."""
    import torch

    controlnet(seed, union=union, **settings).to(torch.float16).save_pretrained(folder)
    return folder
