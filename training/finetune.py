"""Train the UNet and its text encoder on with prompts as people put them, and with pictures in other colours.

What the text encoder alone could learn, the stages ``colours`` and ``synonyms`` have taught it; a colour that the UNet
never drew a thing in it can only hint at. Here the UNet sees every recoloured picture, with its colour in the caption,
as often as a picture as it is; and captions come by keyword and with words around a name, too.
"""

from __future__ import annotations

import contextlib

import numpy as np
import torch

from training import colours, data, synonyms
from training.attention import PlainAttention
from training.captions import Concept, own_keywords, sample_caption, sample_phrasing, sample_synonyms
from training.config import TrainingConfig
from training.run import EMA, Run
from training.texts import Texts
from training.unet import TRAIN_STEPS, alphas_cumprod, latents, loss, trained


def train(config: TrainingConfig) -> None:
    """Train until the budget is spent; the checkpoint is ``finetune.pt``."""
    torch.manual_seed(config.seed)
    dataset = data.load(config)
    seen, _ = dataset.split()
    own = colours.own_colours(dataset)
    changed, starts = colours.recoloured(config, dataset, own)
    asked = np.array([n for n in seen if n in starts])
    encoded, keywords = latents(config)[0], own_keywords(dataset.concepts)
    model = trained(config)[0].requires_grad_(True)
    text = synonyms.load(config).requires_grad_(True)
    texts = Texts(config)
    optimizer = torch.optim.AdamW(
        [
            {"params": list(model.parameters())},
            {"params": list(text.text_model.parameters()), "lr": config.finetune_text_lr, "weight_decay": 0.0},
        ],
        lr=config.finetune_lr,
        betas=(0.9, 0.99),
        weight_decay=0.01,
        fused=True,
    )
    emas = {"ema": EMA(model, config.ema_decay), "text_ema": EMA(text, config.ema_decay)}
    run = Run("finetune", config, config.finetune_budget)
    parts = {"model": model, "text": text, "optimizer": optimizer, **emas}
    run.resume(parts)
    alphas = alphas_cumprod().to(config.device)
    error = torch.compile(loss) if config.device == "cuda" else loss
    with contextlib.nullcontext() if config.device == "cuda" else PlainAttention():
        for update in run.steps(optimizer, parts):
            clean, captions = [], []
            for n in run.rng.choice(asked, config.finetune_batch // 2):
                choices = (own[n], *colours.others(own[n]))
                place = int(run.rng.integers(len(choices)))
                clean.append(changed[starts[n] + place - 1] if place else encoded[n])
                captions.append(caption(dataset.concepts[n], dataset.styles[n], (), run.rng, choices[place]))
            for n in run.rng.choice(seen, config.finetune_batch - len(clean)):
                clean.append(encoded[n])
                concept = dataset.concepts[n]
                captions.append(caption(concept, dataset.styles[n], keywords[concept.slug], run.rng, None))
            dropped = run.rng.random(len(captions)) < config.prompt_dropout
            ids = texts.encode(["" if drop else each for each, drop in zip(captions, dropped, strict=True)])
            pictures = torch.stack(clean).to(config.device, memory_format=torch.channels_last)
            timestep = torch.randint(0, TRAIN_STEPS, (len(clean),), device=config.device)
            with config.autocast():
                value = error(model, pictures, timestep, alphas[timestep], text(ids)[0], config.min_snr_gamma)
            update(value)
            for ema in emas.values():
                ema.update(run.step)
    print(f"finetune: {run.step} steps")


def caption(
    concept: Concept, style: str, keywords: tuple[str, ...], rng: np.random.Generator, colour: str | None
) -> str:
    """Half of them plain, the others with words around, or by a keyword that the concept alone has, if it has one."""
    kind = rng.random()
    if kind < 0.5:
        return sample_caption(concept, style, rng, colour)
    if keywords and kind < 0.75:
        return sample_synonyms(concept, keywords[rng.integers(len(keywords))], style, rng)[0]
    return sample_phrasing(concept, style, rng, colour)[0]
