"""A CLIP tokenizer on its way from a checkpoint into a bundle."""

from __future__ import annotations

import dataclasses
import gzip
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from calotype.export.json_files import read_json, read_small
from calotype.export.models.clip import TextEncoder
from calotype.runtime.errors import CheckpointError, quoted

logger = logging.getLogger(__name__)

# What transformers writes for the length of a prompt that no one said.
UNSAID = int(1e30)
SHORTEST = 3
CLIP_MERGES = Path(__file__).parent / "data" / "clip" / "merges.txt.gz"
# CLIP counts bytes from those that can be printed to those that cannot, and writes the latter as U+0100 and up.
_PRINTED = (*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """The contents of ``vocab.json`` and ``merges.txt``, the special tokens, and the length of a prompt in tokens.

    ``kind`` and ``added_tokens`` are those of :class:`calotype.runtime.bundle.manifest.TokenizerSpec`.
    """

    vocab: bytes
    merges: bytes
    max_length: int = UNSAID
    bos_token: str = "<|startoftext|>"
    eos_token: str = "<|endoftext|>"
    pad_token: str = "<|endoftext|>"
    kind: str = "clip"
    added_tokens: tuple[str, ...] = ()

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """Read a checkpoint's ``tokenizer`` folder: two files, or transformers 5's one ``tokenizer.json``.

        Raises:
            CheckpointError: when it is not a CLIP tokenizer.
        """
        config = read_json(folder / "tokenizer_config.json")
        special = folder / "special_tokens_map.json"
        # transformers lets the second file win, and Stable Diffusion 2.x names its padding only there.
        config |= read_json(special) if special.exists() else {}
        vocab, merges = _files(folder)
        end = _token(config, "eos_token", cls.eos_token, folder)
        return cls(
            vocab=vocab,
            merges=merges,
            bos_token=_token(config, "bos_token", cls.bos_token, folder),
            eos_token=end,
            pad_token=_token(config, "pad_token", end, folder),
            max_length=_max_length(config, folder),
        )

    def fitted(self, encoder: TextEncoder) -> Self:
        """The same, with prompts as long as both it and ``encoder`` take them."""
        longest = encoder.config.max_position_embeddings
        length = min(self.max_length, longest)
        if self.max_length not in (longest, UNSAID):
            logger.warning(
                "the tokenizer's model_max_length is %d and the text encoder reads up to %d tokens; prompts are cut "
                "into pieces of %d, the smaller",
                self.max_length,
                longest,
                length,
            )
        return dataclasses.replace(self, max_length=length)

    @classmethod
    def clip(cls, pad_token: str) -> Self:
        """CLIP's own tokenizer, for the checkpoints that carry none (see ``data/clip/README.md``)."""
        merges = gzip.decompress(CLIP_MERGES.read_bytes())
        letters = [chr(byte) for byte in _PRINTED] + [chr(256 + index) for index in range(256 - len(_PRINTED))]
        merged = [line.replace(" ", "") for line in merges.decode().splitlines()[1:]]
        tokens = [*letters, *(f"{letter}</w>" for letter in letters), *merged, cls.bos_token, cls.eos_token]
        vocab = json.dumps({token: index for index, token in enumerate(tokens)}, ensure_ascii=False)
        return cls(vocab=vocab.encode(), merges=merges, pad_token=pad_token)


def _files(folder: Path) -> tuple[bytes, bytes]:
    whole = folder / "tokenizer.json"
    if not (folder / "vocab.json").exists() and whole.exists():
        model = read_json(whole).get("model", {})
        try:
            pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
            return json.dumps(model["vocab"], ensure_ascii=False).encode(), "\n".join(
                ["#version: 0.2", *pairs]
            ).encode()
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{whole} is not a byte-pair tokenizer; CLIP's is one") from error
    for name in ("vocab.json", "merges.txt"):
        if not (folder / name).exists():
            raise CheckpointError(f"{folder} has no {name}; a CLIP tokenizer is vocab.json and merges.txt")
    return read_small(folder / "vocab.json"), read_small(folder / "merges.txt")


def _max_length(config: Mapping[str, Any], folder: Path) -> int:
    value = config.get("model_max_length") or UNSAID
    if not isinstance(value, int | float) or not SHORTEST <= value < math.inf:
        raise CheckpointError(
            f"{folder} says model_max_length={value!r}; valid: {SHORTEST} or more, for a start, an end and a word"
        )
    return int(value)


def _token(config: Mapping[str, Any], name: str, default: str, folder: Path) -> str:
    value = config.get(name)
    if value is None:
        return default
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise CheckpointError(f"{folder} says {name}={quoted(value)}, which is no token; take the publisher's own")
    return text
