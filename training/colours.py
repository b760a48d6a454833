"""Let prompts ask for a colour: the UNet and its text encoder go on with recoloured pictures.

Captions of the first training have no colour but those in names. Here a picture that mostly has one colour comes in
every other one as well, with that colour before its name, or now and then as it is with its own; the rest come as
before, so that nothing is forgotten. People keep their colours, and so does what has a colour in its name.
"""

from __future__ import annotations

import re
import sys

import numpy as np
import torch
from torch import Tensor

from training import autoencoder, data
from training.captions import Concept, sample_caption
from training.config import TrainingConfig
from training.palette import NAMED, TARGETS, main_colour, recolour
from training.unet import Stage, autoencoder_step, fit, latents, trained

PEOPLE = 1  # emojibase's group
WORDS = {*NAMED, "grey"}


def takes_colour(concept: Concept) -> bool:
    """Whether a prompt may ask for this concept in a colour."""
    return concept.group != PEOPLE and not WORDS & set(re.findall(r"\w+", concept.name))


def own_colours(dataset: data.Dataset) -> dict[int, str]:
    """By a picture's index its main colour, where it has one and its concept takes one."""
    found = {n: main_colour(dataset.pictures[n]) for n, each in enumerate(dataset.concepts) if takes_colour(each)}
    return {n: colour for n, colour in found.items() if colour is not None}


def others(own: str) -> tuple[str, ...]:
    """The colours that a picture of this one comes in besides; none for black, white and gray, which have no hue."""
    return tuple(target for target in TARGETS if target != own) if own in TARGETS else ()


def recoloured(config: TrainingConfig, dataset: data.Dataset, own: dict[int, str]) -> tuple[Tensor, dict[int, int]]:
    """Latents of every picture in :func:`others` in turn, scaled, and where a picture's begin."""
    path, step = config.work / "recoloured.pt", autoencoder_step(config)
    counts = {n: len(others(colour)) for n, colour in own.items() if others(colour)}
    saved = torch.load(path, weights_only=True) if path.exists() else {}
    if saved.get("autoencoder_step", -1) != step:
        model = autoencoder.load(config)
        encoded = []
        for n in counts:
            pictures = np.stack([recolour(dataset.pictures[n], target) for target in others(own[n])])
            encoded.append(autoencoder.encode_all(model, pictures).cpu().half())
        saved = {"latents": torch.cat(encoded), "autoencoder_step": step}
        torch.save(saved, path)
        print(f"{path}: {len(saved['latents'])} recoloured pictures", file=sys.stderr)
    starts = np.cumsum([0, *counts.values()])[:-1]
    return saved["latents"].float() * latents(config)[1], dict(zip(counts, starts.tolist(), strict=True))


def train(config: TrainingConfig) -> None:
    """Train until the budget is spent; the checkpoint is ``colours.pt``."""
    torch.manual_seed(config.seed)
    dataset = data.load(config)
    own = own_colours(dataset)
    encoded = latents(config)[0].to(config.device)
    changed, starts = recoloured(config, dataset, own)
    changed = changed.to(config.device)

    def draw(part: np.ndarray, count: int, rng: np.random.Generator) -> tuple[Tensor, list[str]]:
        clean, captions = [], []
        for n in rng.choice(part, count):
            colour = None
            clean.append(encoded[n])
            if n in starts and rng.random() < config.colours_changed:
                choices = others(own[n])
                place = int(rng.integers(len(choices)))
                colour, clean[-1] = choices[place], changed[starts[n] + place]
            elif n in own and rng.random() < config.colours_named:
                colour = own[n]
            captions.append(sample_caption(dataset.concepts[n], dataset.styles[n], rng, colour))
        return torch.stack(clean), captions

    stage = Stage(
        name="colours", budget=config.colours_budget, batch=config.colours_batch, lr=config.colours_lr, draw=draw
    )
    fit(config, stage, *trained(config, ("unet",)), dataset.split())
