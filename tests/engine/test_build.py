"""Real TensorRT-RTX builds, which need no GPU."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import onnx
import onnx.helper
import pytest

from calotype.engine import build
from calotype.engine.build import Options, build_bundle, build_plan
from calotype.engine.profiles import default_profile
from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.errors import BackendError, BuildError, InputError, MissingPackageError
from calotype.runtime.sessions import libraries
from calotype.runtime.sessions.cuda import Gpu
from calotype.runtime.sessions.libraries import Library, load_library
from calotype.runtime.sessions.plans import cache_folder, describe_plan, list_plans


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CALOTYPE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def library() -> Library:
    return load_library("tensorrt-rtx")


def test_an_unknown_backend_lists_the_valid_ones() -> None:
    with pytest.raises(BackendError, match="valid: tensorrt, tensorrt-rtx"):
        load_library("tvm")


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(libraries.MODULES, "tensorrt", ("no_such_module", "nor_this_one"))
    with pytest.raises(MissingPackageError, match=r"-m pip install -e .*\[tensorrt\]"):
        load_library("tensorrt")


def test_every_network_of_talbot_builds(library: Library) -> None:
    bundle, lines, phases = Bundle.open("talbot"), [], []
    plans = build_bundle(bundle, backend="tensorrt-rtx", say=lines.append, progress=lambda _, part: phases.append(part))
    assert set(plans) == {"text_encoder", "unet", "vae_decoder", "vae_encoder"}
    assert phases
    assert all(0 < part <= 1 for part in phases)
    for name, path in plans.items():
        record, spec = describe_plan(path), bundle.manifest.networks[name]
        assert record.key["version"] == library.version
        assert [item["name"] for item in record.tensors["inputs"]] == [item.name for item in spec.inputs]
        assert [item["name"] for item in record.tensors["outputs"]] == [item.name for item in spec.outputs]
        assert {item["dtype"] for item in record.tensors["outputs"]} == {"float"}
    before = {path: path.stat().st_mtime_ns for path in plans.values()}
    assert build_bundle(bundle, backend="tensorrt-rtx") == plans
    assert {path: path.stat().st_mtime_ns for path in list_plans()} == before


@pytest.mark.usefixtures("library")
def test_two_profiles_lie_in_one_plan(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    profiles = [default_profile(bundle.manifest), default_profile(bundle.manifest, static=True)]
    plans = build_bundle(bundle, backend="tensorrt-rtx", profiles=profiles, networks=["vae_decoder"])
    record = describe_plan(plans["vae_decoder"])
    assert [item["name"] for item in record.key["profiles"]] == ["default", "static"]
    assert len(record.tensors["profiles"]) == 2


def test_what_the_bundle_lacks_is_named(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    with pytest.raises(InputError, match="no network 'unett'; valid: text_encoder"):
        build_bundle(bundle, backend="tensorrt-rtx", networks=["unett"])
    with pytest.raises(InputError, match="no int8 graph; valid: float32"):
        build_bundle(bundle, backend="tensorrt-rtx", options=Options(precision="int8"))


@pytest.mark.usefixtures("library")
def test_another_builder_builds_again(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, lines = Bundle.open(tiny_bundle), []
    build_bundle(bundle, backend="tensorrt-rtx", networks=["vae_decoder"])
    source = tmp_path / "build.py"
    source.write_text(Path(build.__file__).read_text() + "\n# another flag\n")
    monkeypatch.setattr(build, "__file__", str(source))
    build_bundle(bundle, backend="tensorrt-rtx", networks=["vae_decoder"], say=lines.append)
    assert any("these changed: builder" in line for line in lines)


@pytest.mark.usefixtures("library")
def test_a_full_disk_is_refused_before_the_build(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("calotype.engine.build.KERNELS", 1 << 60)
    with pytest.raises(BuildError, match="free some space"):
        build_bundle(Bundle.open(tiny_bundle), backend="tensorrt-rtx")
    assert list_plans() == []


@pytest.mark.usefixtures("library")
def test_plans_that_are_there_need_no_more_disk(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(tiny_bundle)
    built = build_bundle(bundle, backend="tensorrt-rtx", networks=["vae_decoder"])
    monkeypatch.setattr("calotype.engine.build.KERNELS", 1 << 60)
    lines: list[str] = []
    assert build_bundle(bundle, backend="tensorrt-rtx", networks=["vae_decoder"], say=lines.append) == built
    assert any(line.startswith("disk: about 0 MiB") for line in lines)
    assert "time: none, all plans are there" in lines
    for options, networks in ((None, ["vae_decoder", "unet"]), (Options(force=True), ["vae_decoder"])):
        with pytest.raises(BuildError, match="free some space"):
            build_bundle(bundle, backend="tensorrt-rtx", networks=networks, options=options)
    built["vae_decoder"].write_bytes(b"cut off")
    with pytest.raises(BuildError, match="free some space"):
        build_bundle(bundle, backend="tensorrt-rtx", networks=["vae_decoder"])


@pytest.mark.usefixtures("library")
def test_a_gpu_too_small_for_the_largest_network_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(name="Small", capability="sm80", driver="13000", memory=1 << 20)
    monkeypatch.setattr("calotype.engine.build._gpu", lambda *_: gpu)
    with pytest.raises(BuildError, match="Small has 1 MiB of memory and the largest plan alone needs"):
        build_bundle(Bundle.open("talbot"), backend="tensorrt-rtx")
    assert list_plans() == []


def test_an_unsupported_operator_is_named_with_its_node(library: Library, tmp_path: Path) -> None:
    value = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("NoSuchOperator", ["x"], ["y"], name="block/strange", domain="org.example")
    graph = onnx.helper.make_graph([node], "g", [value("x", 1, [1, 4])], [value("y", 1, [1, 4])])
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("org.example", 1)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets), tmp_path / "g.onnx")
    with pytest.raises(BuildError, match=r"operator NoSuchOperator \(node 'block/strange' of g\.onnx"):
        build_plan(library, tmp_path / "g.onnx", [])


def test_a_file_that_is_no_graph(library: Library, tmp_path: Path) -> None:
    (tmp_path / "g.onnx").write_bytes(b"nothing of the kind")
    with pytest.raises(BuildError, match=r"g\.onnx"):
        build_plan(library, tmp_path / "g.onnx", [])


@pytest.mark.slow
@pytest.mark.usefixtures("library")
def test_a_unet_of_the_real_size_builds_in_float16(tmp_path: Path) -> None:
    """860 million random weights; 6 GB of memory while it builds."""
    make = f"import benchmarks.checkpoints as c; c.make('sd1', {str(tmp_path / 'checkpoint')!r})"
    subprocess.run([sys.executable, "-c", make], check=True)
    calotype = [sys.executable, "-m", "calotype.runtime"]
    subprocess.run([*calotype, "export", tmp_path / "checkpoint", tmp_path / "bundle"], check=True)
    bundle = Bundle.open(tmp_path / "bundle")
    weights = bundle.manifest.files["unet.safetensors"].size
    for network in ("unet", "unet_control", "unet_image_prompt"):
        record = describe_plan(build_bundle(bundle, backend="tensorrt-rtx", networks=[network])[network])
        assert record.key["precision"] == "float16"
        assert weights < record.size < 1.1 * weights
        assert record.figures["activations"] > 0


@pytest.mark.usefixtures("library")
def test_ctrl_c_stops_the_build_and_leaves_no_plan(tiny_bundle: Path) -> None:
    sent = threading.Event()

    def progress(*_: object) -> None:
        if not sent.is_set():
            sent.set()
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        build_bundle(Bundle.open(tiny_bundle), backend="tensorrt-rtx", networks=["unet"], progress=progress)
    assert sent.is_set()
    assert not list(cache_folder().iterdir())
