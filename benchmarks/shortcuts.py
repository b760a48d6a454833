"""What attention could leave out, in PyTorch.

Three shortcuts that the engines do not have, tried with the UNet in PyTorch. *Kept*: after some steps cross-attention
gives what it gave last. *Gated*: so too, but the mean over the guided rows, and from there on without guidance: TGATE,
Zhang et al. 2024 (arXiv 2404.02747). *Merged*: a share of the tokens of the outermost self-attention is merged with
those that are most alike, and every one gets what its token got: ToMe, Bolya & Hoffman 2023 (arXiv 2303.17604).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from calotype.export.models.layers import Attention
from calotype.export.models.unet import TransformerBlock, UNet
from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.sessions import Session, Sizes
from training.config import TALBOT

CELL = 2  # of 2x2 tokens one is kept as it is, whatever is merged


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mode:
    """Which shortcuts are taken.

    Attributes:
        after: the share of the steps after which cross-attention is kept.
        gated: whether it is then the mean over the guided rows, and guidance is left out.
        merged: the share of the tokens of the outermost self-attention that is merged.
    """

    after: float = 1.0
    gated: bool = False
    merged: float = 0.0


class KeptAttention(Attention):
    """Cross-attention that gives again what it gave last, once it is told to."""

    keeping = False
    kept: Tensor

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """See :class:`Attention`. Fewer rows than were kept (without guidance) share their mean."""
        if not self.keeping:
            self.kept = super().forward(x, context)
        return self.kept if len(self.kept) == len(x) else self.kept.mean(dim=0, keepdim=True)


class LeftOut(Attention):
    """Attention that is left out; it costs what kept attention costs, since a tensor that is there is added."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """See :class:`Attention`."""
        return x


class MergedAttention(Attention):
    """Self-attention over fewer tokens, where there are ``tokens`` of them, on a square."""

    merged = 0.0
    tokens = 0

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """See :class:`Attention`."""
        count = round(self.merged * x.shape[1])
        if not count or x.shape[1] != self.tokens:
            return super().forward(x, context)
        merge = Merge(x, count)
        return merge.back(super().forward(merge.fewer(x)))


class Merge:
    """Which ``count`` tokens of ``x`` (B, N, C) are merged into which: the most alike by cosine, between two groups.

    Of every 2×2 tokens the first is one that others may be merged into. The paper draws it by lot; fixed, a picture can
    be made again.
    """

    def __init__(self, x: Tensor, count: int) -> None:
        total = x.shape[1]
        side = round(total**0.5)
        cells = torch.arange(total, device=x.device).reshape(side // CELL, CELL, side // CELL, CELL)
        cells = cells.transpose(1, 2).reshape(-1, CELL * CELL)
        self.into, self.others = cells[:, 0], cells[:, 1:].flatten()  # (D,), (S,)
        count = min(count, len(self.others))
        unit = torch.nn.functional.normalize(x, dim=-1)
        likeness, nearest = (unit[:, self.others] @ unit[:, self.into].transpose(1, 2)).max(dim=-1)  # (B, S)
        order = likeness.argsort(dim=-1, descending=True)
        self.gone, self.left = order[:, :count], order[:, count:]  # places among the others
        self.target = nearest.gather(1, self.gone)  # (B, count), places among those merged into
        self.total = total

    def fewer(self, x: Tensor) -> Tensor:
        """(B, N, C) to (B, N - count, C): the others that are left, then the means."""
        wide = x.shape[-1]
        others, into = x[:, self.others], x[:, self.into]
        gone, left = (others.gather(1, _over(places, wide)) for places in (self.gone, self.left))
        sums = into.scatter_add(1, _over(self.target, wide), gone)
        ones = torch.ones_like(into[..., :1])
        counts = ones.scatter_add(1, self.target[..., None], torch.ones_like(gone[..., :1]))
        return torch.cat([left, sums / counts], dim=1)

    def back(self, x: Tensor) -> Tensor:
        """(B, N - count, C) to (B, N, C): a merged token gets what its mean got."""
        batch, _, wide = x.shape
        left, into = x.split([self.left.shape[1], len(self.into)], dim=1)
        others = torch.zeros(batch, len(self.others), wide, dtype=x.dtype, device=x.device)
        others = others.scatter(1, _over(self.left, wide), left)
        others = others.scatter(1, _over(self.gone, wide), into.gather(1, _over(self.target, wide)))
        order = torch.cat([self.others, self.into]).argsort()
        return torch.cat([others, into], dim=1)[:, order]


class TorchUNet:
    """Stands in for the session of talbot's UNet, computing in PyTorch with shortcuts."""

    def __init__(self, session: Session, model: UNet) -> None:
        self._session, self._model = session, model
        self._step, self._last = 0, 0.0
        self.mode, self.steps = Mode(), 1
        side = TALBOT.image_size // TALBOT.autoencoder.downscale
        for block in blocks(model):
            block.attn1.__class__, block.attn2.__class__ = MergedAttention, KeptAttention
            block.attn1.tokens = side * side

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    @torch.inference_mode()
    def run(self, sizes: Sizes) -> None:
        """Compute the prediction from the session's own buffers into its own."""
        sample, timestep, context = (
            torch.from_numpy(self._session.buffer(name, sizes))
            for name in ("sample", "timestep", "encoder_hidden_states")
        )
        now = float(timestep[0])
        self._step = 0 if now >= self._last else self._step + 1  # timesteps fall while one picture is made
        self._last = now
        keeping = self._step >= first(self.mode, self.steps)
        for block in blocks(self._model):
            block.attn1.merged, block.attn2.keeping = self.mode.merged, keeping
        self._session.buffer("noise_pred", sizes)[:] = self._model(sample, timestep, context).numpy()


def first(mode: Mode, steps: int) -> int:
    """The first step that keeps cross-attention."""
    return max(1, round(mode.after * steps))


def load() -> UNet:
    """Talbot's UNet in PyTorch, float32."""
    model = UNet(TALBOT.unet)
    model.load_state_dict(load_file(Bundle.open("talbot").path / "unet.safetensors"))
    return model.float().eval()


def blocks(model: UNet) -> Iterator[Any]:
    """Every transformer block of a UNet."""
    return (module for module in model.modules() if isinstance(module, TransformerBlock))


def _over(places: Tensor, wide: int) -> Tensor:
    return places[..., None].expand(-1, -1, wide)
