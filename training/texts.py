"""Captions to token ids, through transformers' own tokenizer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import CLIPTokenizer

from training.config import CONTEXT_LENGTH, TrainingConfig


class Texts:
    """The trained tokenizer; every text is encoded once, since the same captions come again and again."""

    def __init__(self, config: TrainingConfig) -> None:
        self._tokenizer = CLIPTokenizer.from_pretrained(config.work / "tokenizer")
        self._device = config.device
        self._known: dict[str, NDArray[np.int64]] = {}

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Token ids (B, CONTEXT_LENGTH) int64, padded and truncated."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            ids = self._tokenizer(
                new, padding="max_length", truncation=True, max_length=CONTEXT_LENGTH, return_tensors="np"
            )
            self._known.update(zip(new, ids.input_ids, strict=True))
        return torch.from_numpy(np.stack([self._known[text] for text in texts])).to(self._device)
