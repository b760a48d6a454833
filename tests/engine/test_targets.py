"""Plans for GPUs that are not here: TensorRT-RTX's real builds, and a stand-in for what only TensorRT has."""

from __future__ import annotations

import dataclasses
import enum
from pathlib import Path
from typing import Any

import pytest

from calotype.engine.build import Options, build_bundle
from calotype.engine.targets import aim, check_targets, known_targets, parse_targets
from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.errors import InputError
from calotype.runtime.sessions.cuda import Gpu
from calotype.runtime.sessions.libraries import Library, load_library
from calotype.runtime.sessions.plans import describe_plan, gpu_differences, list_plans, target_of
from tests.runtime.command_line import calotype

GPU = Gpu(name="NVIDIA H100", capability="sm90", driver="13000", memory=80 << 30)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CALOTYPE_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no compute capability"),
        ("sm86,", "no compute capability"),
        ("8.6", "no compute capability; valid: those of GPUs, as in sm86,sm89,sm120"),
        ("rtx4090", "no compute capability"),
        ("sm86,sm89,sm86", "sm86 is named twice"),
    ],
)
def test_what_is_no_target(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_targets(text)


def test_targets_are_sorted_by_generation_so_that_their_order_builds_nothing_again() -> None:
    assert parse_targets("SM120, sm86,sm89") == ("sm86", "sm89", "sm120") == parse_targets("sm89,sm120,sm86")


def test_tensorrt_rtx_is_set_to_the_targets_and_refuses_those_it_does_not_know() -> None:
    real = load_library("tensorrt-rtx")
    config = real.api.Builder(real.logger).create_builder_config()
    every = known_targets(real)
    assert {"sm75", "sm86", "sm89", "sm120"} <= set(every)
    check_targets(real, every, None)
    aim(real, config, every)
    found = [config.get_compute_capability(index).name.lower() for index in range(config.num_compute_capabilities)]
    assert found == every
    with pytest.raises(InputError, match=r"builds no plan for sm90; valid: sm75, sm80, sm86"):
        check_targets(real, ("sm86", "sm90"), None)


def test_a_plan_for_three_kinds_of_gpu_is_built_without_one(tiny_bundle: Path) -> None:
    arguments = ["build", tiny_bundle, "--backend", "tensorrt-rtx", "--network", "vae_decoder"]
    printed = calotype(*arguments, "--for", "sm120,sm86,sm89").stdout.strip()
    record = describe_plan(Path(printed))
    assert (record.key["targets"], record.key["gpu"]) == (["sm86", "sm89", "sm120"], "portable")
    assert target_of(record.key) == "sm86, sm89, sm120"
    assert "for:        sm86, sm89, sm120, driver none" in calotype("info", printed).stdout
    assert "MiB, float16, for sm86, sm89, sm120, profiles default" in calotype("build", "--list").stdout
    assert calotype(*arguments, "--for", "sm86,sm89,sm120").stdout.strip() == printed
    assert list_plans() == [Path(printed)]
    refused = calotype(*arguments, "--for", "sm90")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)


@pytest.mark.parametrize(
    ("gpu", "driver", "differences"),
    [
        ("NVIDIA GeForce RTX 4090 sm89", "13000", []),
        ("NVIDIA GeForce RTX 4090 sm89", "13010", []),
        ("NVIDIA H200 sm90", "13000", ["it is for GPUs of sm86, sm89, here is NVIDIA H200 sm90"]),
        ("NVIDIA A10 sm86", "12080", ["it needs driver 13000 or a later one, here is 12080"]),
    ],
)
def test_why_a_carried_plan_does_not_fit(gpu: str, driver: str, differences: list[str]) -> None:
    key = {"gpu": "portable", "driver": "13000", "hardware_compatible": False, "targets": ["sm86", "sm89"]}
    assert gpu_differences(key, gpu, driver) == differences


class TensorRt:
    """What stands for ``tensorrt``, as far as hardware compatibility goes."""

    __version__ = "11.4"

    class HardwareCompatibilityLevel(enum.Enum):
        NONE = 0
        AMPERE_PLUS = 1
        SAME_COMPUTE_CAPABILITY = 2

    hardware_compatibility_level: Any = HardwareCompatibilityLevel.NONE


@pytest.mark.parametrize(
    ("here", "targets", "level"),
    [
        ("sm90", ("sm90",), "SAME_COMPUTE_CAPABILITY"),
        ("sm75", ("sm75",), "SAME_COMPUTE_CAPABILITY"),
        ("sm90", ("sm86", "sm89", "sm90"), "AMPERE_PLUS"),
        ("sm90", ("sm89",), None),
        ("sm90", ("sm75", "sm90"), None),
        ("sm75", ("sm86", "sm89"), None),
    ],
)
def test_tensorrt_builds_for_its_own_generation_or_from_ampere_on(
    here: str, targets: tuple[str, ...], level: str | None
) -> None:
    library, config = Library(name="tensorrt", api=TensorRt, version="11.4", logger=None), TensorRt()
    gpu = dataclasses.replace(GPU, capability=here)
    if level is None:
        with pytest.raises(InputError, match=f"cannot be built on {here}; name {here} alone"):
            check_targets(library, targets, gpu)
        return
    check_targets(library, targets, gpu)
    aim(library, config, targets)
    known = TensorRt.HardwareCompatibilityLevel
    # One target needs no more than its own generation, which costs less speed than all from Ampere on.
    assert config.hardware_compatibility_level is known[level]


def test_an_unknown_target_builds_nothing(tiny_bundle: Path) -> None:
    with pytest.raises(InputError, match="builds no plan for sm90"):
        build_bundle(Bundle.open(tiny_bundle), backend="tensorrt-rtx", options=Options(targets=("sm90",)))
    assert list_plans() == []
