"""Small T2I-Adapters of random weights, as diffusers and their makers write them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def adapter(seed: int = 0, **settings: Any) -> Any:
    """A ``T2IAdapter`` of those settings, which says something."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers
        import torch

        torch.manual_seed(seed)
        made = diffusers.T2IAdapter(**settings).eval()
        first = made.adapter.conv_in if hasattr(made.adapter, "conv_in") else made.adapter.body[0].in_conv
        first.weight.data *= 4  # so that a picture shows what is made of it
        return made


def original_adapter(state: Mapping[str, Any], resnets: int, *, light: bool) -> dict[str, Any]:
    """Diffusers' state dict as TencentARC's files spell it: ``resnets`` to a block, counted through in full ones."""
    found = {}
    for name, tensor in state.items():
        spelt = name.removeprefix("adapter.")
        if light:
            spelt = spelt.replace(".resnets.", ".body.")
        elif match := re.fullmatch(r"body\.(\d+)\.(resnets\.(\d+)\.)?(.+)", spelt):
            spelt = f"body.{int(match[1]) * resnets + int(match[3] or 0)}.{match[4]}"
        found[spelt] = tensor
    return found


def write_adapter(folder: Path, seed: int = 0, **settings: Any) -> Path:
    """One in ``folder``, in float16."""
    import torch

    adapter(seed, **settings).to(torch.float16).save_pretrained(folder)
    return folder
