"""Prompts to embeddings, each computed once."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from calotype.runtime.sessions import Session
from calotype.runtime.tokenizer import ClipTokenizer

CACHED = 64


class Conditioner:
    """A tokenizer and a text encoder, and the last embeddings they gave."""

    def __init__(self, tokenizer: ClipTokenizer, text_encoder: Session) -> None:
        self._tokenizer, self._text_encoder = tokenizer, text_encoder
        self._cache: OrderedDict[str, NDArray[np.float32]] = OrderedDict()
        self._sizes = {"batch": 1, "extra": 1}
        text_encoder.reserve(self._sizes)

    def encode(self, prompt: str) -> NDArray[np.float32]:
        """The embedding (T, D) of one prompt, not to be written to. A prompt is always encoded alone."""
        found = self._cache.get(prompt)
        if found is None:
            self._text_encoder.buffer("input_ids", self._sizes)[:] = self._tokenizer.encode([prompt])
            self._text_encoder.buffer("clip_skip", self._sizes)[:] = 0
            self._text_encoder.run(self._sizes)
            found = self._text_encoder.buffer("hidden_states", self._sizes)[0].copy()
            self._cache[prompt] = found
            if len(self._cache) > CACHED:
                self._cache.popitem(last=False)
        self._cache.move_to_end(prompt)
        return found
