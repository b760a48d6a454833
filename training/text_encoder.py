"""Train the text tower against an image tower, as CLIP was (Radford et al. 2021, arXiv 2103.00020)."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calotype.export.models.clip import TextEncoder
from training import autoencoder, data
from training.captions import sample_caption
from training.config import TrainingConfig
from training.run import Run, begin
from training.texts import Texts


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
    """Train until the budget is spent; the checkpoint is ``text-encoder.pt``."""
    torch.manual_seed(config.seed)
    dataset = data.load(config)
    seen, _ = dataset.split()
    pictures = shrink(dataset.pictures).to(config.device)
    texts = Texts(config)
    model = TextEncoder(config.text_encoder)
    for name, parameter in model.named_parameters():
        if "embedding" in name:
            nn.init.normal_(parameter, std=0.02)
    begin(model, config, "text_encoder")
    model.to(config.device)
    tower = ImageTower(config.text_encoder.hidden_size).to(config.device)
    scale = nn.Linear(1, 1, bias=False).to(config.device)
    nn.init.constant_(scale.weight, math.log(1 / 0.07))
    parameters = [*model.parameters(), *tower.parameters(), *scale.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=config.text_lr, weight_decay=0.05)
    run = Run("text-encoder", config, config.text_budget)
    parts = {"model": model, "tower": tower, "scale": scale, "optimizer": optimizer}
    run.resume(parts)
    target = torch.arange(config.text_batch, device=config.device)
    for update in run.steps(optimizer, parts):
        chosen = run.rng.choice(seen, config.text_batch, replace=False)
        captions = [sample_caption(dataset.concepts[n], dataset.styles[n], run.rng) for n in chosen]
        shift = run.rng.integers(-2, 3, 2)
        batch = torch.roll(pictures[chosen], tuple(int(s) for s in shift), dims=(2, 3))
        _, pooled, _ = model(texts.encode(captions))
        logits = F.normalize(pooled) @ F.normalize(tower(batch)).T * scale.weight.exp().clamp(max=100.0)
        update((F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2)
    print(f"text encoder: {run.step} steps, {json.dumps(retrieval(model, tower, texts, config))}")


def shrink(pictures: np.ndarray) -> Tensor:
    """(N, S, S, 3) uint8 to (N, 3, 32, 32) float32 in -1..1."""
    return F.interpolate(autoencoder.to_tensor(pictures), size=(32, 32), mode="area")


@torch.no_grad()
def retrieval(model: TextEncoder, tower: ImageTower, texts: Texts, config: TrainingConfig) -> dict[str, float]:
    """The share of pairs whose caption has its own picture among the five nearest of all pictures.

    Captions by name and by keyword alone, both with the style, for pairs that were trained on and held out.
    """
    dataset = data.load(config)
    images = F.normalize(tower(shrink(dataset.pictures).to(config.device)))
    shares = {}
    for part, chosen in zip(("seen", "held_out"), dataset.split(), strict=True):
        for kind in ("name", "keyword"):
            pairs = [(n, _caption(dataset, n, kind)) for n in chosen if kind == "name" or dataset.concepts[n].keywords]
            pooled = F.normalize(model(texts.encode([text for _, text in pairs]))[1])
            best = (pooled @ images.T).topk(5).indices.cpu()
            found = [n in row for (n, _), row in zip(pairs, best.tolist(), strict=True)]
            shares[f"{part}_by_{kind}"] = round(sum(found) / len(found), 4)
    return shares


def _caption(dataset: data.Dataset, index: int, kind: str) -> str:
    concept = dataset.concepts[index]
    return f"{concept.name if kind == 'name' else concept.keywords[0]}, {dataset.styles[index]} style"


def load(config: TrainingConfig) -> TextEncoder:
    """The trained text tower; where that stage was left out, the one of the bundle that the run starts from."""
    model = TextEncoder(config.text_encoder)
    path = config.work / "text-encoder.pt"
    if path.exists() or config.start is None:
        model.load_state_dict(torch.load(path, weights_only=True)["model"])
    else:
        begin(model, config, "text_encoder")
    return model.to(config.device).eval()
