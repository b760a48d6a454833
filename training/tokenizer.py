"""Train CLIP's byte-pair scheme on the captions: lower case, byte level, ``</w>`` ends a word."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from training import data
from training.captions import captions
from training.config import CONTEXT_LENGTH, VOCAB_SIZE, TrainingConfig

START, END = "<|startoftext|>", "<|endoftext|>"
PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def corpus(dataset: data.Dataset) -> list[str]:
    """Every caption of every pair that is not held out."""
    seen, _ = dataset.split()
    return sorted({text for n in seen for text in captions(dataset.concepts[n], dataset.styles[n])})


def make(config: TrainingConfig) -> None:
    """Write ``tokenizer/`` in the work folder: vocab.json, merges.txt and tokenizer_config.json.

    A run that starts from a bundle takes the bundle's, which the text encoder's embeddings belong to.
    """
    folder = config.work / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    if config.start is not None:
        given = config.start / "tokenizer"
        merges = (given / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
        pairs = [(left, right) for left, _, right in (line.partition(" ") for line in merges)]
        write(folder, json.loads((given / "vocab.json").read_text(encoding="utf-8")), pairs)
        print(f"{folder}: {len(pairs)} merges from {config.start}")
        return
    texts = corpus(data.load(config))
    tokenizer = Tokenizer(BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    # The trainer adds only the letters it met with "</w>"; CLIP's vocabulary has every byte with and without it.
    trainer = BpeTrainer(vocab_size=VOCAB_SIZE, end_of_word_suffix="</w>", initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    trained = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in trained["merges"]]
    letters = sorted(alphabet)
    room = VOCAB_SIZE - 2 - 2 * len(letters)
    known = {*letters, *(letter + "</w>" for letter in letters)}
    kept = []
    for left, right in merges:
        if len(kept) < room and left in known and right in known:
            kept.append((left, right))
            known.add(left + right)
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    tokens += [left + right for left, right in kept]
    tokens += [f"<|unused{index}|>" for index in range(VOCAB_SIZE - 2 - len(tokens))] + [START, END]
    write(folder, {token: index for index, token in enumerate(tokens)}, kept)
    print(f"{folder}: {len(kept)} merges from {len(texts)} captions")


def write(folder: Path, vocab: dict[str, int], merges: list[tuple[str, str]]) -> None:
    """Write the three files of a CLIP tokenizer."""
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": CONTEXT_LENGTH,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
