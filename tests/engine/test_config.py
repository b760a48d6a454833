"""How a build is set up: TensorRT-RTX's real settings, and a stand-in for what only TensorRT has."""

from __future__ import annotations

import dataclasses
import enum
from pathlib import Path
from typing import Any

import pytest

from calotype.engine.build import Options, _config, _job, _key, _timing_cache, build_bundle
from calotype.engine.profiles import default_profile
from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.errors import InputError
from calotype.runtime.sessions.cuda import Gpu
from calotype.runtime.sessions.libraries import Library, load_library
from calotype.runtime.sessions.plans import WantedOnGpu, cache_folder, describe_plan

GPU = Gpu(name="NVIDIA H100", capability="sm90", driver="13000", memory=80 << 30)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CALOTYPE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "plans"


class TensorRt:
    """What stands for ``tensorrt``, as far as settings go. A timing cache is bytes that start with its version."""

    __version__ = "11.4"

    class HardwareCompatibilityLevel(enum.Enum):
        NONE = 0
        SAME_COMPUTE_CAPABILITY = 2

    class BuilderFlag(enum.Enum):
        VERSION_COMPATIBLE = 1
        STRIP_PLAN = 2
        REFIT = 3

    def __init__(self) -> None:
        self.hardware_compatibility_level = self.HardwareCompatibilityLevel.NONE
        self.flags: set[Any] = set()
        self.cache: bytes | None = None

    def create_builder_config(self) -> TensorRt:
        return self

    def set_flag(self, flag: Any) -> None:
        self.flags.add(flag)

    def create_timing_cache(self, data: bytes) -> bytes | None:
        return None if data == b"unreadable" else data or b"11.4:"

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if not cache.startswith(b"11.4:"):
            return False
        self.cache = cache
        return True

    def get_timing_cache(self) -> TensorRt:
        return self

    def serialize(self) -> bytes:
        assert self.cache is not None
        return self.cache + b"measured "


@pytest.fixture
def tensorrt() -> TensorRt:
    return TensorRt()


def library(api: TensorRt) -> Library:
    return Library(name="tensorrt", api=api, version=api.__version__, logger=None)


def test_plans_for_other_gpus_of_a_generation_are_tensorrts(tensorrt: TensorRt) -> None:
    _config(library(tensorrt), tensorrt, [], Options(hardware_compatible=True))
    assert tensorrt.hardware_compatibility_level is TensorRt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY
    plain = TensorRt()
    _config(library(plain), plain, [], Options(version_compatible=True, strip_weights=True))
    assert plain.hardware_compatibility_level is TensorRt.HardwareCompatibilityLevel.NONE
    assert plain.flags == set(TensorRt.BuilderFlag)


def test_the_key_of_such_a_plan_names_the_generation_and_another_gpu_of_it_is_served(tensorrt: TensorRt) -> None:
    bundle, options = Bundle.open("talbot"), Options(hardware_compatible=True)
    profiles = [default_profile(bundle.manifest)]
    job = _job(bundle, "unet", profiles, None)
    key = _key(bundle, library(tensorrt), job, profiles, options, GPU)
    assert (key["gpu"], key["driver"]) == ("sm90", "13000")
    here = WantedOnGpu(
        backend="tensorrt",
        version="11.4",
        graphs=(key["graph"],),
        weights=tuple(key["weights"]),
        gpu="NVIDIA H200 sm90",
        driver="13000",
    )
    assert here.differences(key) == []
    older = dataclasses.replace(here, gpu="NVIDIA A100 sm80")
    assert older.differences(key) == ["it is for the GPU sm90, here is sm80"]
    bound = _key(bundle, library(tensorrt), job, profiles, Options(), GPU)
    assert here.differences(bound) == ["it is for the GPU NVIDIA H100 sm90, here is NVIDIA H200 sm90"]


@pytest.mark.parametrize("kept", [None, b"unreadable", b"10.1:of another version"])
def test_a_timing_cache_that_is_refused_is_made_anew(tensorrt: TensorRt, folder: Path, kept: bytes | None) -> None:
    path = cache_folder() / "tensorrt-11.4-NVIDIA_H100_sm90.timing"
    if kept is not None:
        path.write_bytes(kept)
    with _timing_cache(library(tensorrt), tensorrt, GPU):
        assert tensorrt.cache == b"11.4:"
    assert path.read_bytes() == b"11.4:measured "
    with _timing_cache(library(tensorrt), tensorrt, GPU):
        assert tensorrt.cache == b"11.4:measured "
    assert path.read_bytes() == b"11.4:measured measured "
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent == folder


def test_tensorrt_rtx_takes_no_memory_of_its_own_while_it_runs() -> None:
    real = load_library("tensorrt-rtx")
    config = _config(real, real.api.Builder(real.logger), [], Options())
    assert config.get_flag(real.api.BuilderFlag.REQUIRE_USER_ALLOCATION)


def test_tensorrt_rtx_has_no_plans_for_later_versions_and_all_of_its_are_for_other_gpus(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    with pytest.raises(InputError, match="leave --version-compatible out"):
        build_bundle(bundle, backend="tensorrt-rtx", options=Options(version_compatible=True))
    plans = build_bundle(
        bundle, backend="tensorrt-rtx", networks=["vae_decoder"], options=Options(hardware_compatible=True)
    )
    key = describe_plan(plans["vae_decoder"]).key
    assert (key["hardware_compatible"], key["gpu"], key["driver"]) == (True, "portable", "none")
