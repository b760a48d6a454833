"""The tokenizer against transformers' ``CLIPTokenizer`` on the same vocabulary."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from calotype.runtime.bundle import Bundle
from calotype.runtime.errors import BundleError
from calotype.runtime.manifest import TokenizerSpec
from calotype.runtime.tokenizer import ClipTokenizer

TEXTS = [
    "",
    " ",
    "a red apple",
    "An APPLE'S  core,\tit's\nred!!",
    "Ünïcödé naïve café",
    "日本語の林檎",
    "تفاحة حمراء",
    "लाल सेब",
    "🍎👩‍🚀 emoji",
    "1234 3.14 20%",
    "&amp; &lt;b&gt;",
    "\x00\x07 control",
    "<|endoftext|> inside",
    "e\u0301 combining",
]


@pytest.fixture(scope="module")
def spec(tiny_bundle: Path) -> TokenizerSpec:
    return Bundle.open(tiny_bundle).manifest.tokenizers["tokenizer"]


@pytest.fixture(scope="module")
def tokenizer(tiny_bundle: Path, spec: TokenizerSpec) -> ClipTokenizer:
    return ClipTokenizer.from_files(tiny_bundle / spec.vocab, tiny_bundle / spec.merges, spec)


@pytest.fixture(scope="module")
def reference(tiny_bundle: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        return transformers.CLIPTokenizer(
            vocab=str(tiny_bundle / "tokenizer/vocab.json"), merges=str(tiny_bundle / "tokenizer/merges.txt")
        )


def rows(reference, texts: list[str], length: int) -> list[list[int]]:
    return reference(texts, padding="max_length", truncation=True, max_length=length).input_ids


def test_equals_transformers(tokenizer: ClipTokenizer, reference) -> None:
    assert tokenizer.encode(TEXTS).tolist() == rows(reference, TEXTS, tokenizer.max_length)


@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=60))
def test_equals_transformers_on_any_text(tokenizer: ClipTokenizer, reference, text: str) -> None:
    assert tokenizer.encode([text]).tolist() == rows(reference, [text], tokenizer.max_length)


def test_truncation_warns_and_quotes(tokenizer: ClipTokenizer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        ids = tokenizer.encode(["apple " * 30 + "red"])
    assert ids.shape == (1, tokenizer.max_length)
    assert ids[0, -1] == tokenizer.eos_id
    assert "31 tokens, 30 fit" in caplog.text
    assert "'red'" in caplog.text


def test_a_huge_prompt_is_legal_and_quoted_in_short(tokenizer: ClipTokenizer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        tokenizer.encode(["a" * 100_000])
    assert len(caplog.records) == 1
    assert len(caplog.text) < 400


def test_a_corrupt_vocabulary_is_a_bundle_error(tiny_bundle: Path, spec: TokenizerSpec, tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(BundleError, match="not a CLIP tokenizer"):
        ClipTokenizer.from_files(tmp_path / "vocab.json", tiny_bundle / spec.merges, spec)
