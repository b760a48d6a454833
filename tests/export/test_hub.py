"""Repositories of the Hugging Face Hub: from a cache while offline, and from a server of their own that plays the Hub.

``huggingface_hub`` reads its environment once, when it is imported; so each case is a process.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from calotype.export.hub import download, is_repository
from calotype.export.sources import load_checkpoint
from calotype.runtime.errors import CheckpointError, MissingPackageError
from tests.export.conftest import write_json

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SCRIPT = """
import sys
from calotype.export.hub import download
from calotype.runtime.errors import CheckpointError
for source in sys.argv[1:]:
    try:
        print("folder", download(source))
    except CheckpointError as error:
        print("error", error)
"""
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
WEIGHTS = "diffusion_pytorch_model"
SHARDS = [f"{WEIGHTS}.fp16-0000{number}-of-00002.safetensors" for number in (1, 2)]


def resolve(*sources: str, **environment: str) -> list[tuple[str, str]]:
    """What ``download`` gives for each source: ("folder", its path) or ("error", the message)."""
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, *sources],
        env=os.environ | {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line.partition(" ") for line in ran.stdout.splitlines()]
    assert [kind for kind, _, _ in lines if kind not in ("folder", "error")] == []
    return [(kind, rest) for kind, _, rest in lines]


def test_what_is_spelt_like_a_repository() -> None:
    for source in ("owner/name", "stabilityai/sd-turbo@main", "a.b/c-d_1.5@refs/pr/1"):
        assert is_repository(source)
    for source in ("name", "./owner/name", "/owner/name", "~/name", "a/b/c", "owner/name@", "owner/"):
        assert not is_repository(source)


def test_a_cached_repository_resolves_offline_and_another_does_not(
    folder: Callable[[str], Path], tmp_path: Path
) -> None:
    cached = tmp_path / "hub" / "models--owner--small"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(COMMIT)
    shutil.copytree(folder("sd1"), cached / "snapshots" / COMMIT)
    partial = tmp_path / "hub" / "models--owner--partial"
    shutil.copytree(cached, partial)
    (partial / "snapshots" / COMMIT / "unet" / f"{WEIGHTS}.safetensors").unlink()
    offline = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    found, unknown, revision, half = resolve(
        "owner/small", "owner/unknown", "owner/small@other", "owner/partial", **offline
    )
    assert found == ("folder", str(cached / "snapshots" / COMMIT))
    for (kind, message), name, file in (
        (unknown, "owner/unknown", "model_index.json"),
        (revision, "owner/small", "model_index.json"),
        (half, "owner/partial", f"unet/{WEIGHTS}.safetensors"),
    ):
        assert (kind, message) == (
            "error",
            f"{name} is no folder here, and its {file} is not in the cache while HF_HUB_OFFLINE is set; "
            "unset it once, or give a folder or a file",
        )


def test_a_checkpoint_of_a_repository_names_it_and_its_commit(
    folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder("sd1"), tmp_path / COMMIT)
    monkeypatch.setattr("calotype.export.sources.download", lambda *_, **__: tmp_path / COMMIT)
    checkpoint = load_checkpoint("owner/small@main")
    assert checkpoint.source == {"layout": "diffusers", "name": "owner/small@main", "revision": COMMIT}


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingPackageError, match=r"-m pip install -e .*\[hub\]'"):
        download("owner/name")


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub as fetching single files takes."""

    root: Path
    fetched: list[str]

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        name, _, rest = self.path.lstrip("/").partition("/resolve/")
        revision, _, file = rest.partition("/")
        path = self.root / name / file
        if name == "owner/gated":
            return self._refuse(403, "GatedRepo")
        if not (self.root / name).is_dir():
            return self._refuse(404, "RepoNotFound")
        if revision not in ("main", COMMIT):
            return self._refuse(404, "RevisionNotFound")
        if not path.is_file():
            return self._refuse(404, "EntryNotFound")
        content = path.read_bytes()
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.fetched.append(f"{name}/{file}")
            self.wfile.write(content)
        return None

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, type[Hub]]]:
    """The address of a server of the files under ``served``, and what was fetched from it."""

    class Served(Hub):
        root = tmp_path / "served"
        fetched: list[str] = []  # noqa: RUF012

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Served) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", Served
        server.shutdown()
        thread.join()


def serve(root: Path, files: list[str], **contents: object) -> None:
    for file in files:
        write_json(root / file, contents.get(file, {"file": file}))


def test_no_more_is_fetched_than_an_export_reads(hub: tuple[str, type[Hub]], tmp_path: Path) -> None:
    address, served = hub
    needed = ["model_index.json", "scheduler/scheduler_config.json", "text_encoder/config.json", "unet/config.json"]
    needed += ["tokenizer/tokenizer_config.json", "tokenizer/vocab.json", "tokenizer/merges.txt", "vae/config.json"]
    both = [*needed, "text_encoder/model.safetensors", *(f"{name}/{WEIGHTS}.safetensors" for name in ("unet", "vae"))]
    surplus = ["model.ckpt", "v1.safetensors", "README.md", "text_encoder/pytorch_model.bin", f"unet/{WEIGHTS}.bin"]
    surplus += [f"unet/{WEIGHTS}.fp16.safetensors", f"unet/{WEIGHTS}.non_ema.safetensors", "safety_checker/config.json"]
    serve(served.root / "owner" / "both", [*both, *surplus], **{"model_index.json": INDEX})
    index = f"unet/{WEIGHTS}.safetensors.index.fp16.json"
    half = [*needed, "text_encoder/model.fp16.safetensors", f"vae/{WEIGHTS}.fp16.safetensors", index]
    half += [f"unet/{shard}" for shard in SHARDS]
    weight_map = {"weight_map": {str(number): shard for number, shard in enumerate(SHARDS)}}
    serve(served.root / "owner" / "half", half, **{"model_index.json": INDEX, index: weight_map})
    vae = ["config.json", f"{WEIGHTS}.safetensors"]
    serve(served.root / "owner" / "vae", vae)
    pickles = [*needed, "text_encoder/pytorch_model.fp16.bin", *(f"{name}/{WEIGHTS}.bin" for name in ("unet", "vae"))]
    serve(served.root / "owner" / "pickles", [*pickles, "v1.ckpt"], **{"model_index.json": INDEX})
    serve(served.root / "owner" / "none", needed, **{"model_index.json": INDEX})
    serve(served.root / "owner" / "single", ["v1.safetensors"])
    sources = ["both", "half@main", "vae", "pickles", "none", "single", "unknown", "gated", "both@old"]
    results = resolve(*(f"owner/{name}" for name in sources), HF_HOME=str(tmp_path / "home"), HF_ENDPOINT=address)
    for (kind, path), name, files in zip(
        results, ("both", "half", "vae", "pickles"), (both, half, vae, pickles), strict=False
    ):
        assert kind == "folder"
        assert Path(path) == tmp_path / "home" / "hub" / f"models--owner--{name}" / "snapshots" / COMMIT
        assert {file.relative_to(path).as_posix() for file in Path(path).rglob("*") if file.is_file()} == set(files)
        assert sorted(file for file in served.fetched if file.startswith(f"owner/{name}/")) == sorted(
            f"owner/{name}/{file}" for file in files
        )
        assert json.loads((Path(path) / files[-1]).read_text())["file"] == files[-1]
    messages = [message for kind, message in results[4:] if kind == "error"]
    for message, expected in zip(
        messages,
        (
            "owner/none has no text_encoder/model.safetensors; repositories in diffusers' layout are read, other",
            "owner/single has no model_index.json; repositories in diffusers' layout are read, other variants of",
            "owner/unknown is no folder here and no model on the Hugging Face Hub that you may read; check the",
            "owner/gated is gated; accept its terms at https://huggingface.co/owner/gated and log in",
            "owner/both has no revision 'old' on the Hugging Face Hub",
        ),
        strict=True,
    ):
        assert message.startswith(expected)


def test_a_variant_is_fetched_where_a_component_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = tmp_path / COMMIT
    files = [f"unet/{WEIGHTS}.bf16.safetensors", f"unet/{WEIGHTS}.safetensors", f"vae/{WEIGHTS}.safetensors"]
    files += ["text_encoder/model.safetensors", "text_encoder/config.json", "unet/config.json", "vae/config.json"]
    serve(served, ["model_index.json", *files], **{"model_index.json": INDEX})
    there = {path.relative_to(served).as_posix() for path in served.rglob("*") if path.is_file()}
    cache, fetched = tmp_path / "cache" / COMMIT, []

    def fetch(_: str, file: str, **__: object) -> str:
        if file not in there:
            raise LocalEntryNotFoundError(file)
        fetched.append(file)
        (cache / file).parent.mkdir(parents=True, exist_ok=True)
        return str(shutil.copy(served / file, cache / file))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert download("owner/name", "bf16") == cache
    weights = [file for file in fetched if file.endswith(".safetensors")]
    assert weights == ["text_encoder/model.safetensors", files[0], files[2]]


def test_a_hub_out_of_reach_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """``huggingface_hub`` tries for half a minute before it raises this."""

    def unreachable(*_: object, **__: object) -> None:
        raise LocalEntryNotFoundError("An error happened while trying to locate the file on the Hub")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(CheckpointError, match=r"owner/name is no folder here, and the Hugging Face Hub cannot be"):
        download("owner/name")
