"""What a UNet predicts: what its file says, or what the UNet itself does."""

from __future__ import annotations

import logging
import re

import torch
from torch import Tensor

from calotype.export.models.unet import UNet
from calotype.export.single_file import SingleFile
from calotype.runtime.errors import CheckpointError, quoted

logger = logging.getLogger(__name__)

LAST_TIMESTEP = 999.0
PREDICTS_NOISE = 0.6  # the least likeness to noise of a UNet that predicts it

# How trainers and converters spell what diffusers calls a prediction type.
SPELT = {
    "epsilon": "epsilon",
    "eps": "epsilon",
    "EpsScaling": "epsilon",
    "v": "v_prediction",
    "v_prediction": "v_prediction",
    "vpred": "v_prediction",
    "VScaling": "v_prediction",
    "x0": "sample",
    "sample": "sample",
}
_SPELT = {name.lower(): meaning for name, meaning in SPELT.items()}
# In the settings of Stability's two code bases; a line that is a comment does not count.
_PARAMETERIZATION = re.compile(r"""(?m)^[^#\n]*?\bparameterization["']?\s*:\s*["']?(\w+)""")
_SCALING = re.compile(r"(?m)^[^#\n]*?\bdenoiser_scaling\.(\w+)")
_ZERO_SNR = re.compile(r"(?im)^[^#\n]*?\b(?:ztsnr|zero_terminal_snr|rescale_betas_zero_snr)[\"']?\s*:\s*true\b")


def stated_prediction_type(file: SingleFile, usual: str | None) -> str | None:
    """What the file, or the settings beside it, say that its UNet predicts; None where they say nothing.

    A line in the log tells it where it is not the ``usual``, which is None in a family that has none.

    Raises:
        CheckpointError: what they say is no known prediction type.
    """
    statements = _statements(file)
    if not statements:
        return None
    (where, first), *others = statements.items()
    prediction = _known(where, first, file)
    disagreeing = [f"{place} says {said}" for place, said in others if _known(place, said, file) != prediction]
    if disagreeing or usual not in (None, prediction):
        logger.warning(
            "%s is taken to predict %s, by %s%s; --prediction-type sets another",
            file.path.name,
            prediction,
            where,
            "".join(f", though {disagreement}" for disagreement in disagreeing),
        )
    return prediction


def ends_in_noise(file: SingleFile) -> bool:
    """Whether the noise schedule is said to end in nothing but noise (Lin et al. 2023, arXiv 2305.08891)."""
    marks = ("ztsnr" in file.state, _ZERO_SNR.search(file.settings_beside) is not None)
    return any(marks) or file.metadata.get("ss_zero_terminal_snr", "").lower() == "true"


def _statements(file: SingleFile) -> dict[str, str]:
    """Where something is said, the strongest first, and what."""
    found = {"its tensor v_pred": "v"} if "v_pred" in file.state else {}
    for where, pattern in (("the settings beside it", _PARAMETERIZATION), ("the denoiser beside it", _SCALING)):
        match = pattern.search(file.settings_beside)
        found |= {} if match is None else {where: match[1]}
    keys = ("modelspec.prediction_type", "modelspec.predict_key")  # the specification's, and ComfyUI's
    return found | {f"its {key}": file.metadata[key] for key in keys if file.metadata.get(key)}


def _known(where: str, said: str, file: SingleFile) -> str:
    meaning = _SPELT.get(said.strip().lower().replace("-", "_"))
    if meaning is None:
        raise CheckpointError(
            f"{file.path}: {where} says that it predicts {quoted(said)}, which is not known; say what it does with "
            f"--prediction-type {' or '.join(dict.fromkeys(SPELT.values()))}"
        )
    return meaning


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
