"""The special tokens of a vocabulary, and vocabularies that are none."""

from __future__ import annotations

import pytest

from calotype.runtime.bundle.manifest import TokenizerSpec
from calotype.runtime.bundle.parity import Tokens
from calotype.runtime.errors import BundleError

SPEC = TokenizerSpec(vocab="tokenizer/vocab.json", merges="merges.txt", pad_token="!")


def test_tokens_of_a_vocabulary() -> None:
    vocab = b'{"a": 0, "<|startoftext|>": 1, "<|endoftext|>": 2, "!": 3}'
    assert Tokens.read(vocab, SPEC) == Tokens(count=4, bos=1, eos=2, pad=3)


@pytest.mark.parametrize(
    ("vocab", "said"),
    [
        (b"[" * 100_000, "it is nested too deep"),
        (b'{"a":' * 100_000, "it is nested too deep"),
        (b'{"a": ' + b"1" * 5000 + b"}", "it has a whole number of 5000 digits"),
        (b"[]", "it is no table of whole numbers"),
        (b'{"<|startoftext|>": "1"}', "it is no table of whole numbers"),
        (b'{"<|startoftext|>": 1, "<|endoftext|>": 2}', "it has no '!'"),
        (b"\xff", "'utf-8' codec"),
        (b"", "Expecting value"),
    ],
)
def test_what_is_no_vocabulary_is_one_line(vocab: bytes, said: str) -> None:
    with pytest.raises(BundleError, match=r"tokenizer/vocab\.json is not the vocabulary of a CLIP tokenizer") as caught:
        Tokens.read(vocab, SPEC)
    assert said in str(caught.value) and str(caught.value).isprintable() and len(str(caught.value)) < 500
