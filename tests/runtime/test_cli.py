"""The command line as a person meets it: real processes, exit codes, and what lands where."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


def run(*arguments: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "calotype.runtime", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)  # type: ignore[call-overload,no-any-return]


def one_line(result: subprocess.CompletedProcess[str], code: int, message: str) -> None:
    assert result.returncode == code, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_a_prompt_becomes_a_picture_that_says_how_it_was_made(tiny_bundle: Path, tmp_path: Path) -> None:
    picture = tmp_path / "apple.png"
    result = run("generate", "red apple", "-m", tiny_bundle, "-o", picture, "--seed", "0", "--steps", "2")
    assert (result.returncode, result.stdout) == (0, f"{picture}\n"), result.stderr
    info = run("info", picture)
    assert info.stdout.startswith("red apple\nSteps: 2, Sampler: ddim, CFG scale: 7.5, Seed: 0, Size: 32x32, Model: ")


def test_several_pictures_and_json(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "a-0.png").write_bytes(b"precious")
    result = run(
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
    assert len(value["timings"]["steps"]) == 2
    assert (tmp_path / "a-0.png").read_bytes() == b"precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-0.png", "a-1.png", "a-2.png"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--steps", "0"], 2, "num_inference_steps=0"),
        (["--steps", "-3"], 2, "num_inference_steps=-3"),
        (["--guidance-scale", "nan"], 2, "guidance_scale=nan"),
        (["--seed", str(2**64)], 2, "seed=18446744073709551616"),
        (["--scheduler", "magic"], 2, "valid: ddim, ddpm, dpmpp-2m, euler"),
        (["--backend", "vulkan"], 1, "valid: auto, cpu"),
        (["--width", "33"], 2, "width=33"),
        (["--steps", "many"], 2, "not a valid integer"),
        (["--model", "nothing"], 1, "there is no bundle 'nothing'"),
        (["--output", "x.gif"], 1, "valid: .png"),
        (["--output", "no/x.png"], 1, "does not exist"),
    ],
)
def test_bad_input(tiny_bundle: Path, tmp_path: Path, arguments: list[str], code: int, message: str) -> None:
    result = run("generate", "a", "--model", tiny_bundle, *arguments, cwd=tmp_path)
    one_line(result, code, message)
    assert list(tmp_path.iterdir()) == []


def test_odd_prompts_are_legal(tiny_bundle: Path, tmp_path: Path) -> None:
    assert run("generate", "", "-m", tiny_bundle, "--steps", "1", cwd=tmp_path).returncode == 0
    long = run("generate", "apple " * 17_000, "-m", tiny_bundle, "--steps", "1", cwd=tmp_path)
    assert long.returncode == 0
    assert "cut off from here" in long.stderr
    assert len(long.stderr) < 400


def test_ctrl_c_leaves_nothing(tiny_bundle: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "calotype.runtime", "generate", "a", "-m", str(tiny_bundle), "--steps", "500"]
    process = subprocess.Popen([*command, "--images", "1000"], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors.strip() == "calotype: interrupted"
    assert list(tmp_path.iterdir()) == []


def test_info_verify_and_doctor(tiny_bundle: Path) -> None:
    assert "networks:  text_encoder, unet" in run("info", tiny_bundle).stdout
    assert json.loads(run("info", tiny_bundle, "--json").stdout)["format_version"] == 1
    assert "files are intact" in run("verify", tiny_bundle).stdout
    findings = {item["backend"]: item for item in json.loads(run("doctor", "--json").stdout)["backends"]}
    assert findings["cpu"]["usable"]
    assert all(bool(item["advice"]) != item["usable"] for item in findings.values())
    text = run("doctor").stdout
    assert all(item["advice"] in text for item in findings.values())


def test_an_unknown_command_is_a_usage_error() -> None:
    one_line(run("paint"), 2, "No such command 'paint'")


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
