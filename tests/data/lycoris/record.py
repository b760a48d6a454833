"""Write ``merged.safetensors``: what LyCORIS itself makes of a layer, for every kind of its modules.

    python tests/data/lycoris/record.py

It needs the package lycoris-lora (4.1.3, with einops and toml). All values are drawn at random from a fixed seed. Of
each case there are ``CASE/base.PARAMETER``, the layer's own; ``CASE/file.KEY``, what LyCORIS saves of the module; and
``CASE/SCALE.PARAMETER``, what the layer computes with, as its forward pass shows it, at that multiplier.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lycoris.modules.base import LycorisBaseModule
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.full import FullModule
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule
from safetensors.torch import save_file

LINEAR, CONV, CONV1, NORM = "linear", "conv", "conv1", "norm"
LOW = {"lora_dim": 2, "alpha": 3.0}
CASES: dict[str, tuple[type[LycorisBaseModule], str, dict[str, Any]]] = {
    "locon": (LoConModule, LINEAR, LOW),
    "locon-conv": (LoConModule, CONV, LOW),
    "locon-conv1": (LoConModule, CONV1, LOW),
    "locon-tucker": (LoConModule, CONV, {**LOW, "use_tucker": True}),
    "locon-rank-stabilised": (LoConModule, LINEAR, {**LOW, "rs_lora": True}),
    "loha": (LohaModule, LINEAR, LOW),
    "loha-conv": (LohaModule, CONV, LOW),
    "loha-tucker": (LohaModule, CONV, {**LOW, "use_tucker": True}),
    "lokr": (LokrModule, LINEAR, {**LOW, "lora_dim": 1}),
    "lokr-whole": (LokrModule, LINEAR, {**LOW, "full_matrix": True}),
    "lokr-both": (LokrModule, LINEAR, {"lora_dim": 1, "alpha": 3.0, "decompose_both": True}),
    "lokr-factor": (LokrModule, LINEAR, {**LOW, "lora_dim": 1, "factor": 2}),
    "lokr-conv": (LokrModule, CONV, {**LOW, "lora_dim": 1}),
    "lokr-conv-whole": (LokrModule, CONV, {**LOW, "full_matrix": True}),
    "lokr-tucker": (LokrModule, CONV, {**LOW, "lora_dim": 1, "use_tucker": True}),
    "dora": (LoConModule, LINEAR, {**LOW, "weight_decompose": True}),
    "dora-conv": (LoConModule, CONV, {**LOW, "weight_decompose": True}),
    "dora-inputs": (LoConModule, LINEAR, {**LOW, "weight_decompose": True, "wd_on_out": False}),
    "dora-inputs-conv": (LoConModule, CONV, {**LOW, "weight_decompose": True, "wd_on_out": False}),
    "dora-loha": (LohaModule, CONV, {**LOW, "weight_decompose": True}),
    "dora-lokr": (LokrModule, LINEAR, {**LOW, "lora_dim": 1, "weight_decompose": True}),
    "full": (FullModule, LINEAR, {}),
    "full-conv": (FullModule, CONV, {}),
    "norm": (NormModule, NORM, {}),
    "oft": (DiagOFTModule, LINEAR, {"lora_dim": 4}),
    "oft-conv": (DiagOFTModule, CONV, {"lora_dim": 4}),
    "oft-limited": (DiagOFTModule, LINEAR, {"lora_dim": 4, "constraint": 0.02}),
    "oft-rescaled": (DiagOFTModule, CONV, {"lora_dim": 4, "rescaled": True}),
    "boft": (ButterflyOFTModule, LINEAR, {"lora_dim": 4}),
    "boft-conv": (ButterflyOFTModule, CONV, {"lora_dim": 4}),
    "boft-limited": (ButterflyOFTModule, LINEAR, {"lora_dim": 4, "constraint": 0.02}),
    "boft-rescaled": (ButterflyOFTModule, CONV, {"lora_dim": 4, "rescaled": True}),
}
SCALES = (1.0, 0.7, -0.5)


def layer(kind: str) -> torch.nn.Module:
    return {
        LINEAR: lambda: torch.nn.Linear(6, 16),
        CONV: lambda: torch.nn.Conv2d(6, 16, 3),
        CONV1: lambda: torch.nn.Conv2d(6, 16, 1),
        NORM: lambda: torch.nn.GroupNorm(2, 16),
    }[kind]()


def computed_with(module: LycorisBaseModule, base: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weight and bias that the module's forward pass has, read off one-hot inputs."""
    if isinstance(module, NormModule):
        weight, bias = module.make_weight(module.multiplier)
        return {"weight": weight, "bias": bias}
    inputs = torch.eye(base.weight[0].numel()).reshape(-1, *base.weight.shape[1:])
    bias = module.forward(torch.zeros_like(inputs[:1])).reshape(-1)
    weight = (module.forward(inputs).reshape(len(inputs), -1) - bias).T.reshape(base.weight.shape)
    return {"weight": weight} | ({"bias": bias} if isinstance(module, FullModule) else {})


def record(case: str) -> dict[str, torch.Tensor]:
    kind, base_kind, settings = CASES[case]
    torch.manual_seed(list(CASES).index(case))
    base = layer(base_kind)
    for parameter in base.parameters():
        torch.nn.init.normal_(parameter)
    module = kind("m", base, **settings)
    module.eval()
    for parameter in module.parameters():
        if not any(parameter is own for own in base.parameters()):
            torch.nn.init.normal_(parameter, std=0.7)
    values = {f"base.{name}": value for name, value in base.named_parameters()}
    # What is trained of full differences is the difference, which its own saving takes from the whole weight.
    own = {"diff": module.weight, "diff_b": module.bias} if kind is FullModule else dict(module.state_dict())
    values |= {f"file.{name}": value for name, value in own.items()}
    # Less than the whole of a DoRA is another thing to each program: see calotype.runtime.adapters.dora.
    for scale in SCALES if "dora" not in case else SCALES[:1]:
        module.multiplier = scale
        values |= {f"{scale:g}.{name}": value for name, value in computed_with(module, base).items()}
    return {f"{case}/{name}": value.detach().float().contiguous().clone() for name, value in values.items()}


if __name__ == "__main__":
    with torch.no_grad():
        tensors = {name: value for case in CASES for name, value in record(case).items()}
    save_file(tensors, Path(__file__).with_name("merged.safetensors"))
