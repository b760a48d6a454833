"""What doctor says where an extra cannot be installed; which wheels there are is asked by ``make wheels``."""

from __future__ import annotations

import platform

import pytest

from calotype.runtime.diagnostics import doctor, platforms
from calotype.runtime.diagnostics.platforms import Platform, here, refusal
from calotype.runtime.errors import install_line

ORIN = Platform(machine="aarch64", glibc=(2, 35), jetson=True)


@pytest.mark.parametrize(
    ("backend", "machine", "message"),
    [
        ("tensorrt", ORIN, "which JetPack brings: make the environment with python3 -m venv --system-site-packages"),
        ("cuda", Platform(machine="aarch64", glibc=(2, 31)), "needs glibc 2.34, here is 2.31; use the CPU"),
        ("tensorrt-rtx", Platform(machine="aarch64", glibc=(2, 31)), "needs glibc 2.35, here is 2.31"),
        ("cpu", Platform(machine="riscv64", glibc=(2, 39)), "not supported on riscv64"),
        ("cpu", Platform(machine="aarch64", glibc=None), "need glibc"),
    ],
)
def test_what_cannot_be_installed_is_one_line(backend: str, machine: Platform, message: str) -> None:
    found = refusal(backend, machine)
    assert found is not None
    assert message in found
    assert "\n" not in found


@pytest.mark.parametrize("backend", ["cpu", "cuda", "tensorrt-rtx", "export"])
def test_what_has_wheels_is_not_refused(backend: str) -> None:
    assert refusal(backend, ORIN) is None
    assert refusal(backend, Platform(machine="x86_64", glibc=(2, 28))) is None


def test_this_machine_is_known() -> None:
    found = here()
    assert found.machine == platform.machine()
    assert found.glibc is None or found.glibc >= (2, 17)


def test_doctor_refuses_instead_of_naming_a_line_that_would_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor.PACKAGES, "tensorrt", {"no-such-distribution": "none"})
    for machine, refused in ((ORIN, True), (Platform(machine="x86_64", glibc=(2, 36)), False)):
        monkeypatch.setattr(doctor, "here", lambda machine=machine: machine)
        advice = next(item.advice for item in doctor.examine() if item.backend == "tensorrt")
        assert (advice == install_line("tensorrt")) is not refused
    assert platforms.JETSON.name == "nv_tegra_release"
