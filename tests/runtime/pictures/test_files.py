"""Picture files: settings that come back, and nothing half-written."""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import random
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from calotype.runtime.errors import InputError, OutputError
from calotype.runtime.pictures.files import Parameters, numbered_paths, read_parameters, save_image

PARAMETERS = Parameters(
    prompt="a red apple, noto style",
    negative_prompt="blue",
    steps=20,
    sampler="dpmpp-2m",
    guidance_scale=7.0,
    seed=42,
    width=64,
    height=32,
    model="a, b",
    model_hash="0123456789",
    further={"Eta": 0.5, "Crop": (1, 2)},
)
TEXT = (
    "a red apple, noto style\nNegative prompt: blue\n"
    'Steps: 20, Sampler: dpmpp-2m, CFG scale: 7, Seed: 42, Size: 64x32, Model hash: 0123456789, Model: "a, b", '
    "Eta: 0.5, Crop: 1 2, Version: calotype 0.1.0"
)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".JPEG", ".webp"])
@pytest.mark.parametrize("prompt", ["a red apple, noto style", "ein Äpfelchen 🍎"])
def test_settings_come_back(tmp_path: Path, suffix: str, prompt: str) -> None:
    path = tmp_path / f"picture{suffix}"
    save_image(Image.new("RGB", (64, 32), "red"), path, dataclasses.replace(PARAMETERS, prompt=prompt))
    assert read_parameters(path) == TEXT.replace("a red apple, noto style", prompt)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_the_same_picture_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        save_image(Image.new("RGB", (8, 8), "red"), tmp_path / name, PARAMETERS)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_nothing_is_overwritten_unless_told_to(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"precious")
    with pytest.raises(OutputError, match="--overwrite"):
        save_image(Image.new("RGB", (8, 8)), path, PARAMETERS)
    assert path.read_bytes() == b"precious"
    save_image(Image.new("RGB", (8, 8)), path, PARAMETERS, overwrite=True)
    assert path.read_bytes() != b"precious"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left on device"):
        save_image(Image.new("RGB", (8, 8)), tmp_path / "a.png", PARAMETERS)
    assert list(tmp_path.iterdir()) == []


def test_bad_targets(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"valid: \.png, \.jpg, \.jpeg, \.webp"):
        save_image(Image.new("RGB", (8, 8)), tmp_path / "a.gif", PARAMETERS)
    with pytest.raises(OutputError, match="does not exist"):
        save_image(Image.new("RGB", (8, 8)), tmp_path / "no" / "a.png", PARAMETERS)


def test_numbered_names_pass_over_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    assert numbered_paths(path, 1) == [path]
    path.touch()
    (tmp_path / "a-1.png").touch()
    assert [p.name for p in numbered_paths(path, 1)] == ["a-0.png"]
    assert [p.name for p in numbered_paths(path, 2)] == ["a-0.png", "a-2.png"]
    assert [p.name for p in numbered_paths(path, 2, overwrite=True)] == ["a-0.png", "a-1.png"]


def test_pictures_without_settings(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("not a picture")
    for name, message in (("plain.png", "carries no settings"), ("text.png", "not a picture"), ("no.png", "not exist")):
        with pytest.raises(InputError, match=message):
            read_parameters(tmp_path / name)


@pytest.mark.parametrize("letter", ["a", "🍎"])
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_a_prompt_of_100_000_characters(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, suffix: str, letter: str
) -> None:
    path = tmp_path / f"a{suffix}"
    long = dataclasses.replace(PARAMETERS, prompt=letter * 100_000, negative_prompt=letter * 100_000)
    with caplog.at_level(logging.WARNING):
        save_image(Image.new("RGB", (8, 8)), path, long)
    kept = 8000 if suffix == ".jpg" else 100_000
    lines = read_parameters(path).split("\n")
    assert lines == [letter * kept, f"Negative prompt: {letter * kept}", TEXT.split("\n")[2]]
    assert [record.getMessage() for record in caplog.records] == (
        [f"{path} holds the first 8000 characters of the prompt; PNG and WebP hold all"] if suffix == ".jpg" else []
    )


def test_a_folder_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "a.png"
    save_image(Image.new("RGB", (8, 8)), path, PARAMETERS)
    assert read_parameters(path) == TEXT
    with pytest.raises(OutputError, match="--overwrite"):
        save_image(Image.new("RGB", (8, 8)), path, PARAMETERS)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]


def test_a_text_chunk_that_unpacks_to_50_megabytes(tmp_path: Path) -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    path = tmp_path / "bomb.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0))
        + chunk(b"zTXt", b"parameters\0\0" + zlib.compress(b"a" * 50_000_000))
        + chunk(b"IEND", b"")
    )
    with pytest.raises(InputError, match="not a picture that can be read: Decompressed data too large"):
        read_parameters(path)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_damaged_pictures_are_input_errors(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    save_image(Image.new("RGB", (16, 16), "red"), path, PARAMETERS)
    whole, rng, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(300):
        damaged = bytearray(whole[: rng.choice((len(whole), rng.randrange(len(whole))))])
        for _ in range(min(len(damaged), 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            read_parameters(path)
        except InputError:
            refused += 1
    assert refused > 90
