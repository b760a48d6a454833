"""Textual inversion: words whose embeddings were trained, one or more vectors each.

Gal et al. 2022, "An Image is Worth One Word" (arXiv 2208.01618). Read are the layouts of AUTOMATIC1111, for one and for
SDXL's two text encoders, and of diffusers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from calotype.runtime.arguments import as_path
from calotype.runtime.bundle.safetensors import SafetensorsFile
from calotype.runtime.errors import InputError
from calotype.runtime.text.tokenizer import ClipTokenizer
from calotype.runtime.untrusted import is_pickle, stand_in

Array = NDArray[np.float32]

PICKLES = (".pt", ".bin", ".pth", ".ckpt")
# What AUTOMATIC1111 calls the vectors, and the text encoder that they are for.
NAMES = {"emb_params": "text_encoder", "clip_l": "text_encoder", "clip_g": "text_encoder_2"}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Embedding:
    """A word of a prompt, and its vectors (n, D) for each text encoder."""

    path: Path
    token: str
    vectors: Mapping[str, Array]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``FILE`` or ``FILE:WORD``; see :meth:`read`."""
        path, _, token = text.rpartition(":")
        if not path or Path(token).suffix.lower() in (".safetensors", *PICKLES):
            return cls.read(Path(text))
        return cls.read(Path(path), token)

    @classmethod
    def read(cls, path: str | Path, token: str | None = None) -> Self:
        """Read a ``.safetensors`` file.

        Args:
            path: the file.
            token: the word; None is the one in a file of diffusers' layout, else the file's name without suffix.

        Raises:
            InputError: it is a pickle or stands in for the file, cannot be read, or holds something else.
        """
        path = as_path("an embedding's path", path)
        what = stand_in(path)
        if what is not None:
            raise InputError(f"{path} {what}")
        if path.suffix.lower() in PICKLES or is_pickle(path):
            raise InputError(
                f"{path} is a pickle, which can hold code; fetch the embedding as .safetensors, or convert it"
            )
        file = SafetensorsFile(path)
        if not file.keys() - NAMES.keys():
            vectors, word = {NAMES[name]: file[name] for name in file}, path.stem
        elif len(file) == 1:
            (word,) = file
            vectors = {"text_encoder": file[word]}
        else:
            vectors, word = {}, ""
        if not vectors or any(value.ndim not in (1, 2) or value.dtype.kind != "f" for value in vectors.values()):
            raise InputError(
                f"{path} is no textual inversion: it holds {', '.join(list(file)[:8]) or 'nothing'}; "
                "valid: emb_params, or clip_l and clip_g, or one word's vectors"
            )
        word = word if token is None else token
        if not word.strip():
            raise InputError(f"the embedding {path} has no word; give one: {path}:WORD")
        rows = {name: np.atleast_2d(value).astype(np.float32) for name, value in vectors.items()}
        if not all(np.isfinite(value).all() for value in rows.values()):
            raise InputError(f"{path} holds values that are not finite; it is broken: use another")
        return cls(path=path, token=word, vectors=rows)


def add_embeddings(
    embeddings: Sequence[Embedding], encoder: str, tokenizer: ClipTokenizer, vocabulary: int, width: int
) -> Array:
    """Teach ``tokenizer`` the words; their vectors follow the ``vocabulary`` rows of the encoder's own table.

    Returns:
        The vectors of all, (n, ``width``).

    Raises:
        InputError: one is for another model, or its word is taken.
    """
    rows = [np.empty((0, width), np.float32)]
    for embedding in embeddings:
        vectors: Any = embedding.vectors.get(encoder)
        if vectors is None or vectors.shape[1] != width:
            found = ", ".join(f"{name} of {value.shape[1]}" for name, value in embedding.vectors.items())
            raise InputError(
                f"the embedding {embedding.path} is for another model: it has vectors for {found}; "
                f"this model's {encoder} takes {width}"
            )
        start = vocabulary + sum(len(row) for row in rows)
        tokenizer.add_word(embedding.token, range(start, start + len(vectors)))
        rows.append(vectors)
    return np.concatenate(rows)
