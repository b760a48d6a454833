"""Train the text tower against an image tower, as CLIP was (Radford et al. 2021, arXiv 2103.00020)."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTokenizer

from calotype.export.models.clip import TextEncoder
from training import autoencoder, data
from training.captions import sample_caption
from training.config import CONTEXT_LENGTH, WORK, TrainingConfig
from training.run import Run

__all__ = ["ImageTower", "encode_texts", "load", "load_tokenizer", "train"]


def load_tokenizer() -> CLIPTokenizer:
    """The trained tokenizer, through transformers."""
    return CLIPTokenizer.from_pretrained(WORK / "tokenizer")


def encode_texts(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Token ids (B, CONTEXT_LENGTH) int64, padded and truncated."""
    encoded = tokenizer(texts, padding="max_length", truncation=True, max_length=CONTEXT_LENGTH, return_tensors="pt")
    ids: Tensor = encoded.input_ids
    return ids


class ImageTower(nn.Module):
    """A small convolutional network over 32×32 pictures; it is thrown away after training."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        widths = (3, 48, 96, 160, dim)
        layers: list[nn.Module] = []
        for inner, outer in itertools.pairwise(widths):
            layers += [nn.Conv2d(inner, outer, 3, stride=2, padding=1), nn.GroupNorm(8, outer), nn.SiLU()]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(dim * 4, dim)

    def forward(self, pictures: Tensor) -> Tensor:
        # (B, 3, 32, 32) -> (B, dim)
        out: Tensor = self.head(self.layers(pictures).flatten(1))
        return out


def train(config: TrainingConfig) -> None:
    """Train until the budget is spent; the checkpoint is ``.work/text-encoder.pt``."""
    torch.manual_seed(config.seed)
    rng = np.random.default_rng(config.seed)
    dataset = data.load(config)
    seen, _ = dataset.split()
    pictures = F.interpolate(autoencoder.to_tensor(dataset.pictures), size=(32, 32), mode="area").to(config.device)
    tokenizer = load_tokenizer()
    model = TextEncoder(config.text_encoder).to(config.device)
    for name, parameter in model.named_parameters():
        if "embedding" in name:
            nn.init.normal_(parameter, std=0.02)
    tower = ImageTower(config.text_encoder.hidden_size).to(config.device)
    scale = nn.Linear(1, 1, bias=False).to(config.device)
    nn.init.constant_(scale.weight, math.log(1 / 0.07))
    parameters = [*model.parameters(), *tower.parameters(), *scale.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=config.text_lr, weight_decay=0.05)
    run = Run("text-encoder", WORK, config.text_minutes, config.checkpoint_minutes)
    parts = {"model": model, "tower": tower, "scale": scale, "optimizer": optimizer}
    run.resume(parts)
    for update in run.steps(optimizer, config.text_lr, parts):
        chosen = rng.choice(seen, config.text_batch, replace=False)
        texts = [sample_caption(dataset.concepts[n], dataset.styles[n], rng) for n in chosen]
        shift = rng.integers(-2, 3, 2)
        batch = torch.roll(pictures[chosen], tuple(int(s) for s in shift), dims=(2, 3))
        _, pooled, _ = model(encode_texts(tokenizer, texts).to(config.device))
        logits = F.normalize(pooled) @ F.normalize(tower(batch)).T * scale.weight.exp().clamp(max=100.0)
        target = torch.arange(len(chosen), device=logits.device)
        update((F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2)
    print(f"text encoder: {run.step} steps")


def load(config: TrainingConfig) -> TextEncoder:
    """The trained text tower, frozen."""
    model = TextEncoder(config.text_encoder)
    model.load_state_dict(torch.load(WORK / "text-encoder.pt", weights_only=True)["model"])
    return model.to(config.device).eval().requires_grad_(False)
