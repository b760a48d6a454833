"""A language model's byte-pair tokenizer over bytes, from ``vocab.json`` and ``merges.txt``: equal to Qwen's."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE

from calotype.runtime.bundle.manifest import BYTE_LEVEL_SPLIT, TokenizerSpec
from calotype.runtime.errors import BundleError, InputError, quoted
from calotype.runtime.untrusted import parse_json, read_bytes, why

MOST_BYTES = 64 << 20  # of a vocabulary


class ByteLevelTokenizer:
    """Texts to token ids; nothing is put around them."""

    def __init__(self, tokenizer: Tokenizer, spec: TokenizerSpec) -> None:
        self._tokenizer, self.max_length = tokenizer, spec.max_length
        pad = tokenizer.token_to_id(spec.pad_token)
        if pad is None:
            raise BundleError(f"the tokenizer's vocabulary has no {quoted(spec.pad_token)}; export the bundle again")
        self.pad_id = int(pad)

    @classmethod
    def from_files(cls, vocab: Path, merges: Path, spec: TokenizerSpec) -> Self:
        """Read the two files.

        Raises:
            BundleError: when one is not what its name says.
        """
        try:
            pairs = []
            for line in read_bytes(merges, MOST_BYTES).decode("utf-8").splitlines():
                if line and not line.startswith("#version"):
                    left, right = line.split(" ")
                    pairs.append((left, right))
            tokenizer = Tokenizer(BPE(parse_json(read_bytes(vocab, MOST_BYTES)), pairs))
        except MemoryError:
            raise
        except Exception as error:  # the library raises bare Exception for a merge that is not in the vocabulary
            raise BundleError(
                f"{vocab} and {merges} are not a byte-level tokenizer: {why(error)}; export the bundle again"
            ) from error
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(BYTE_LEVEL_SPLIT), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokens = dict.fromkeys((*spec.added_tokens, spec.bos_token, spec.eos_token, spec.pad_token))
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
        return cls(tokenizer, spec)

    def tokenize(self, text: str) -> list[int]:
        """Token ids of ``text``, however many.

        Raises:
            InputError: it has lone surrogates, as an argument that is not UTF-8 gets from the operating system.
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError(f"the prompt {text[:80]!a} is not valid Unicode; give it as UTF-8") from None
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)
