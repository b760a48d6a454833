"""A language model's byte-level tokenizer on its way from a checkpoint into a bundle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from calotype.export.json_files import read_json
from calotype.export.tokenizer import Tokenizer
from calotype.runtime.bundle.manifest import BYTE_LEVEL_SPLIT
from calotype.runtime.errors import CheckpointError, UnsupportedArchitectureError

START, END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
# What an added token may say of how it is found, and what it has to say.
PLAIN = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}


def read_byte_level(folder: Path, max_length: int) -> Tokenizer:
    """Read a checkpoint's ``tokenizer`` folder: ``tokenizer.json``, or ``vocab.json`` and ``merges.txt``.

    Args:
        folder: where they lie.
        max_length: of a prompt in tokens, its frame among them.

    Raises:
        CheckpointError: it holds no such tokenizer.
        UnsupportedArchitectureError: it holds one that splits texts in another way.
    """
    config = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    if config.get("padding_side", "right") != "right":
        raise UnsupportedArchitectureError(f"{folder} pads prompts on the left, which is not supported")
    whole = folder / "tokenizer.json"
    try:
        vocab, merges, added = _from_whole(read_json(whole), whole) if whole.is_file() else _from_two(folder, config)
        ids: dict[str, int] = {**vocab, **{str(item["content"]): int(item["id"]) for item in added}}
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder} holds no byte-level tokenizer: {error}; take the publisher's own tokenizer folder"
        ) from error
    for item in added:
        odd = {name: item[name] for name, plain in PLAIN.items() if item.get(name, plain) != plain}
        if odd:
            raise UnsupportedArchitectureError(f"{folder} has the token {item['content']!r} with {odd}, not supported")
    if len(set(ids.values())) != len(ids) or not {START, END, PAD} <= ids.keys():
        raise CheckpointError(
            f"{folder} is not Qwen's tokenizer: it has two tokens of one number, or lacks {START}, {END} or {PAD}; "
            "take the publisher's own tokenizer folder"
        )
    return Tokenizer(
        vocab=json.dumps(ids, ensure_ascii=False).encode(),
        merges="\n".join(["#version: 0.2", *merges]).encode(),
        max_length=max_length,
        bos_token=START,
        eos_token=END,
        pad_token=PAD,
        kind="byte-level",
        added_tokens=tuple(str(item["content"]) for item in added),
    )


def _from_whole(file: Mapping[str, Any], path: Path) -> tuple[dict[str, int], list[str], list[Mapping[str, Any]]]:
    """Vocabulary, merges and added tokens of a ``tokenizer.json``."""
    splits = [
        item["pattern"].get("Regex")
        for item in _steps(file["pre_tokenizer"], "pretokenizers")
        if item["type"] == "Split"
    ]
    kinds = [item["type"] for item in _steps(file.get("normalizer"), "normalizers")]
    if file["model"]["type"] != "BPE" or splits != [BYTE_LEVEL_SPLIT] or kinds != ["NFC"]:
        raise UnsupportedArchitectureError(
            f"{path} splits texts in another way than Qwen's tokenizer, which is not supported"
        )
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in file["model"]["merges"]]
    return dict(file["model"]["vocab"]), merges, sorted(file["added_tokens"], key=lambda item: int(item["id"]))


def _from_two(folder: Path, config: Mapping[str, Any]) -> tuple[dict[str, int], list[str], list[Mapping[str, Any]]]:
    """The same of two files; what is added to them stands in the tokenizer's settings."""
    for name in ("vocab.json", "merges.txt"):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} has neither tokenizer.json nor {name}; fetch the whole tokenizer folder")
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    table = {int(number): item for number, item in config.get("added_tokens_decoder", {}).items()}
    added: list[Mapping[str, Any]] = [{**table[number], "id": number} for number in sorted(table)]
    return read_json(folder / "vocab.json"), [line for line in lines if line and not line.startswith("#version")], added


def _steps(value: Mapping[str, Any] | None, plural: str) -> list[Mapping[str, Any]]:
    if value is None:
        return []
    return list(value[plural]) if value["type"] == "Sequence" else [value]
