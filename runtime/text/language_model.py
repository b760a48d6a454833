"""Prompts to hidden states of a language model: each in a frame, filled up to one length, and computed once."""

from __future__ import annotations

import logging
import re
from collections import OrderedDict

import numpy as np

from calotype.runtime.arrays import Array
from calotype.runtime.errors import InputError
from calotype.runtime.sessions import Session
from calotype.runtime.text.byte_level import ByteLevelTokenizer

CACHED = 8  # of them: one of FLUX.2 klein takes 16 MB
_WEIGHT = re.compile(r"\([^()]*:\s*[+-]?\d*\.?\d+\s*\)")
logger = logging.getLogger(__name__)


class LanguageModel:
    """A tokenizer, a language model, and the last hidden states that they gave.

    A prompt is read as it stands: brackets are brackets, and no part of it weighs more than another.

    Args:
        tokenizer: its ``max_length`` is what prompts are filled up to.
        session: takes ``input_ids`` and ``attention_mask``, gives ``hidden_states``.
        frame: what stands before a prompt and behind it.
    """

    def __init__(self, tokenizer: ByteLevelTokenizer, session: Session, frame: tuple[str, str]) -> None:
        self._tokenizer, self._session, self._frame = tokenizer, session, frame
        self._cache: OrderedDict[tuple[int, ...], Array] = OrderedDict()
        self._sizes = {"batch": 1}
        session.reserve(self._sizes)

    def encode(self, prompt: str) -> Array:
        """Hidden states (T, D) of a prompt, padding among them; not to be written to.

        Raises:
            InputError: it has more tokens than the model is given, or is not valid Unicode.
        """
        if _WEIGHT.search(prompt):
            logger.warning("this model reads a prompt as it stands, so %r is words, and no weight", _found(prompt))
        ids = tuple(self._tokenizer.tokenize(prompt.join(self._frame)))
        most = self._tokenizer.max_length
        if len(ids) > most:
            frame = len(self._tokenizer.tokenize("".join(self._frame)))
            raise InputError(
                f"the prompt has {len(ids) - frame} tokens, and this model reads {most - frame}; shorten it by a "
                f"{'few words' if len(ids) < 1.1 * most else 'good part'}"
            )
        if ids not in self._cache:
            self._cache[ids] = self._run(ids)
            if len(self._cache) > CACHED:
                self._cache.popitem(last=False)
        self._cache.move_to_end(ids)
        return self._cache[ids]

    def _run(self, ids: tuple[int, ...]) -> Array:
        """Always alone: what else is in a batch can change the last bits."""
        count, length = len(ids), self._tokenizer.max_length
        padded = np.full(length, self._tokenizer.pad_id, np.int64)
        padded[:count] = ids
        self._session.write("input_ids", self._sizes, padded, row=0)
        self._session.write("attention_mask", self._sizes, (np.arange(length) < count).astype(np.int64), row=0)
        self._session.run(self._sizes)
        states: Array = self._session.buffer("hidden_states", self._sizes)[0].copy()
        return states


def _found(prompt: str) -> str:
    match = _WEIGHT.search(prompt)
    return "" if match is None else match.group()[:40]
