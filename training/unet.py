"""Train the UNet on cached latents: v-prediction, min-SNR weights, the prompt dropped now and then.

Salimans & Ho 2022 (arXiv 2202.00512) for v, Hang et al. 2023 (arXiv 2303.09556) for min-SNR,
Ho & Salimans 2022 (arXiv 2207.12598) for classifier-free guidance.
"""

from __future__ import annotations

import json

import numpy as np
import torch
from torch import Tensor

from calotype.export.models.unet import UNet
from training import autoencoder, data, text_encoder
from training.captions import sample_caption
from training.config import WORK, TrainingConfig
from training.run import EMA, Run

TRAIN_STEPS = 1000


def alphas_cumprod() -> Tensor:
    """The signal's share of the variance at each of 1000 timesteps: linear betas 1e-4..0.02 (Ho et al. 2020)."""
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, TRAIN_STEPS, dtype=torch.float64), 0).float()


def latents(config: TrainingConfig) -> tuple[Tensor, float]:
    """All pictures' latents, scaled to unit variance, and the scaling factor."""
    path = WORK / f"latents-{config.image_size}.pt"
    # An autoencoder that was trained on encodes differently: a cache from before would not fit its decoder.
    step = torch.load(WORK / "autoencoder.pt", weights_only=True, mmap=True)["step"]
    saved = torch.load(path, weights_only=True) if path.exists() else {}
    if saved.get("autoencoder_step") != step:
        encoded = autoencoder.encode_all(autoencoder.load(config), data.load(config).pictures).cpu()
        saved = {"latents": encoded, "scaling_factor": 1 / float(encoded.std()), "autoencoder_step": step}
        torch.save(saved, path)
    return saved["latents"] * saved["scaling_factor"], saved["scaling_factor"]


def train(config: TrainingConfig) -> None:
    """Train until the budget is spent; the checkpoint is ``.work/unet.pt``."""
    torch.manual_seed(config.seed)
    rng = np.random.default_rng(config.seed)
    dataset = data.load(config)
    seen, unseen = dataset.split()
    encoded, _ = latents(config)
    encoded = encoded.to(config.device)
    tokenizer, encoder = text_encoder.load_tokenizer(), text_encoder.load(config)
    model = UNet(config.unet).to(config.device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.unet_lr, betas=(0.9, 0.99), weight_decay=0.01)
    ema = EMA(model, config.ema_decay)
    run = Run("unet", WORK, config.unet_minutes, config.checkpoint_minutes)
    parts = {"model": model, "optimizer": optimizer, "ema": ema}
    run.resume(parts)
    alphas = alphas_cumprod().to(config.device)
    rng = np.random.default_rng((config.seed, run.step))

    def loss_of(chosen: np.ndarray) -> Tensor:
        texts = [
            "" if rng.random() < config.prompt_dropout else sample_caption(dataset.concepts[n], dataset.styles[n], rng)
            for n in chosen
        ]
        with torch.no_grad():
            context = encoder(encode(texts))[0]
        clean = encoded[chosen].contiguous(memory_format=torch.channels_last)
        timestep = torch.randint(0, TRAIN_STEPS, (len(chosen),), device=clean.device)
        alpha = alphas[timestep][:, None, None, None]
        noise = torch.randn_like(clean)
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
        snr = alpha.flatten() / (1 - alpha.flatten())
        weight = snr.clamp(max=config.min_snr_gamma) / (snr + 1)
        error = (model(noisy, timestep.float(), context) - velocity).square().mean(dim=(1, 2, 3))
        return (weight * error).mean() / weight.mean()

    def encode(texts: list[str]) -> Tensor:
        return text_encoder.encode_texts(tokenizer, texts).to(config.device)

    for update in run.steps(optimizer, config.unet_lr, parts):
        update(loss_of(rng.choice(seen, config.unet_batch)))
        ema.update(run.step)
    model.load_state_dict(ema.shadow)
    with torch.no_grad():
        losses = {
            name: float(torch.stack([loss_of(rng.choice(part, config.unet_batch)) for _ in range(10)]).mean())
            for name, part in (("seen", seen), ("held_out", unseen))
        }
    print(json.dumps({"unet_steps": run.step, "loss": losses}))
