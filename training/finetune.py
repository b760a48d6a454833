"""Train the UNet and its text encoder on with prompts as people put them, and with pictures in other colours.

What the text encoder alone could learn, the stages ``colours`` and ``synonyms`` have taught it; a colour that the UNet
never drew a thing in it can only hint at. Here the UNet sees every recoloured picture, with its colour in the caption,
as often as a picture as it is; and captions come by keyword and with words around a name, too.

It goes in rounds. The first follows more colours and forgets some shapes; on the line from the weights before it to
those after, most of the one comes without the other (Wortsman et al. 2022, arXiv 2109.01903), and the next begins
there.
"""

from __future__ import annotations

import contextlib

import numpy as np
import torch
from torch import Tensor

from training import colours, data, synonyms
from training.attention import PlainAttention
from training.captions import Concept, own_keywords, sample_caption, sample_phrasing, sample_synonyms
from training.config import TrainingConfig
from training.run import EMA, Run
from training.texts import Texts
from training.unet import TRAIN_STEPS, alphas_cumprod, latents, loss, trained

# The networks that it trains, and the keys of their weights in its checkpoints.
TRAINED = {"unet": "ema", "text_encoder": "text_ema"}


def train(config: TrainingConfig) -> None:
    """Train every round until its budget is spent; the checkpoints are ``finetune-1.pt`` and so on."""
    for number in range(1, len(config.finetune_shares) + 1):
        train_round(config, number)


def between(config: TrainingConfig, component: str, state: dict[str, Tensor], rounds: int) -> dict[str, Tensor]:
    """What ``state``, the weights of ``component`` before all rounds, has become after the first ``rounds`` of them.

    A round without a checkpoint, and all after it, have changed nothing.
    """
    for number, share in enumerate(config.finetune_shares[:rounds], start=1):
        path = config.work / f"finetune-{number}.pt"
        if not path.exists():
            break
        after = torch.load(path, weights_only=True, map_location="cpu")[TRAINED[component]]
        state = {name: torch.lerp(tensor.float().cpu(), after[name], share) for name, tensor in state.items()}
    return state


def train_round(config: TrainingConfig, number: int) -> None:
    """Train round ``number``, from 1, with the same pictures and captions in the same order as every other round."""
    torch.manual_seed(config.seed)
    dataset = data.load(config)
    seen, _ = dataset.split()
    own = colours.own_colours(dataset)
    changed, starts = colours.recoloured(config, dataset, own)
    asked = np.array([n for n in seen if n in starts])
    encoded, keywords = latents(config)[0], own_keywords(dataset.concepts)
    model = trained(config)[0].requires_grad_(True)
    text = synonyms.load(config).requires_grad_(True)
    for component, network in (("unet", model), ("text_encoder", text)):
        network.load_state_dict(between(config, component, network.state_dict(), number - 1))
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
    run = Run(f"finetune-{number}", config, config.finetune_budget)
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
    print(f"finetune, round {number}: {run.step} steps")


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
