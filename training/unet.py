"""Train the UNet on cached latents: v-prediction, min-SNR weights, the prompt dropped now and then.

Salimans & Ho 2022 (arXiv 2202.00512) for v, Hang et al. 2023 (arXiv 2303.09556) for min-SNR,
Ho & Salimans 2022 (arXiv 2207.12598) for classifier-free guidance.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from calotype.export.models.clip import TextEncoder
from calotype.export.models.unet import UNet
from calotype.runtime.bundle.manifest import MANIFEST_NAME
from training import autoencoder, data, text_encoder
from training.captions import sample_caption
from training.config import TrainingConfig
from training.run import EMA, Run, begin
from training.texts import Texts

TRAIN_STEPS = 1000


def alphas_cumprod() -> Tensor:
    """The signal's share of the variance at each of 1000 timesteps: linear betas 1e-4..0.02 (Ho et al. 2020)."""
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, TRAIN_STEPS, dtype=torch.float64), 0).float()


def scaling_factor(config: TrainingConfig) -> float:
    """What latents are multiplied by: of this run's autoencoder, else of the bundle that the run starts from."""
    if (config.work / "autoencoder.pt").exists() or config.start is None:
        return latents(config)[1]
    factor: float = json.loads((config.start / MANIFEST_NAME).read_text(encoding="utf-8"))["vae"]["scaling_factor"]
    return factor


def latents(config: TrainingConfig) -> tuple[Tensor, float]:
    """All pictures' latents, scaled to unit variance, and the scaling factor."""
    path = config.work / "latents.pt"
    step = autoencoder_step(config)
    saved = torch.load(path, weights_only=True) if path.exists() else {}
    if saved.get("autoencoder_step", -1) != step:
        encoded = autoencoder.encode_all(autoencoder.load(config), data.load(config).pictures).cpu()
        factor = scaling_factor(config) if step is None else 1 / float(encoded.std())
        saved = {"latents": encoded, "scaling_factor": factor, "autoencoder_step": step}
        torch.save(saved, path)
    return saved["latents"] * saved["scaling_factor"], saved["scaling_factor"]


def autoencoder_step(config: TrainingConfig) -> int | None:
    """How far this run's autoencoder is trained, None for a bundle's.

    One that was trained on encodes differently: latents from before would not fit its decoder.
    """
    path = config.work / "autoencoder.pt"
    if config.start is not None and not path.exists():
        return None
    step: int = torch.load(path, weights_only=True, mmap=True)["step"]
    return step


def train(config: TrainingConfig) -> None:
    """Train until the budget is spent; the checkpoint is ``unet.pt``."""
    torch.manual_seed(config.seed)
    dataset = data.load(config)
    seen, unseen = dataset.split()
    encoded = latents(config)[0].to(config.device)
    texts, text = Texts(config), text_encoder.load(config)
    along = config.text_along_lr is not None
    text.requires_grad_(along)
    model = UNet(config.unet)
    begin(model, config, "unet")
    model.to(config.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    groups = [{"params": list(model.parameters())}]
    if along:
        groups.append({"params": list(text.text_model.parameters()), "lr": config.text_along_lr, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(
        groups, lr=config.unet_lr, betas=(0.9, 0.99), weight_decay=0.01, fused=config.device == "cuda"
    )
    emas = {"ema": EMA(model, config.ema_decay), "text_ema": EMA(text, config.ema_decay)}
    run = Run("unet", config, config.unet_budget)
    parts = {"model": model, "text": text, "optimizer": optimizer, **emas}
    run.resume(parts)
    alphas = alphas_cumprod().to(config.device)

    def loss_on(part: np.ndarray, rng: np.random.Generator, error: Callable[..., Tensor] = loss) -> Tensor:
        chosen = rng.choice(part, config.unet_batch)
        captions = [sample_caption(dataset.concepts[n], dataset.styles[n], rng) for n in chosen]
        kept = rng.random(len(chosen)) >= config.prompt_dropout
        ids = texts.encode([caption if keep else "" for caption, keep in zip(captions, kept, strict=True)])
        clean = encoded[chosen].contiguous(memory_format=torch.channels_last)
        timestep = torch.randint(0, TRAIN_STEPS, (len(chosen),), device=clean.device)
        with config.autocast():
            return error(model, clean, timestep, alphas[timestep], text(ids)[0], config.min_snr_gamma)

    training_loss = torch.compile(loss) if config.compile else loss
    for update in run.steps(optimizer, parts):
        update(loss_on(seen, run.rng, training_loss))
        emas["ema"].update(run.step)
        if along:
            emas["text_ema"].update(run.step)
    model.load_state_dict(emas["ema"].shadow)
    text.load_state_dict(emas["text_ema"].shadow)
    print(
        json.dumps({"unet_steps": run.step, "loss": {"seen": _mean(loss_on, seen), "held_out": _mean(loss_on, unseen)}})
    )


def trained(config: TrainingConfig) -> tuple[UNet, TextEncoder]:
    """The averaged weights that the stage has left, else those of the bundle that the run starts from; frozen."""
    model, text = UNet(config.unet), TextEncoder(config.text_encoder)
    path = config.work / "unet.pt"
    if path.exists() or config.start is None:
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["ema"])
        text.load_state_dict(saved["text_ema"])
    else:
        begin(model, config, "unet")
        begin(text, config, "text_encoder")
    return (
        model.to(config.device, memory_format=torch.channels_last).eval().requires_grad_(False),  # type: ignore[call-overload]
        text.to(config.device).eval().requires_grad_(False),
    )


def loss(model: UNet, clean: Tensor, timestep: Tensor, alpha: Tensor, context: Tensor, gamma: float) -> Tensor:
    """The weighted squared error of v for latents (B, C, h, w), timesteps and their alphas_cumprod (B,)."""
    snr = alpha / (1 - alpha)
    weight = snr.clamp(max=gamma) / (snr + 1)
    alpha = alpha[:, None, None, None]
    noise = torch.randn_like(clean)
    noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
    velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
    error = (model(noisy, timestep.float(), context).float() - velocity).square().mean(dim=(1, 2, 3))
    return (weight * error).mean() / weight.mean()


@torch.no_grad()
def _mean(loss_on: Callable[[np.ndarray, np.random.Generator], Tensor], part: np.ndarray, batches: int = 32) -> float:
    """The mean loss over batches that are the same for every network, so that two can be compared."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    return round(float(torch.stack([loss_on(part, rng) for _ in range(batches)]).mean()), 5)
