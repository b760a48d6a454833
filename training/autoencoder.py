"""Train the KL autoencoder on random crops: L1 + L2 + a small KL term."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from calotype.export.models.autoencoder import Autoencoder
from training import data
from training.config import TrainingConfig
from training.run import EMA, Run, begin


def to_tensor(pictures: np.ndarray) -> Tensor:
    """(N, S, S, 3) uint8 to (N, 3, S, S) float32 in -1..1."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def train(config: TrainingConfig) -> None:
    """Train until the budget is spent; the checkpoint is ``autoencoder.pt``."""
    torch.manual_seed(config.seed)
    dataset = data.load(config, config.autoencoder_groups)
    seen, _ = dataset.split()
    drawn = data.load(config)
    model = Autoencoder(config.autoencoder)
    begin(model, config, "vae")
    model.to(config.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.autoencoder_lr,
        betas=(0.9, 0.99),
        weight_decay=1e-4,
        fused=config.device == "cuda",
    )
    ema = EMA(model, config.ema_decay)
    run = Run("autoencoder", config, config.autoencoder_budget)
    parts = {"model": model, "optimizer": optimizer, "ema": ema}
    run.resume(parts)
    pictures = torch.from_numpy(dataset.pictures).to(config.device)
    loss_of = torch.compile(loss) if config.compile else loss
    for update in run.steps(optimizer, parts):
        with config.autocast():
            update(loss_of(model, crops(pictures, seen, run.rng, config), config.kl_weight))
        ema.update(run.step)
    model.load_state_dict(ema.shadow)
    print(f"autoencoder: {run.step} steps, {psnr(model, drawn.pictures[drawn.split()[1]]):.2f} dB on held-out pictures")


def crops(pictures: Tensor, seen: np.ndarray, rng: np.random.Generator, config: TrainingConfig) -> Tensor:
    """Random crops (B, 3, crop, crop) in -1..1 of pictures (N, S, S, 3) uint8, half of them mirrored."""
    size, batch = config.autoencoder_crop, config.autoencoder_batch
    chosen = torch.from_numpy(rng.choice(seen, batch)).to(pictures.device)
    y, x = torch.from_numpy(rng.integers(0, config.image_size - size + 1, (2, batch))).to(pictures.device)
    span = torch.arange(size, device=pictures.device)
    across = torch.where(torch.from_numpy(rng.random((batch, 1)) < 0.5).to(pictures.device), span.flip(0), span)
    picked = pictures[chosen[:, None, None], (y[:, None] + span)[:, :, None], (x[:, None] + across)[:, None, :]]
    return (picked.float() / 127.5 - 1).permute(0, 3, 1, 2)  # channels last in memory


def loss(model: Autoencoder, pixels: Tensor, kl_weight: float) -> Tensor:
    """L1 + L2 + a small KL term, as Rombach et al. 2022 (arXiv 2112.10752) without perceptual and adversarial terms."""
    mean, logvar = (moment.float() for moment in model.encode(pixels))
    decoded = model.decode(mean + torch.randn_like(mean) * (0.5 * logvar).exp())
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3)).mean()
    error = decoded.float() - pixels
    return error.abs().mean() + error.square().mean() + kl_weight * kl


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
    """The trained autoencoder (averaged weights), frozen; without that stage, of the bundle the run starts from."""
    model = Autoencoder(config.autoencoder)
    path = config.work / "autoencoder.pt"
    if path.exists() or config.start is None:
        model.load_state_dict(torch.load(path, weights_only=True)["ema"])
    else:
        begin(model, config, "vae")
    return model.to(config.device).eval().requires_grad_(False)


@torch.no_grad()
def encode_all(model: Autoencoder, pictures: np.ndarray) -> Tensor:
    """Posterior means (N, C, S/f, S/f) of all pictures, not scaled."""
    device = next(model.parameters()).device
    return torch.cat([model.encode(to_tensor(pictures[i : i + 32]).to(device))[0] for i in range(0, len(pictures), 32)])
