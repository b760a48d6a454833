"""What lies in the place of a file that is read: a pipe, a device, a folder, ten gigabytes. One line, at once."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from calotype.export.folder import Folder
from calotype.export.single_file import SingleFile
from calotype.export.sources import load_checkpoint
from calotype.export.tokenizer import Tokenizer
from calotype.export.weight_files import shards
from calotype.runtime.adapters.files import PEFT_CONFIG, PEFT_WEIGHTS, read_adapter
from calotype.runtime.bundle.manifest import MANIFEST_NAME, Manifest, TokenizerSpec
from calotype.runtime.bundle.safetensors import SafetensorsFile
from calotype.runtime.cli import bench
from calotype.runtime.errors import CalotypeError
from calotype.runtime.graphs.files import read_graph
from calotype.runtime.pictures.embedded import read_settings
from calotype.runtime.pictures.reading import load_image, open_mask
from calotype.runtime.text.textual_inversion import Embedding
from calotype.runtime.text.tokenizer import ClipTokenizer
from calotype.runtime.text.vocabulary import read_words
from calotype.runtime.untrusted import read_toml
from calotype.serving.config import ServeConfig
from calotype.serving.http.keys import read_keys

HUGE = 10 * 2**30  # bytes, of which the disk has none
ALLOWED = 100 * 2**20  # bytes of memory
SPEC = TokenizerSpec(vocab="vocab.json", merges="merges.txt")


def adapter(path: Path) -> object:
    (path.parent / PEFT_WEIGHTS).touch()
    return read_adapter(path.parent)


def tokenizer(path: Path) -> object:
    for name, text in (("tokenizer_config.json", "{}"), ("vocab.json", "{}"), ("merges.txt", "")):
        if not (path.parent / name).exists():
            (path.parent / name).write_text(text)
    return Tokenizer.from_folder(path.parent)


def clip(path: Path) -> object:
    for name, text in (("vocab.json", "{}"), ("merges.txt", "")):
        if not (path.parent / name).exists():
            (path.parent / name).write_text(text)
    return ClipTokenizer.from_files(path.parent / "vocab.json", path.parent / "merges.txt", SPEC)


def beside(path: Path) -> object:
    return SingleFile(path=path.with_suffix(".safetensors"), state={}, metadata={}).settings_beside


def inside(path: Path) -> object:
    return Folder(path=path.parent, index={}, alone=False).card


def component(path: Path) -> object:
    return Folder(path=path.parent, index={}, alone=False).weights("", "model")


# What it is called, and what reads it.
READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a checkpoint in one file": ("model.safetensors", load_checkpoint),
    "a pickled checkpoint": ("model.ckpt", load_checkpoint),
    "the settings beside a checkpoint": ("model.yaml", beside),
    "the index of a folder": ("model_index.json", lambda path: load_checkpoint(path.parent)),
    "the configuration of a component": ("config.json", lambda path: load_checkpoint(path.parent)),
    "a model card": ("model_card.json", inside),
    "the weights of a component": ("model.safetensors", component),
    "the index of shards": ("model.safetensors.index.json", component),
    "an index of shards by name": ("model.safetensors.index.json", shards),
    "a tokenizer's vocabulary": ("vocab.json", tokenizer),
    "a tokenizer's merges": ("merges.txt", tokenizer),
    "a tokenizer's configuration": ("tokenizer_config.json", tokenizer),
    "a tokenizer's special tokens": ("special_tokens_map.json", tokenizer),
    "a LoRA": ("lora.safetensors", read_adapter),
    "the configuration of an adapter": (PEFT_CONFIG, adapter),
    "a LoRA's tensors": ("lora.safetensors", SafetensorsFile),
    "a textual inversion": ("word.safetensors", Embedding.read),
    "a picture": ("a.png", load_image),
    "a mask": ("a.png", open_mask),
    "a picture's settings": ("a.png", read_settings),
    "a manifest": (MANIFEST_NAME, lambda path: Manifest.read(path.parent)),
    "a graph": ("unet.onnx", read_graph),
    "a bundle's vocabulary": ("vocab.json", clip),
    "a bundle's merges": ("merges.txt", clip),
    "a bundle's words": ("words.txt", read_words),
    "settings of the command line": ("calotype.toml", read_toml),
    "settings of the server": ("serve.toml", lambda path: ServeConfig.read(path, {}, {})),
    "keys of the server": ("keys", read_keys),
    "the key of a load test": ("key", bench._key),
    "a report to compare with": ("report.json", bench._read),
}


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.mkdir()


def link_to_a_folder(path: Path) -> None:
    (path.parent / "elsewhere").mkdir()
    path.symlink_to("elsewhere")


def huge(path: Path) -> None:
    path.touch()
    os.truncate(path, HUGE)


def huge_elsewhere(path: Path) -> None:
    huge(path.parent / "elsewhere")
    path.symlink_to("elsewhere")


@pytest.mark.parametrize("kind", [pipe, device, folder, link_to_a_folder, huge, huge_elsewhere])
@pytest.mark.parametrize("reader", list(READERS))
def test_it_is_one_line(tmp_path: Path, reader: str, kind: Callable[[Path], None]) -> None:
    name, read = READERS[reader]
    kind(tmp_path / name)
    tracemalloc.start()
    try:
        with pytest.raises((CalotypeError, click.BadParameter)) as caught:
            read(tmp_path / name)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    message = str(caught.value) or caught.value.message
    assert message.isprintable() and len(message) < 1500, message
    assert str(tmp_path) in message
    assert peak < ALLOWED
