"""What a bundle's networks take of a GPU's memory, as it is stated beforehand."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx
import pytest

from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.diagnostics.memory import Need, most, needs
from calotype.runtime.errors import BundleError
from calotype.runtime.graphs.files import weight_bytes

UNET = Need(network="unet", precision="float16", weights=100, activations=30)


def test_weights_are_those_that_a_graph_reads(tiny_bundle: Path) -> None:
    """Counted by the onnx package; encoder and decoder share one file, and each reads its part of it."""
    bundle = Bundle.open(tiny_bundle)
    found = {need.network: need for need in needs(bundle)}
    assert found.keys() == {"text_encoder", "unet", "vae_decoder", "vae_encoder"}
    for name, need in found.items():
        graph = onnx.load(tiny_bundle / bundle.manifest.networks[name].graphs[need.precision], load_external_data=False)
        lengths = [
            int(entry.value)
            for tensor in graph.graph.initializer
            for entry in tensor.external_data
            if entry.key == "length"
        ]
        assert need.weights == sum(lengths) > 0
        assert need.activations is None
    vae = bundle.manifest.files["vae.safetensors"].size
    assert 0.8 * vae < found["vae_decoder"].weights + found["vae_encoder"].weights < vae


def test_one_at_a_time_or_all() -> None:
    decoder = dataclasses.replace(UNET, network="vae_decoder", weights=20, activations=120)
    text = dataclasses.replace(UNET, network="text_encoder", weights=60, activations=None)
    assert most([text, UNET, decoder], low_memory=True) == 140
    assert most([text, UNET, decoder], low_memory=False) == 300


def test_a_graph_that_is_no_graph(tmp_path: Path) -> None:
    (tmp_path / "g.onnx").write_bytes(b"\x3a\xff\xff\xff\xff\x0f")
    with pytest.raises(BundleError, match="not an ONNX file"):
        weight_bytes(tmp_path / "g.onnx")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CALOTYPE_CACHE", str(tmp_path / "cache"))
