"""The tokenizer against transformers' ``CLIPTokenizer``, live, and against OpenAI's own, recorded."""

from __future__ import annotations

import gzip
import json
import warnings
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from calotype.export.tokenizer import CLIP_MERGES
from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.bundle.manifest import TokenizerSpec
from calotype.runtime.errors import BundleError, InputError
from calotype.runtime.text.tokenizer import ClipTokenizer

DATA = Path(__file__).parents[2] / "data" / "clip"

# Per category of tests/data/clip: texts, those whose ids differ from OpenAI's, those that differ once the text has been
# through OpenAI's cleaning.
DIFFERENCES = {
    "labels": (3120, 50, 0),
    "Arabic": (100, 0, 0),
    "Hebrew": (100, 0, 0),
    "Greek": (100, 0, 0),
    "Tamil": (100, 0, 0),
    "emoji": (100, 0, 0),
    "full width": (100, 100, 0),
    "control": (100, 97, 0),
    "any code point": (100, 13, 13),
    "contractions": (10, 0, 0),
    "numbers": (13, 0, 0),
    "whitespace": (11, 1, 0),
    "punctuation": (10, 0, 0),
    "typographic quotes": (8, 5, 0),
    "ligatures": (6, 6, 0),
    "decomposed": (6, 0, 0),
    "capitals": (8, 3, 2),
    "special tokens": (5, 4, 4),
    "HTML entities": (100, 100, 0),
    "mojibake": (73, 73, 0),
}

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


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with CLIP's real vocab.json and merges.txt, as transformers writes them."""
    from tokenizers.pre_tokenizers import ByteLevel

    folder = tmp_path_factory.mktemp("clip")
    merges = gzip.decompress(CLIP_MERGES.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    # Bytes that print come first, as in OpenAI's table; the others were moved to U+0100 and up.
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    assert (len(vocab), vocab["!"], vocab["hello</w>"]) == (49408, 0, 3306)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    return folder


def both(clip: Path, pad_token: str):
    """Ours and transformers', from the same files."""
    import transformers

    files = clip / "vocab.json", clip / "merges.txt"
    spec = TokenizerSpec(vocab="vocab.json", merges="merges.txt", pad_token=pad_token)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = transformers.CLIPTokenizer(vocab=str(files[0]), merges=str(files[1]), pad_token=pad_token)
    return ClipTokenizer.from_files(*files, spec), reference


def recorded() -> list[dict]:
    return [json.loads(line) for line in gzip.decompress((DATA / "openai.jsonl.gz").read_bytes()).splitlines()]


def test_differences_from_openai_are_counted(clip: Path) -> None:
    tokenizer, _ = both(clip, "<|endoftext|>")
    texts, raw, cleaned = Counter(), Counter(), Counter()
    for record in recorded():
        category = record["category"].split(",")[0]
        texts[category] += 1
        raw[category] += tokenizer.tokenize(record["text"]) != record["ids"]
        cleaned[category] += tokenizer.tokenize(record.get("cleaned", record["text"])) != record["ids"]
    assert {name: (texts[name], raw[name], cleaned[name]) for name in texts} == DIFFERENCES
    assert (texts.total(), raw.total(), cleaned.total()) == (4170, 452, 19)


@pytest.mark.parametrize("pad_token", ["<|endoftext|>", "!"])
def test_equals_transformers_on_the_real_vocabulary(clip: Path, pad_token: str) -> None:
    # Stable Diffusion 2 and SDXL's second tower pad with "!", which transformers then reads as special in a text too.
    tokenizer, reference = both(clip, pad_token)
    texts = [record["text"] for record in recorded()] + ["hello!", "wow!! nice", "a ! b", "!"]
    assert packed(tokenizer, texts) == rows(reference, texts, 77)


def packed(tokenizer: ClipTokenizer, texts: list[str]) -> list[list[int]]:
    return [tokenizer.pack(tokenizer.tokenize(text)[: tokenizer.max_length - 2]).tolist() for text in texts]


def rows(reference, texts: list[str], length: int) -> list[list[int]]:
    return reference(texts, padding="max_length", truncation=True, max_length=length).input_ids


def test_equals_transformers(tokenizer: ClipTokenizer, reference) -> None:
    assert packed(tokenizer, TEXTS) == rows(reference, TEXTS, tokenizer.max_length)


@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=60))
def test_equals_transformers_on_any_text(tokenizer: ClipTokenizer, reference, text: str) -> None:
    assert packed(tokenizer, [text]) == rows(reference, [text], tokenizer.max_length)


def test_a_corrupt_vocabulary_is_a_bundle_error(tiny_bundle: Path, spec: TokenizerSpec, tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(BundleError, match="not a CLIP tokenizer"):
        ClipTokenizer.from_files(tmp_path / "vocab.json", tiny_bundle / spec.merges, spec)


def test_a_prompt_that_is_not_unicode_is_refused(tokenizer: ClipTokenizer) -> None:
    # What an argument of the bytes 61 ff becomes.
    with pytest.raises(InputError, match=r"'a\\udcff' is not valid Unicode; give it as UTF-8"):
        tokenizer.tokenize(b"a\xff".decode(errors="surrogateescape"))
