"""What a command line can be given that cannot be: one line that says what to do, an exit code, and nothing written."""

from __future__ import annotations

import errno
import json
import resource
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image
from safetensors.numpy import save_file

from calotype.runtime.bundle.manifest import FileRecord
from calotype.runtime.cli.main import run
from calotype.runtime.errors import BackendError, InputError
from calotype.runtime.pipeline import Pipeline

# One line for a command: its exit code, and what it has to say on stderr.
Refused = Callable[..., None]


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs ``calotype`` in a folder whose files have to stay as they are."""
    monkeypatch.chdir(tmp_path)

    def contents() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def check(code: int, message: str, *arguments: str | Path) -> None:
        before = contents()
        assert run([str(argument) for argument in arguments]) == code
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith("calotype: ") and said.err.endswith("\n") and said.err.count("\n") == 1, said.err
        assert message in said.err
        assert len(said.err) < 2500 and "\x1b" not in said.err
        assert contents() == before

    return check


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--steps", "0"], 2, "num_inference_steps=0 is outside 1..1000; 20 is a good start"),
        (["--steps", "-3"], 2, "num_inference_steps=-3 is outside 1..1000"),
        (
            ["--steps", "many"],
            2,
            "Invalid value for '--steps': 'many' is not a valid integer; see calotype generate --h",
        ),
        (["--stepps", "2"], 2, "No such option '--stepps'"),
        (["--guidance-scale", "nan"], 2, "guidance_scale=nan is not a finite number"),
        (["--guidance-scale", "3,x"], 2, "'3,x' is no number, and no numbers with commas between them"),
        (["--guidance-scale", "3,4"], 2, "2 guidance scales for 1 image(s); give one, or one for each image"),
        (["--guidance-interval", "5", "1"], 2, "is no range of noise levels; use 0 <= low < high"),
        (["--seed", str(2**64)], 2, "seed=18446744073709551616 is outside 0..2**64-1"),
        (["--seed", "-1"], 2, "seed=-1 is outside 0..2**64-1"),
        (["--seed", str(2**64 - 1), "--images", "2"], 2, "is outside 0..2**64-1 for 2 image(s)"),
        (["--images", "0"], 2, "num_images_per_prompt=0 is less than 1; use 1 or more"),
        (["--scheduler", "magic"], 2, "there is no scheduler 'magic'; valid: ddim, ddpm, "),
        (["--backend", "vulkan"], 1, "there is no backend 'vulkan'; valid: auto, tensorrt, tensorrt-rtx, cuda, cpu"),
        (["--width", "33"], 2, "width=33 is not a positive multiple of 2; use 32"),
        (["--height", "-8"], 2, "height=-8 is not a positive multiple of 2; use 2"),
        (["--width", "100000"], 2, "width=100000 is more than 16384 pixels"),
        (["--scheduler", "pndm", "--steps", "3"], 2, "num_inference_steps=3 is too few for pndm"),
        (["--scheduler", "euler", "--sigmas", "magic"], 2, "'magic'"),
        (["--scheduler", "ddim", "--karras"], 2, "ddim has no sigma_spacing; those that do: deis, "),
        (["--sigmas", "ays-sd1", "--karras"], 2, "--karras and --sigmas exclude each other"),
        (["--clip-skip", "9"], 2, "clip_skip=9 is more than the 3 layers"),
        (["--target-size", "8", "8"], 2, "target_size is for SDXL models"),
        (["--model", "nothing"], 1, "there is no bundle 'nothing'; bundled models: talbot"),
        (["--model", "."], 1, ". is not a bundle: it has no calotype.json; a checkpoint becomes one with"),
        (["--vae", "nothing"], 1, "there is no bundle 'nothing'"),
        (["--lora", "no.safetensors:0.8"], 2, "no.safetensors does not exist"),
        (["--embedding", "no.safetensors"], 2, "no.safetensors does not exist"),
        (["--config", "no.toml"], 2, "no.toml does not exist"),
        (["--image", "no.png"], 2, "no.png does not exist"),
        (["--strength", "0.5"], 2, "strength is about a picture, and there is none; give image too"),
        (["--mask", "mask.png"], 2, "mask_image is about a picture, and there is none; give image too"),
    ],
)
def test_arguments(tiny_bundle: Path, refused: Refused, arguments: list[str], code: int, message: str) -> None:
    refused(code, message, "generate", "a", "--model", tiny_bundle, *arguments)


def test_commands(refused: Refused) -> None:
    refused(2, "No such command 'paint'; see calotype --help", "paint")
    refused(2, "Missing argument 'PROMPT'; see calotype generate --help", "generate")
    refused(2, "Got unexpected extra argument (apple)", "generate", "red", "apple")
    refused(1, "there is no bundle 'nothing'", "info", "nothing")
    refused(2, "no.png does not exist", "info", "no.png")
    refused(1, "there is no bundle 'nothing'", "verify", "nothing")


def test_a_prompt_that_is_not_unicode(tiny_bundle: Path, refused: Refused) -> None:
    refused(2, r"'a\udcff' is not valid Unicode; give it as UTF-8", "generate", "a\udcff", "--model", tiny_bundle)


def spoil_weights(bundle: Path) -> str:
    path = bundle / "unet.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return "unet.safetensors has "


def spoil_a_byte(bundle: Path) -> str:
    path = bundle / "unet.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    return "unet.safetensors is corrupt: its sha256 is not the manifest's; copy or export the bundle again"


def remove_a_file(bundle: Path) -> str:
    (bundle / "unet.fp32.onnx").unlink()
    return "unet.fp32.onnx is missing from the bundle; copy or export the bundle again"


def edit(bundle: Path, **changes: object) -> None:
    path = bundle / "calotype.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sha256": None} | changes))


def make_it_newer(bundle: Path) -> str:
    edit(bundle, format_version=3)
    return "calotype.json has format version 3, this Calotype reads 1 and 2; export the bundle again or install"


def cut_the_manifest(bundle: Path) -> str:
    path = bundle / "calotype.json"
    path.write_text(path.read_text()[:100])
    return "calotype.json cannot be read: "


def read_elsewhere(bundle: Path) -> str:
    path = bundle / "unet.fp32.onnx"
    model = onnx.load(path, load_external_data=False)
    weight = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    next(entry for entry in weight.external_data if entry.key == "location").value = "../secret"
    path.write_bytes(model.SerializeToString())
    record = FileRecord.of(path)
    files = json.loads((bundle / "calotype.json").read_text())["files"]
    edit(bundle, files=files | {path.name: {"size": record.size, "sha256": record.sha256}})
    return "unet.fp32.onnx reads ../secret, which is not one of its weights files (unet.safetensors); do not use"


@pytest.mark.parametrize(
    "spoil", [spoil_weights, spoil_a_byte, remove_a_file, make_it_newer, cut_the_manifest, read_elsewhere]
)
def test_bundles(tiny_bundle: Path, tmp_path: Path, refused: Refused, spoil: Callable[[Path], str]) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    message = spoil(bundle)
    for command in (("generate", "a", "--model"), ("info",), ("verify",)):
        refused(1, message, *command, bundle)


def test_a_checkpoint_is_no_bundle_yet(tmp_path: Path, refused: Refused) -> None:
    save_file({"a": np.zeros(1)}, tmp_path / "v1-5.safetensors")
    message = "v1-5.safetensors is not a bundle: it is a file; a checkpoint becomes one with: calotype export"
    refused(1, message, "generate", "a", "--model", "v1-5.safetensors")


def test_pictures(tiny_bundle: Path, tmp_path: Path, refused: Refused) -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    (tmp_path / "text.png").write_text("a red apple")
    Image.new("RGB", (48, 32), "red").save(tmp_path / "in.png")
    Image.new("L", (32, 48), 255).save(tmp_path / "turned.png")
    Image.new("L", (48, 32)).save(tmp_path / "black.png")
    generate = ("generate", "a", "--model", tiny_bundle, "--image")
    refused(2, "bomb.png has more than 67108864 pixels; scale it down first", *generate, "bomb.png")
    refused(2, "bomb.png has more than 67108864 pixels", *generate, "in.png", "--mask", "bomb.png")
    refused(2, "text.png is not a picture that can be read", *generate, "text.png")
    refused(2, "text.png is not a picture that can be read", "info", "text.png")
    (tmp_path / "x.gif").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")
    refused(2, "x.gif is not a picture that can be read; PNG, JPEG, WebP, AVIF, TIFF, BMP and GIF are", "info", "x.gif")
    refused(2, "no.gif does not exist", "info", "no.gif")
    refused(2, "x.gif is not a picture that can be read", *generate, "x.gif")
    refused(2, "in.png carries no settings; pictures made by Calotype or AUTOMATIC1111 do", "info", "in.png")
    refused(2, "strength=1.2 is outside 0..1; use 1", *generate, "in.png", "--strength", "1.2")
    refused(2, "strength=0.01 leaves no step of 50", *generate, "in.png", "--strength", "0.01")
    refused(2, "the mask has 32x48 pixels and the picture 48x32", *generate, "in.png", "--mask", "turned.png")
    refused(2, "the mask is black all over", *generate, "in.png", "--mask", "black.png")
    refused(2, "feather is about a mask, and there is none", *generate, "in.png", "--feather", "3")


def test_additions(tiny_bundle: Path, tmp_path: Path, refused: Refused) -> None:
    sdxl = {
        f"lora_te2_text_model_encoder_layers_31_mlp_fc1.lora_{part}.weight": np.ones((2, 2)) for part in ("up", "down")
    }
    save_file(sdxl, tmp_path / "sdxl.safetensors")
    save_file({"emb_params": np.ones((1, 768), np.float32)}, tmp_path / "wide.safetensors")
    (tmp_path / "old.pt").write_bytes(b"")
    generate = ("generate", "a", "--model", tiny_bundle)
    message = (
        "sdxl.safetensors does not fit this model; 1 keys match nothing: lora_te2_text_model_encoder_layers_31_mlp_fc1"
    )
    refused(2, message, *generate, "--lora", "sdxl.safetensors:0.8")
    refused(2, "wide.safetensors is for another model: it has vectors", *generate, "--embedding", "wide.safetensors")
    refused(2, "old.pt is a pickle, which can hold code", *generate, "--embedding", "old.pt")
    refused(
        2,
        "talbot has latents of 16 channels, 8 pixels wide each; this model makes 4 channels, 2",
        *generate,
        "--vae",
        "talbot",
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("stepps = 3", "a.toml has unknown settings: stepps; valid: backend, cache-interval, "),
        ("config = 'b.toml'", "a.toml has unknown settings: config; valid: "),
        ("steps = 2.5", "'2.5' is not a valid integer"),
        ("steps = [1, 2]", "a.toml has a list for steps, which takes one value"),
        ("prompt = ['a', 'b']", "a.toml has a list for prompt, which takes one value"),
        ("guidance-interval = 3.0", "guidance-interval"),
        ("overwrite = 'maybe'", "'maybe' is not a valid boolean"),
        ("steps =", "a.toml is not a file of settings in TOML"),
    ],
)
def test_files_of_settings(tiny_bundle: Path, tmp_path: Path, refused: Refused, settings: str, message: str) -> None:
    (tmp_path / "a.toml").write_text(settings)
    refused(2, message, "generate", "a", "--model", tiny_bundle, "--config", "a.toml")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            BackendError("ONNX Runtime failed:\n\tFailed to allocate memory\n"),
            "ONNX Runtime failed: Failed to allocate",
        ),
        (MemoryError(), "there is not enough memory; use a smaller size, fewer images, --vae-tiling or --low-memory"),
        (PermissionError(13, "Permission denied", "unet.safetensors"), "unet.safetensors: Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device"), "calotype: No space left on device; free some space"),
        (
            OSError(errno.ENOLCK, "No locks available"),
            "No locks available; its file system has no locks; use a",
        ),
        (OSError(errno.EIO, "Input/output error"), "calotype: Input/output error"),
        (OSError("cannot open the device"), "calotype: cannot open the device"),
        (
            FileNotFoundError(2, "No usable temporary directory found in ['/tmp']"),
            "['/tmp']; set TMPDIR to a folder",
        ),
        (InputError(f"steps='{'9' * 10**7}' is \x1b[31m red\x07"), "999' is \\u001b[31m red\\u0007"),
    ],
)
def test_what_goes_wrong_underneath(
    monkeypatch: pytest.MonkeyPatch, refused: Refused, error: Exception, message: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(Pipeline, "load", fail)
    refused(1 + isinstance(error, InputError), message, "generate", "a")


def test_values_are_quoted_with_a_bound(refused: Refused) -> None:
    refused(
        2, "9' is not a valid integer; see calotype generate --help", "generate", "a", "--steps", "9x" * 10**6 + "9"
    )


def test_targets(tiny_bundle: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    generate = ("generate", "a", "--model", tiny_bundle, "--steps", "1", "--output")
    refused(1, "x.gif has no suffix that names a picture format; valid: .png, .jpg, .jpeg, .webp", *generate, "x.gif")
    refused(1, "no/x.png cannot be written: the folder no does not exist", *generate, "no/x.png")
    refused(1, "file/x.png cannot be written: the folder file does not exist", *generate, "file/x.png")
    refused(1, "folder is a folder; name a picture in it: folder/picture.png", *generate, "folder")
    refused(1, "/proc/x.png cannot be written: ", *generate, "/proc/x.png")


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_a_disk_that_is_full(tiny_bundle: Path, tmp_path: Path, name: str) -> None:
    """The system's own limit on the size of a file stands for it: a write fails in the middle."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))

    size = ("--steps", "1", "--width", "96", "--height", "96")
    command = [sys.executable, "-m", "calotype.runtime", "generate", "a", "-m", str(tiny_bundle), "-o", name, *size]
    result = subprocess.run(
        command, cwd=tmp_path, preexec_fn=limit, capture_output=True, text=True, timeout=600, check=False
    )
    assert (result.returncode, result.stdout) == (1, "")
    said, line = result.stderr.splitlines()
    assert said == "WARNING: 96x96 is far from the 32x32 of tiny itself; expect repeated or broken shapes"
    assert line == f"calotype: {name} cannot be written: File too large; choose another folder"
    assert list(tmp_path.iterdir()) == []


def test_results_that_nobody_can_take() -> None:
    for target, code, message in (
        ("/dev/full", 1, "calotype: the result cannot be printed: No space left on device\n"),
        (None, 1, ""),
    ):
        command = f"exec {sys.executable} -m calotype.runtime info"
        command += f" > {target}" if target is not None else " | exit"
        result = subprocess.run(
            ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=600, check=False
        )
        assert (result.returncode, result.stderr) == (code, message)
