"""CLIP's byte-pair tokenizer, from ``vocab.json`` and ``merges.txt``.

Radford et al. 2021 (arXiv 2103.00020). Equal to transformers' ``CLIPTokenizer``. OpenAI's original also mends text
(ftfy: mojibake, curly quotes, ligatures, full-width letters, control characters) and decodes HTML entities before it
splits it; neither does this one, nor transformers'. Over 4,170 recorded texts that changes 452, among them 50 of 3,120
ordinary phrases in 26 languages, all 50 by curly quotes. Cleaned first, all but 19 are equal: 13 of random code points
(another Unicode version), 2 with a capital sigma at the end of a word, 4 that spell a special token.
``tests/runtime/text/test_tokenizer.py`` counts them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Encoding, Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE

from calotype.runtime.bundle.manifest import MOST_VOCABULARY, TokenizerSpec
from calotype.runtime.errors import BundleError, InputError, quoted
from calotype.runtime.untrusted import parse_json, read_bytes, why

_PATTERN = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # of CLIP itself
)


class ClipTokenizer:
    """Texts to token ids, and those to an encoder's input: start, text, end, padding."""

    def __init__(self, tokenizer: Tokenizer, spec: TokenizerSpec) -> None:
        self._tokenizer = tokenizer
        self.max_length = spec.max_length
        self._words: dict[int, Sequence[int]] = {}
        ids = {}
        for token in (spec.bos_token, spec.eos_token, spec.pad_token):
            found = tokenizer.token_to_id(token)
            if found is None:
                raise BundleError(f"the tokenizer's vocabulary has no {quoted(token)}; export the bundle again")
            ids[token] = found
        self.bos_id, self.eos_id, self.pad_id = ids[spec.bos_token], ids[spec.eos_token], ids[spec.pad_token]

    @classmethod
    def from_files(cls, vocab: Path, merges: Path, spec: TokenizerSpec) -> ClipTokenizer:
        """Read the two files.

        Raises:
            BundleError: when one is not what its name says.
        """
        try:
            pairs = []
            for line in read_bytes(merges, MOST_VOCABULARY).decode("utf-8").splitlines():
                if line and not line.startswith("#version"):
                    left, right = line.split(" ")
                    pairs.append((left, right))
            model = BPE(
                parse_json(read_bytes(vocab, MOST_VOCABULARY)),
                pairs,
                unk_token=spec.eos_token,
                end_of_word_suffix="</w>",
            )
        except MemoryError:
            raise
        except Exception as error:  # the library raises bare Exception for a merge that is not in the vocabulary
            raise BundleError(
                f"{vocab} and {merges} are not a CLIP tokenizer: {why(error)}; export the bundle again"
            ) from error
        tokenizer = Tokenizer(model)
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_PATTERN), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        specials = dict.fromkeys((spec.bos_token, spec.eos_token, spec.pad_token))
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
        return cls(tokenizer, spec)

    def tokenize(self, text: str) -> list[int]:
        """Token ids of ``text``, however many, without start and end.

        Raises:
            InputError: it has lone surrogates, as an argument that is not UTF-8 gets from the operating system.
        """
        return [own for word in self.words(text) for own in word]

    def words(self, text: str) -> list[Sequence[int]]:
        """The same ids, those of an embedding together."""
        return [self._words.get(token, (token,)) for token in self._encode(text).ids]

    def position(self, text: str, token: int) -> int:
        """Where in ``text`` the token of that number begins."""
        encoding = self._encode(text)
        pairs = zip(encoding.ids, encoding.offsets, strict=True)
        starts = [start for found, (start, _) in pairs for _ in self._words.get(found, (found,))]
        return starts[token]

    def add_word(self, word: str, ids: Sequence[int]) -> None:
        """Make ``word``, in any case, the tokens ``ids`` wherever it stands, if it is of letters alone for itself.

        Raises:
            InputError: the vocabulary has it already.
        """
        if self._tokenizer.token_to_id(word) is not None:
            raise InputError(f"the word {word!r} is in the vocabulary already; give the embedding another: FILE:WORD")
        alone = word[0].isalnum() and word[-1].isalnum()
        self._tokenizer.add_tokens([AddedToken(word, single_word=alone, normalized=True)])
        own = self._tokenizer.token_to_id(word)
        assert own is not None
        self._words[own] = ids

    def pack(self, ids: Sequence[int]) -> NDArray[np.int64]:
        """What an encoder is given, (max_length,): start, at most ``max_length - 2`` ids, end, padding."""
        row = np.full(self.max_length, self.pad_id, dtype=np.int64)
        row[: len(ids) + 2] = [self.bos_id, *ids, self.eos_id]
        return row

    def _encode(self, text: str) -> Encoding:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError(f"the prompt {text[:80]!a} is not valid Unicode; give it as UTF-8") from None
        return self._tokenizer.encode(text, add_special_tokens=False)
