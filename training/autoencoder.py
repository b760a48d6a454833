"""Train the KL autoencoder on random crops: L1 + L2 + a small KL term."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from calotype.export.models.autoencoder import Autoencoder
from training import data
from training.config import WORK, TrainingConfig
from training.run import EMA, Run


def to_tensor(pictures: np.ndarray) -> Tensor:
    """(N, S, S, 3) uint8 to (N, 3, S, S) float32 in -1..1."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def train(config: TrainingConfig) -> None:
    """Train until the budget is spent; the checkpoint is ``.work/autoencoder.pt``."""
    torch.manual_seed(config.seed)
    rng = np.random.default_rng(config.seed)
    dataset = data.load(config)
    seen, unseen = dataset.split()
    model = Autoencoder(config.autoencoder).to(config.device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.autoencoder_lr, betas=(0.9, 0.99), weight_decay=1e-4)
    ema = EMA(model, config.ema_decay)
    run = Run("autoencoder", WORK, config.autoencoder_minutes, config.checkpoint_minutes)
    parts = {"model": model, "optimizer": optimizer, "ema": ema}
    run.resume(parts)
    crop, size = config.autoencoder_crop, config.image_size
    for update in run.steps(optimizer, config.autoencoder_lr, parts):
        chosen = rng.choice(seen, config.autoencoder_batch)
        rows, columns = rng.integers(0, size - crop + 1, (2, config.autoencoder_batch))
        batch = np.stack(
            [dataset.pictures[n, y : y + crop, x : x + crop] for n, y, x in zip(chosen, rows, columns, strict=True)]
        )
        pixels = to_tensor(batch).to(config.device, memory_format=torch.channels_last)
        mean, logvar = model.encode(pixels)
        decoded = model.decode(mean + torch.randn_like(mean) * (0.5 * logvar).exp())
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3)).mean()
        error = decoded - pixels
        update(error.abs().mean() + error.square().mean() + config.kl_weight * kl)
        ema.update(run.step)
    model.load_state_dict(ema.shadow)
    print(f"autoencoder: {psnr(model, dataset.pictures[unseen]):.2f} dB on {len(unseen)} held-out pictures")


@torch.no_grad()
def psnr(model: Autoencoder, pictures: np.ndarray) -> float:
    """Mean over pictures of the peak signal-to-noise ratio of decode(encode(.)), in dB, on 0..255 clipped."""
    values = []
    device = next(model.parameters()).device
    for start in range(0, len(pictures), 32):
        pixels = to_tensor(pictures[start : start + 32]).to(device)
        decoded = model.decode(model.encode(pixels)[0]).clamp(-1, 1)
        error = (127.5 * (decoded - pixels)).square().mean(dim=(1, 2, 3))
        values.append(10 * torch.log10(255**2 / error))
    return float(torch.cat(values).mean())


def load(config: TrainingConfig) -> Autoencoder:
    """The trained autoencoder (averaged weights), frozen."""
    model = Autoencoder(config.autoencoder)
    model.load_state_dict(torch.load(WORK / "autoencoder.pt", weights_only=True)["ema"])
    return model.to(config.device).eval().requires_grad_(False)


@torch.no_grad()
def encode_all(model: Autoencoder, pictures: np.ndarray) -> Tensor:
    """Posterior means (N, C, S/f, S/f) of all pictures, not scaled."""
    device = next(model.parameters()).device
    return torch.cat([model.encode(to_tensor(pictures[i : i + 32]).to(device))[0] for i in range(0, len(pictures), 32)])
