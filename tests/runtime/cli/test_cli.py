"""The command line as a person meets it: exit codes, and what lands where; in real processes where those matter."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from calotype.runtime.pipeline import Pipeline
from tests.runtime.command_line import calotype


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """A process of its own."""
    command = [sys.executable, "-m", "calotype.runtime", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_prompt_becomes_a_picture_that_says_how_it_was_made(tiny_bundle: Path, tmp_path: Path) -> None:
    picture = tmp_path / "apple.png"
    result = run("generate", "red apple", "-m", tiny_bundle, "-o", picture, "--seed", "0", "--steps", "2")
    assert (result.returncode, result.stdout) == (0, f"{picture}\n"), result.stderr
    info = calotype("info", picture)
    assert info.stdout.startswith(
        "red apple\nSteps: 2, Sampler: ddim, CFG scale: 7.5, Seed: 0, Size: 32x32, Model hash: "
    )


def test_several_pictures_and_json(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "a-0.png").write_bytes(b"precious")
    result = calotype(
        "generate",
        "a",
        "-m",
        tiny_bundle,
        "-o",
        tmp_path / "a.png",
        "--images",
        "2",
        "--steps",
        "1",
        "--seed",
        "9",
        "--json",
    )
    value = json.loads(result.stdout)
    assert [(Path(image["path"]).name, image["seed"]) for image in value["images"]] == [("a-1.png", 9), ("a-2.png", 10)]
    assert len(value["timings"]["runs"]) == 1  # small pictures share it
    assert (tmp_path / "a-0.png").read_bytes() == b"precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-0.png", "a-1.png", "a-2.png"]
    # Another process, one picture alone: the same file, byte by byte.
    run("generate", "a", "-m", tiny_bundle, "-o", tmp_path / "b.png", "--steps", "1", "--seed", "10")
    assert (tmp_path / "b.png").read_bytes() == (tmp_path / "a-2.png").read_bytes()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with a picture, and a mask that is white in the middle."""
    Image.linear_gradient("L").resize((48, 32)).save(tmp_path / "in.png")
    mask = Image.new("L", (48, 32))
    mask.paste(255, (8, 6, 32, 24))
    mask.save(tmp_path / "mask.png")
    return tmp_path


def test_every_option_reaches_the_pipeline_and_the_file(tiny_bundle: Path, pictures: Path) -> None:
    result = calotype(
        *("generate", "(red:1.2) apple", "-m", tiny_bundle, "-o", "out.png", "--seed", "5", "--steps", "4"),
        *("--image", "in.png", "--strength", "0.5", "--mask", "mask.png", "--feather", "2"),
        *("--scheduler", "euler", "--karras", "--guidance-scale", "3,5", "--images", "2"),
        *("--guidance-rescale", "0.5", "--guidance-interval", "0.1", "9", "--clip-skip", "1"),
        cwd=pictures,
    )
    assert (result.returncode, result.stdout) == (0, "out-0.png\nout-1.png\n"), result.stderr
    text = calotype("info", pictures / "out-1.png").stdout
    assert text.startswith(
        "(red:1.2) apple\nSteps: 4, Sampler: euler, CFG scale: 5, Seed: 6, Size: 48x32, Model hash: "
    )
    assert ", Schedule type: karras, CFG rescale: 0.5, CFG interval: 0.1 9, Clip skip: 2, Image: in.png, " in text
    assert ", Denoising strength: 0.5, Mask: mask.png, Mask hash: " in text
    assert ", Feather: 2, Version: calotype " in text
    settings: dict[str, Any] = {"image": pictures / "in.png", "mask_image": pictures / "mask.png"}
    settings |= {"strength": 0.5, "feather": 2, "scheduler": "euler", "num_inference_steps": 4, "clip_skip": 1}
    settings |= {"scheduler_config": {"sigma_spacing": "karras"}, "guidance_rescale": 0.5}
    with Pipeline.load(tiny_bundle) as pipeline:
        again = pipeline("(red:1.2) apple", seed=6, guidance_scale=5, guidance_interval=(0.1, 9), **settings).images[0]
    with Image.open(pictures / "out-1.png") as written:
        assert written.convert("RGB").tobytes() == again.tobytes()


def test_a_file_of_settings_says_what_the_command_line_does_not(tiny_bundle: Path, pictures: Path) -> None:
    (pictures / "a.toml").write_text(
        f'prompt = "red apple"\nmodel = "{tiny_bundle}"\nsteps = 3\nseed = 4\nguidance_scale = [2.5]\n'
        'guidance-interval = [0.5, 5.0]\nsigmas = [9.0, 2.0, 0.0]\nscheduler = "euler"\njson = true\n'
    )
    arguments = ("--config", "a.toml", "-o", "out.png", "--seed", "7")
    result = calotype("generate", *arguments, "--steps", "2", cwd=pictures)
    assert result.returncode == 0, result.stderr
    assert [image["seed"] for image in json.loads(result.stdout)["images"]] == [7]
    text = calotype("info", pictures / "out.png").stdout
    assert text.startswith("red apple\nSteps: 2, Sampler: euler, CFG scale: 2.5, Seed: 7, ")
    assert ", Sigmas: 9 2 0, CFG interval: 0.5 5, " in text


def test_odd_prompts_are_legal(tiny_bundle: Path, tmp_path: Path) -> None:
    assert calotype("generate", "", "-m", tiny_bundle, "--steps", "1", cwd=tmp_path).returncode == 0
    long = calotype("generate", "apple " * 3_000, "-m", tiny_bundle, "--steps", "1", cwd=tmp_path)
    assert long.returncode == 0
    assert "cut off from here" in long.stderr
    assert len(long.stderr) < 400


def test_ctrl_c_leaves_nothing(tiny_bundle: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "calotype.runtime", "generate", "a", "-m", str(tiny_bundle), "--steps", "500"]
    process = subprocess.Popen([*command, "--images", "1000"], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and "onnxruntime" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 130
    assert errors.strip() == "calotype: interrupted"
    assert list(tmp_path.iterdir()) == []


def test_info_verify_and_doctor(tiny_bundle: Path) -> None:
    assert "networks:  text_encoder, unet" in calotype("info", tiny_bundle).stdout
    assert json.loads(calotype("info", tiny_bundle, "--json").stdout)["format_version"] == 2
    assert "files are intact" in calotype("verify", tiny_bundle).stdout
    findings = {item["backend"]: item for item in json.loads(calotype("doctor", "--json").stdout)["backends"]}
    assert findings["cpu"]["usable"]
    assert all(bool(item["advice"]) != item["usable"] for item in findings.values())
    text = calotype("doctor").stdout
    assert all(item["advice"] in text for item in findings.values())


def test_help_imports_no_engine() -> None:
    script = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "from calotype.runtime.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'onnxruntime', 'tensorrt', 'tensorrt_rtx', 'numpy', 'PIL', 'tokenizers'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "generate" in result.stdout


def test_generate_runs_without_pytorch(tiny_bundle: Path, tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "for name in ('torch', 'onnx', 'transformers', 'diffusers', 'safetensors'): sys.modules[name] = None\n"
        "from calotype.runtime.cli import main\n"
        f"main(['generate', 'a', '-m', {str(tiny_bundle)!r}, '--steps', '1', '-o', 'a.png'])\n"
    )
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert result.returncode == 0, result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
