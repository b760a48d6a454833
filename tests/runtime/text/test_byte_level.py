"""The byte-level tokenizer, from both layouts of a checkpoint, against transformers' ``Qwen2Tokenizer``."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from calotype.export.byte_level import read_byte_level
from calotype.export.tokenizer import Tokenizer
from calotype.runtime.bundle.manifest import TokenizerSpec
from calotype.runtime.errors import BundleError, CheckpointError, InputError, UnsupportedArchitectureError
from calotype.runtime.families.flux2_klein import FRAME
from calotype.runtime.text.byte_level import ByteLevelTokenizer
from tests.klein import ADDED, tokenizer

RECORDED = Path(__file__).parents[2] / "data" / "clip" / "openai.jsonl.gz"
TEXTS = [
    "",
    "a red apple, they're soft",
    "two  spaces,\ttab\r\nand\n\n lines ",
    "日本語の林檎 🍎👩‍🚀 Ünïcödé n\u0303",
    "1234 3.14 20%",
    "<|im_end|> inside, <think> too, and <|im_end|><|endoftext|>",
    "İstanbul ﬁ Ǆ",
]


def opened(written: Tokenizer, folder: Path) -> ByteLevelTokenizer:
    """The runtime's, of what the exporter writes."""
    (folder / "vocab.json").write_bytes(written.vocab)
    (folder / "merges.txt").write_bytes(written.merges)
    spec = TokenizerSpec(
        vocab="vocab.json",
        merges="merges.txt",
        max_length=written.max_length,
        bos_token=written.bos_token,
        eos_token=written.eos_token,
        pad_token=written.pad_token,
        kind=written.kind,
        added_tokens=written.added_tokens,
    )
    return ByteLevelTokenizer.from_files(folder / "vocab.json", folder / "merges.txt", spec)


def split_in_two(folder: Path) -> None:
    """``tokenizer.json`` as the two files of former versions, what is added in the settings."""
    whole = json.loads((folder / "tokenizer.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(whole["model"]["vocab"]))
    pairs = [" ".join(pair) for pair in whole["model"]["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs, ""]))
    table = {str(item["id"]): {key: item[key] for key in item.keys() - {"id"}} for item in whole["added_tokens"]}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": table}))
    (folder / "tokenizer.json").unlink()


@pytest.fixture(scope="module")
def theirs() -> Any:
    return tokenizer()


@pytest.fixture(scope="module", params=["tokenizer.json", "vocab.json and merges.txt"])
def pair(request: pytest.FixtureRequest, theirs: Any, tmp_path_factory: Any) -> Iterator[tuple[Any, Any]]:
    """Ours and theirs."""
    folder = tmp_path_factory.mktemp("tokenizer")
    theirs.save_pretrained(folder)
    if request.param != "tokenizer.json":
        split_in_two(folder)
    yield opened(read_byte_level(folder, 512), folder), theirs


def test_thousands_of_texts_have_the_same_tokens(pair: tuple[Any, Any]) -> None:
    ours, theirs = pair
    recorded = [json.loads(line) for line in gzip.decompress(RECORDED.read_bytes()).splitlines()]
    texts = [*TEXTS, *(item["text"] for item in recorded)]
    assert len(texts) > 4000
    wanted = theirs(texts, add_special_tokens=False)["input_ids"]
    differing = [text for text, ids in zip(texts, wanted, strict=True) if ours.tokenize(text) != ids]
    assert differing == []
    assert any(len(ids) < len(text.encode()) for text, ids in zip(texts, wanted, strict=True))  # merges happen


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=40) | st.lists(st.sampled_from([*ADDED, " ", "'s", "\n", "appl"]), max_size=8).map("".join))
def test_any_text_has_the_same_tokens(pair: tuple[Any, Any], text: str) -> None:
    ours, theirs = pair
    assert ours.tokenize(text) == theirs(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("prompt", TEXTS)
def test_the_frame_is_that_of_the_chat_template(theirs: Any, prompt: str) -> None:
    message = [{"role": "user", "content": prompt}]
    wanted = theirs.apply_chat_template(message, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    assert prompt.join(FRAME) == wanted


def test_what_is_not_unicode_is_one_line(pair: tuple[Any, Any]) -> None:
    with pytest.raises(InputError, match="is not valid Unicode; give it as UTF-8"):
        pair[0].tokenize("a \udc80")


def rewritten(folder: Path, theirs: Any, change: Any) -> Path:
    theirs.save_pretrained(folder)
    whole = json.loads((folder / "tokenizer.json").read_text())
    change(whole)
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda whole: whole["pre_tokenizer"].update(pretokenizers=[]), "splits texts in another way than Qwen's"),
        (lambda whole: whole.update(normalizer={"type": "NFKC"}), "splits texts in another way than Qwen's"),
        (lambda whole: whole["model"].update(type="Unigram"), "splits texts in another way than Qwen's"),
        (lambda whole: whole["added_tokens"][0].update(lstrip=True), "has the token .* with {'lstrip': True}, not sup"),
        (lambda whole: whole.pop("model"), "holds no byte-level tokenizer: 'model'; take the publisher's own"),
        (lambda whole: whole["added_tokens"].clear(), "is not Qwen's tokenizer: it has two tokens of one number, or l"),
        (lambda whole: whole["added_tokens"][0].update(id=0), "is not Qwen's tokenizer: it has two tokens of one numb"),
    ],
)
def test_another_tokenizer_is_named(theirs: Any, tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises((CheckpointError, UnsupportedArchitectureError), match=message):
        read_byte_level(rewritten(tmp_path, theirs, change), 512)


def test_missing_files_are_named(theirs: Any, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path)
    split_in_two(tmp_path)
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(CheckpointError, match=r"has neither tokenizer.json nor merges.txt; fetch the whole tokenizer"):
        read_byte_level(tmp_path, 512)


def test_padding_on_the_left_is_refused(theirs: Any, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"padding_side": "left"}')
    with pytest.raises(UnsupportedArchitectureError, match="pads prompts on the left, which is not supported"):
        read_byte_level(tmp_path, 512)


def test_files_that_are_none_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("{")
    (tmp_path / "merges.txt").write_text("a b\n")
    spec = TokenizerSpec(vocab="vocab.json", merges="merges.txt", kind="byte-level")
    with pytest.raises(BundleError, match=r"are not a byte-level tokenizer: .*; export the bundle again"):
        ByteLevelTokenizer.from_files(tmp_path / "vocab.json", tmp_path / "merges.txt", spec)
