"""Write ``openai.jsonl.gz``: texts of many scripts and the ids that OpenAI's own tokenizer gives them.

    python tests/data/clip/record.py OPEN_CLIP/tokenizer.py EMOJIBASE_DATA

The first is that one file of the package open_clip_torch (3.3.0; it needs ftfy, regex and torch), the second the
unpacked npm package emojibase-data (17.0.0), whose labels are words of real languages.
"""

from __future__ import annotations

import gzip
import html
import importlib.util
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

LANGUAGES = [
    "bn",
    "da",
    "de",
    "en",
    "es",
    "et",
    "fi",
    "fr",
    "hi",
    "hu",
    "it",
    "ja",
    "ko",
    "lt",
    "ms",
    "nb",
    "nl",
    "pl",
    "pt",
    "ru",
    "sv",
    "th",
    "uk",
    "vi",
    "zh",
    "zh-hant",
]
BLOCKS = {
    "Arabic": (0x620, 0x64A),
    "Hebrew": (0x5D0, 0x5EA),
    "Greek": (0x3B1, 0x3C9),
    "Tamil": (0xB85, 0xBB9),
    "emoji": (0x1F300, 0x1FAFF),
    "full width": (0xFF01, 0xFF9F),
    "control": (0x00, 0x9F),
    "any code point": (0x20, 0x10FFFF),
}
WRITTEN = {
    "contractions": [
        "it's",
        "IT'S",
        "we'll go",
        "they've",
        "I'd've",
        "o'clock",
        "rock 'n' roll",
        "'tis",
        "don't't",
        "''s",
    ],
    "numbers": ["1234", "3.14", "1,000,000", "20%", "½ cup", "x²", "²³", "Ⅳ", "४२", "٣", "1st 2nd", "f/1.8 85mm", "8k"],
    "whitespace": [
        "a  b",
        " a ",
        "a\tb",
        "a\nb",
        "a\r\nb",
        "a\u00a0b",
        "a\u2003b",
        "a\u3000b",
        "a\u200bb",
        "\u2028a",
        "\ufeffa",
    ],
    "punctuation": [
        "(a:1.2), [b]",
        "a|b",
        "wow!!! ??",
        "--ar 16:9",
        "#tag @me",
        "a_b",
        "...",
        "<lora:x:1>",
        "{a}",
        "~^`",
    ],
    "typographic quotes": ["it’s", "“red”", "‘a’", "«b»", "don’t stop", "„c“", "5′ 6″", "a – b — c…"],
    "ligatures": ["ﬁre", "oﬃce", "ﬂower", "ﬆone", "ĳs", "ǆ"],
    "decomposed": ["e\u0301", "n\u0303o", "u\u0308ber", "か\u3099", "\u1112\u1161\u11ab", "A\u030angstro\u0308m"],
    "capitals": ["ΟΔΟΣ", "Σ", "ΑΣ. Β", "İstanbul", "STRASSE ẞ", "ÀÉÎ", "ДА", "ǅ"],
    "special tokens": ["<|endoftext|>", "a <|startoftext|> b", "<|ENDOFTEXT|>", "<end_of_text>", "<start_of_text> a"],
}
ENTITIES = [
    "{} &amp; {}",
    "&lt;{}&gt; {}",
    "{}&nbsp;{}",
    "{} &amp;amp; {}",
    "{}&#39;s {}",
    "{} &quot;{}&quot;",
    "{} &hearts; {}",
]


def texts(emojibase: Path) -> Iterator[tuple[str, str]]:
    """(category, text), the same ones every time."""
    rng = random.Random(0)
    labels = {}
    for language in LANGUAGES:
        data = json.loads((emojibase / language / "data.json").read_text(encoding="utf-8"))
        labels[language] = rng.sample(sorted({entry["label"] for entry in data}), 120)
        yield from (("labels, " + language, label) for label in labels[language])
    for name, (first, last) in BLOCKS.items():
        points = [point for point in range(first, last + 1) if not 0xD800 <= point < 0xE000]
        for _ in range(100):
            words = ("".join(map(chr, rng.choices(points, k=rng.randint(1, 8)))) for _ in range(rng.randint(1, 4)))
            yield name, " ".join(words)
    for name, group in WRITTEN.items():
        yield from ((name, text) for text in group)
    for left, right in zip(labels["en"][:100], labels["de"][:100], strict=True):
        yield "HTML entities", rng.choice(ENTITIES).format(left, right)
    for label in labels["fr"][:50] + labels["ja"][:50]:
        if not label.isascii():
            yield "mojibake", label.encode().decode("latin-1")


def openai(path: Path) -> ModuleType:
    """The file alone: its package imports far more."""
    spec = importlib.util.spec_from_file_location("openai_tokenizer", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(tokenizer: Path, emojibase: Path) -> None:
    """Record every text, its ids, and the text after OpenAI's cleaning where that changes it."""
    module = openai(tokenizer)
    encode, fix = module.SimpleTokenizer().encode, module.ftfy.fix_text
    lines = []
    for category, text in texts(emojibase):
        record = {"category": category, "text": text, "ids": encode(text)}
        if (cleaned := html.unescape(html.unescape(fix(text)))) != text:
            record["cleaned"] = cleaned
        lines.append(json.dumps(record))
    content = ("\n".join(lines) + "\n").encode()
    Path(__file__).with_name("openai.jsonl.gz").write_bytes(gzip.compress(content, mtime=0))
    print(len(lines), "texts")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
