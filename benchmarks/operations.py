"""Operations of networks, counted from the modules that their graphs are traced from."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from calotype.export.graphs import GraphPlan, unet_plans, vae_plans
from calotype.export.models.autoencoder import Autoencoder, AutoencoderConfig
from calotype.export.models.unet import UNet, UNetConfig

BESIDE = {"adapters": 1, "image_tokens": 1}  # of image prompts, where nothing is said of them


def plans(unet: UNetConfig, vae: AutoencoderConfig | None = None) -> list[GraphPlan]:
    """The graphs of a UNet, and of an autoencoder, whose modules have no memory (device "meta")."""
    with torch.device("meta"):
        found = unet_plans(UNet(unet).eval())
        return found if vae is None else [*found, *vae_plans(Autoencoder(vae).eval())]


def operations(plan: GraphPlan, sizes: dict[str, int]) -> float:
    """The operations of one run at ``sizes``; a multiplication with its addition counts as two."""
    return float(counted(plan, sizes).get_total_flops())


def counted(plan: GraphPlan, sizes: dict[str, int]) -> FlopCounterMode:
    """The operations of one run at ``sizes``, module by module; the plan's module is on the device "meta"."""
    known = {**BESIDE, **sizes}
    inputs = {spec.name: torch.zeros(spec.resolve(known), device="meta") for spec in plan.inputs}
    with FlopCounterMode(display=False, depth=12) as counter, torch.no_grad():
        plan.module(**inputs)
    return counter


def unet_operations(config: UNetConfig, side: int, tokens: int) -> dict[str, float]:
    """The operations of one row, by network; latents are ``side`` wide and high."""
    sizes = {"rows": 1, "tokens": tokens, "height": side, "width": side}
    return {plan.network: operations(plan, sizes) for plan in plans(config)}
