"""Every kind of LyCORIS's modules, merged, against what LyCORIS itself computes with (recorded, and live)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from calotype.runtime.adapters.lora import Lora, merge

DATA = Path(__file__).parents[2] / "data/lycoris"
RECORDED = load_file(DATA / "merged.safetensors")
CASES = list(dict.fromkeys(key.partition("/")[0] for key in RECORDED))
SCALES = ("1", "0.7", "-0.5")
Tensors = dict[str, NDArray[Any]]


def part_of(case: str, part: str) -> Tensors:
    start = f"{case}/{part}."
    return {key.removeprefix(start): value for key, value in RECORDED.items() if key.startswith(start)}


def merged(tmp_path: Path, case: str, scale: float) -> tuple[Tensors, Tensors]:
    """The layer's own tensors, and those that changed."""
    base = part_of(case, "base")
    path = tmp_path / "a.safetensors"
    save_file({f"lora_unet_conv_in.{key}": value for key, value in part_of(case, "file").items()}, path)
    weights = {"unet": {f"conv_in.{name}": value for name, value in base.items()}}
    changed = merge([Lora(path=path, scale=scale)], weights)
    return base, {name.removeprefix("conv_in."): value for name, value in changed.get("unet", {}).items()}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("case", CASES)
def test_every_kind_equals_lycoris(tmp_path: Path, case: str, scale: str) -> None:
    expected = part_of(case, scale)
    if not expected:
        assert "dora" in case
        return
    base, changed = merged(tmp_path, case, float(scale))
    assert changed.keys() == expected.keys()
    for name, value in expected.items():
        assert np.abs(value - base[name]).max() > 0.05
        np.testing.assert_allclose(changed[name], value, rtol=0, atol=1e-5 * np.abs(value).max(), err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_nothing_of_it_changes_nothing(tmp_path: Path, case: str) -> None:
    assert merged(tmp_path, case, 0.0)[1] == {}


@pytest.mark.parametrize("case", [case for case in CASES if "dora" in case])
def test_less_of_a_dora_is_a_part_of_the_way(tmp_path: Path, case: str) -> None:
    base, whole = merged(tmp_path, case, 1.0)
    for scale in (0.3, -1.0):
        _, some = merged(tmp_path, case, scale)
        expected = base["weight"] + scale * (whole["weight"] - base["weight"])
        np.testing.assert_allclose(some["weight"], expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_the_order_of_adapters_does_not_matter(tmp_path: Path) -> None:
    base = {f"conv_in.{name}": value for name, value in part_of("dora", "base").items()}
    loras = []
    for case in ("dora", "oft", "loha", "boft"):
        path = tmp_path / f"{case}.safetensors"
        save_file({f"unet.conv_in.{key}": value for key, value in part_of(case, "file").items()}, path)
        loras.append(Lora(path=path, scale=0.5))
    one = merge(loras, {"unet": base})["unet"]["conv_in.weight"]
    other = merge(loras[::-1], {"unet": base})["unet"]["conv_in.weight"]
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-6 * np.abs(one).max())
    alone = [merge([lora], {"unet": base})["unet"]["conv_in.weight"] - base["conv_in.weight"] for lora in loras]
    np.testing.assert_allclose(one, base["conv_in.weight"] + sum(alone), rtol=0, atol=1e-5 * np.abs(one).max())


def recorder() -> ModuleType:
    pytest.importorskip("lycoris", reason="lycoris-lora, which recorded the expected values, is not installed")
    spec = importlib.util.spec_from_file_location("record", DATA / "record.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_record_is_what_lycoris_computes() -> None:
    recorded = recorder()
    import torch

    with torch.no_grad():
        for case in recorded.CASES:
            for key, value in recorded.record(case).items():
                np.testing.assert_allclose(RECORDED[key], value.numpy(), rtol=0, atol=1e-5, err_msg=key)
