"""What a UNet predicts, asked of the UNet itself."""

from __future__ import annotations

import torch
from torch import Tensor

from calotype.export.models.unet import UNet

LAST_TIMESTEP = 999.0
PREDICTS_NOISE = 0.6  # the least likeness to noise of a UNet that predicts it


def likeness_to_noise(unet: UNet, encoder_hidden_states: Tensor) -> float:
    """How much of pure noise, at the last timestep, the UNet gives back: the correlation of its output with it.

    A UNet that predicts noise gives all of it back, since nothing else is there: about 1. One that predicts velocity,
    ``v = alpha * noise - sigma * picture`` (Salimans and Ho 2022, arXiv 2202.00512), gives its guess at the picture, of
    which the noise tells nothing. On a trained model of this project: 0.25, and 0.99999 for the noise that follows from
    its velocity.

    Args:
        unet: of Stable Diffusion 2.x, or one that takes no more inputs.
        encoder_hidden_states: (1, T, D), of the empty prompt.
    """
    config = unet.config
    # (1, in_channels, 32, 32); an inpainting UNet reads a mask and a picture besides: all is to be painted.
    sample = torch.zeros(1, config.in_channels, 32, 32)
    noise = torch.randn(1, config.out_channels, 32, 32, generator=torch.Generator().manual_seed(0))
    sample[:, : config.out_channels] = noise
    sample[:, config.out_channels : config.out_channels + 1] = 1
    with torch.no_grad():
        predicted = unet(sample, torch.tensor([LAST_TIMESTEP]), encoder_hidden_states)
    return float(torch.corrcoef(torch.stack([predicted.flatten(), noise.flatten()]))[0, 1])
