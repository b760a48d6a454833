"""Let prompts ask for a colour: the text encoder learns what the UNet draws recoloured pictures by.

Captions have no colour but those in names. Here a picture that mostly has one colour comes in every other one, with
that colour before its name. The UNet stays as it is: the loss is its own, on the recoloured picture, and only the text
encoder follows it, as textual inversion (Gal et al. 2022, arXiv 2208.01618) looks for what a frozen model draws
something by. Captions without a colour keep their hidden states. People keep their colours, and so does what has one
in its name.
"""

from __future__ import annotations

import copy
import re
import sys

import numpy as np
import torch
from torch import Tensor

from calotype.export.models.clip import TextEncoder
from training import autoencoder, data
from training.captions import Concept, sample_caption
from training.config import TrainingConfig
from training.palette import NAMED, TARGETS, main_colour, recolour
from training.run import Run
from training.texts import Texts
from training.unet import TRAIN_STEPS, alphas_cumprod, autoencoder_step, latents, loss, trained

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
    seen, _ = dataset.split()
    own = own_colours(dataset)
    changed, starts = recoloured(config, dataset, own)
    encoded = latents(config)[0]
    asked = np.array([n for n in seen if n in starts])
    unet, original = trained(config)
    texts, model = Texts(config), copy.deepcopy(original).requires_grad_(True)
    optimizer = torch.optim.AdamW(model.text_model.parameters(), lr=config.colours_lr, weight_decay=0.0)
    run = Run("colours", config, config.colours_budget)
    parts = {"model": model, "optimizer": optimizer}
    run.resume(parts)
    alphas = alphas_cumprod().to(config.device)
    error = torch.compile(loss) if config.compile else loss
    for update in run.steps(optimizer, parts):
        clean, captions = [], []
        for n in run.rng.choice(asked, config.colours_batch):
            choices = (own[n], *others(own[n]))
            place = int(run.rng.integers(len(choices)))
            clean.append(changed[starts[n] + place - 1] if place else encoded[n])
            captions.append(sample_caption(dataset.concepts[n], dataset.styles[n], run.rng, choices[place]))
        kept = [
            sample_caption(dataset.concepts[n], dataset.styles[n], run.rng)
            for n in run.rng.choice(seen, config.colours_batch)
        ]
        kept[0] = ""  # what guidance goes away from
        with torch.no_grad():
            wanted = original(texts.encode(kept))[0]
        got = model(texts.encode(captions + kept))[0]
        context, same = got.split([len(captions), len(kept)])
        # With little noise the picture shows its colour, and the text is not asked.
        timestep = torch.randint(config.colours_from, TRAIN_STEPS, (len(clean),), device=config.device)
        pictures = torch.stack(clean).to(config.device, memory_format=torch.channels_last)
        with config.autocast():
            drawn = error(unet, pictures, timestep, alphas[timestep], context, config.min_snr_gamma)
        strayed = (same - wanted).square().mean() / wanted.var(dim=0).mean()
        update(drawn + config.colours_keep * strayed)
    print(f"colours: {run.step} steps")


def load(config: TrainingConfig) -> TextEncoder:
    """The text encoder that knows colours; without that stage, the one before it. Frozen."""
    model, path = trained(config)[1], config.work / "colours.pt"
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True)["model"])
    return model
