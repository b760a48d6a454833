"""Prompts to what the UNet is given of them, each computed once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from calotype.runtime.arrays import Array, Inputs
from calotype.runtime.sessions import Session
from calotype.runtime.text.prompts import Chunk, chunked
from calotype.runtime.text.tokenizer import ClipTokenizer

CACHED = 64


class TextEncoder:
    """A tokenizer, a text encoder, and the last embeddings they gave.

    Embeddings are kept by all that they depend on, the ids and ``clip_skip``; another set of weights is another
    ``TextEncoder``. ``extra`` (n, D) are the embeddings of ids beyond the vocabulary.
    """

    def __init__(self, tokenizer: ClipTokenizer, session: Session, extra: Array | None = None) -> None:
        self._tokenizer, self._session = tokenizer, session
        self._pooled = any(spec.name == "text_embeds" for spec in session.outputs)
        width = next((int(spec.shape[1]) for spec in session.inputs if spec.name == "extra_embeddings"), None)
        self._takes_extra = width is not None
        self._extra = np.zeros((1, width or 1), np.float32) if extra is None else extra
        self._cache: OrderedDict[tuple[bytes, int], tuple[Array, Array | None]] = OrderedDict()
        self._sizes = {"batch": 1, "extra": len(self._extra)}
        session.reserve(self._sizes)

    def chunks(self, prompt: str) -> list[Chunk]:
        """See :func:`calotype.runtime.text.prompts.chunked`."""
        return chunked(prompt, self._tokenizer)

    def encode(self, chunk: Chunk, clip_skip: int) -> tuple[Array, Array | None]:
        """Embeddings (T, D), weighted, and the pooled one (P,) where there is one; neither is to be written to."""
        states, pooled = self._encode(chunk.ids, clip_skip)
        if chunk.weights is not None:
            base, _ = self._encode(self._tokenizer.pack([]), clip_skip)
            states = base + chunk.weights[:, None] * (states - base)
        return states, pooled

    def _encode(self, ids: NDArray[np.int64], clip_skip: int) -> tuple[Array, Array | None]:
        key = (ids.tobytes(), clip_skip)
        found = self._cache.get(key)
        if found is None:
            # Always alone: what else is in a batch can change the last bits.
            self._session.write("input_ids", self._sizes, ids, row=0)
            self._session.write("clip_skip", self._sizes, np.array([clip_skip], np.int64))
            if self._takes_extra:
                self._session.write("extra_embeddings", self._sizes, self._extra)
            self._session.run(self._sizes)
            states = self._session.buffer("hidden_states", self._sizes)[0].copy()
            pooled = self._session.buffer("text_embeds", self._sizes)[0].copy() if self._pooled else None
            found = self._cache[key] = (states, pooled)
            if len(self._cache) > CACHED:
                self._cache.popitem(last=False)
        self._cache.move_to_end(key)
        return found


class ClipConditioner:
    """The text encoders of a model: one, or SDXL's two side by side (Podell et al. 2023, arXiv 2307.01952)."""

    def __init__(self, encoders: Sequence[TextEncoder], *, force_zeros_for_empty_prompt: bool) -> None:
        self._encoders, self._zeros = encoders, force_zeros_for_empty_prompt

    def encode(self, prompt: str, negative_prompt: str | None, clip_skip: int = 0) -> tuple[Inputs, Inputs | None]:
        """What the UNet is given of a prompt and of its negative prompt, of equal length; None is no guidance.

        Args:
            prompt: see :mod:`calotype.runtime.text.prompts`. The shorter of the two is filled up with empty chunks.
            negative_prompt: an empty one is zeros where the model was trained so.
            clip_skip: how many of the text encoder's last layers are left out, for both prompts.
        """
        prompts = [prompt] if negative_prompt is None else [prompt, negative_prompt]
        chunks = [[encoder.chunks(text) for encoder in self._encoders] for text in prompts]
        length = max(len(item) for text in chunks for item in text)
        conditional, *rest = (self._inputs(text, length, clip_skip) for text in chunks)
        if not rest:
            return conditional, None
        if self._zeros and negative_prompt == "":
            return conditional, {name: np.zeros_like(row) for name, row in conditional.items()}
        return conditional, rest[0]

    def _inputs(self, chunks: Sequence[Sequence[Chunk]], length: int, clip_skip: int) -> Inputs:
        """``chunks`` of one prompt for each encoder; the pooled embedding is the last encoder's of its
        first chunk, without weights.
        """
        inputs, sides = {}, []
        for encoder, own in zip(self._encoders, chunks, strict=True):
            filled = [*own, *encoder.chunks("") * (length - len(own))]
            states, pooled = zip(*(encoder.encode(chunk, clip_skip) for chunk in filled), strict=True)
            sides.append(np.concatenate(states))
            if pooled[0] is not None:
                inputs["text_embeds"] = pooled[0]
        return {"encoder_hidden_states": np.concatenate(sides, axis=1), **inputs}
