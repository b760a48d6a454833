"""``calotype export`` and ``calotype verify`` as a person meets them: real processes."""

from __future__ import annotations

import os
import pty
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from calotype.runtime.bundle.manifest import FileRecord, Manifest
from tests.runtime.command_line import Ran, calotype


@pytest.fixture(scope="module")
def exported(taesd_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ran]:
    """Its bundle, and what the command said."""
    bundle = tmp_path_factory.mktemp("bundles") / "taesd"
    return bundle, calotype("export", taesd_checkpoint, bundle)


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "calotype.runtime", *map(str, arguments)]


def one_line(result: Ran, message: str) -> None:
    assert result.returncode == 1, result.stderr
    assert result.stderr.splitlines()[-1].startswith("calotype: ")
    assert message in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_progress_is_on_stderr_and_the_result_on_stdout(
    exported: tuple[Path, Ran],
) -> None:
    bundle, result = exported
    assert (result.returncode, result.stdout) == (0, f"{bundle}: taesd, 2 networks\n"), result.stderr
    lines = result.stderr.splitlines()
    assert lines[0] == "vae: writing weights"
    assert "vae: checking vae_encoder in float16" in lines
    assert lines[-1] == "vae: done"


def test_a_terminal_sees_a_bar(taesd_checkpoint: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        command("export", taesd_checkpoint, tmp_path / "taesd", "--precision", "fp32"),
        stderr=theirs,
        stdout=subprocess.DEVNULL,
    ):
        os.close(theirs)
        seen = b""
        while True:
            try:
                seen += os.read(ours, 4096)
            except OSError:
                break
    os.close(ours)
    assert b"\rvae             [####                ] tracing vae_decoder" in seen
    assert seen.rstrip().endswith(b"[####################] done")


def test_ctrl_c_keeps_what_is_finished_and_nothing_that_looks_whole(taesd_checkpoint: Path, tmp_path: Path) -> None:
    with subprocess.Popen(
        command("export", taesd_checkpoint, tmp_path / "taesd"), stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if line == "vae: tracing vae_decoder\n":
                process.send_signal(signal.SIGINT)
    assert process.returncode == 130
    assert lines[-1] == "calotype: interrupted\n"
    assert [path.name for path in tmp_path.iterdir()] == [".taesd.partial"]
    assert not (tmp_path / ".taesd.partial" / "calotype.json").exists()


def test_a_folder_in_the_way(taesd_checkpoint: Path, tmp_path: Path) -> None:
    one_line(calotype("export", taesd_checkpoint, tmp_path, "--force"), f"{tmp_path} exists already")


def test_verify_compares_the_graphs(exported: tuple[Path, Ran], taesd_checkpoint: Path) -> None:
    result = calotype("verify", exported[0], "--against", taesd_checkpoint)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == f"{exported[0]}: 5 files are intact"
    assert [line.partition(":")[0] for line in lines[1:]] == [
        "vae_decoder, float16 graph",
        "vae_encoder, float16 graph",
        "vae_decoder, float32 against PyTorch",
        "vae_decoder, float16 against PyTorch",
        "vae_encoder, float32 against PyTorch",
        "vae_encoder, float16 against PyTorch",
    ]
    assert all(float(line.rpartition(" ")[2]) >= 0.9995 for line in lines[1:])


def test_verify_finds_a_graph_that_computes_something_else(exported: tuple[Path, Ran], tmp_path: Path) -> None:
    bundle = tmp_path / "taesd"
    shutil.copytree(exported[0], bundle)
    graph = onnx.load(bundle / "vae_decoder.fp16.onnx", load_external_data=False)
    next(node for node in graph.graph.node if node.op_type == "Relu").op_type = "Neg"
    onnx.save(graph, bundle / "vae_decoder.fp16.onnx")
    manifest = Manifest.read(bundle)
    files = {**manifest.files, "vae_decoder.fp16.onnx": FileRecord.of(bundle / "vae_decoder.fp16.onnx")}
    value = manifest.to_json() | {"files": {name: vars(record) for name, record in files.items()}}
    (bundle / "calotype.json").write_text(Manifest.from_json(value).dumps())
    one_line(calotype("verify", bundle), "vae_decoder, float16 graph has a cosine of ")


def test_verify_on_an_unknown_backend(exported: tuple[Path, Ran]) -> None:
    one_line(calotype("verify", exported[0], "--backend", "abacus"), "there is no backend 'abacus'; valid: auto, ")
