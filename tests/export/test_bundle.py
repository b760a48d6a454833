"""The exporter: bundles from a checkpoint that diffusers wrote."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import onnx
import pytest

from calotype.export.bundle import export_checkpoint
from calotype.export.sources import load_checkpoint
from calotype.runtime.bundle import Bundle
from calotype.runtime.errors import CheckpointError, ExportError, UnsupportedArchitectureError


def test_every_graph_equals_its_module_to_1e4(tiny_bundle: Path) -> None:
    parity = Bundle.open(tiny_bundle).manifest.parity
    assert set(parity) == {"text_encoder", "unet", "vae_decoder", "vae_encoder"}
    assert all(0 < report["float32"]["max_relative"] <= 1e-4 for report in parity.values())


def test_weights_are_kept_once(tiny_bundle: Path) -> None:
    for graph in tiny_bundle.glob("*.onnx"):
        model = onnx.load(graph, load_external_data=False)
        inside = sum(len(tensor.raw_data) for tensor in model.graph.initializer if not tensor.external_data)
        assert inside < 10_000
        outside = [tensor for tensor in model.graph.initializer if tensor.external_data]
        assert outside
        assert all(not tensor.name.startswith("model.") for tensor in outside)
        assert graph.stat().st_size < 10_000_000
        assert b".py" not in graph.read_bytes()  # no stack traces of the machine that exported it


def test_attention_and_norms_are_single_nodes(tiny_bundle: Path) -> None:
    model = onnx.load(tiny_bundle / "unet.fp32.onnx", load_external_data=False)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("Attention") == 8
    assert kinds.count("GroupNormalization") > 0
    assert "InstanceNormalization" not in kinds
    assert "Softmax" not in kinds


def test_a_bundle_in_the_way_is_refused(tiny_checkpoint: Path, tiny_bundle: Path) -> None:
    before = (tiny_bundle / "calotype.json").read_bytes()
    with pytest.raises(ExportError, match="--force"):
        export_checkpoint(tiny_checkpoint, tiny_bundle)
    assert (tiny_bundle / "calotype.json").read_bytes() == before


def test_truncated_weights(tiny_checkpoint: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_checkpoint, broken)
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        export_checkpoint(broken, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == [broken]


def test_a_missing_key_is_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(tiny_checkpoint, broken)
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    del state["conv_in.bias"]
    save_file(state, weights)
    with pytest.raises(CheckpointError, match=r"1 missing: conv_in\.bias"):
        export_checkpoint(broken, tmp_path / "bundle")


def test_a_shard_index_that_points_outside(tiny_checkpoint: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_checkpoint, broken)
    index = broken / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    for text, message in (
        ("{", "not an index"),
        ("{}", "not an index"),
        ('{"weight_map": {"conv_in.bias": "../../x.safetensors"}}', "outside its folder"),
    ):
        index.write_text(text)
        with pytest.raises(CheckpointError, match=message):
            export_checkpoint(broken, tmp_path / "bundle")


def test_the_padding_token_of_the_special_tokens_map_wins(tiny_checkpoint: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_checkpoint, source)
    (source / "tokenizer" / "special_tokens_map.json").write_text('{"pad_token": {"content": "!"}}')
    tokenizer = load_checkpoint(source).tokenizer
    assert tokenizer is not None and tokenizer.pad_token == "!"


def test_another_pipeline_is_refused_by_name(tiny_checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_checkpoint, other)
    index = json.loads((other / "model_index.json").read_text())
    (other / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxPipeline"}))
    with pytest.raises(UnsupportedArchitectureError, match="FluxPipeline"):
        export_checkpoint(other, tmp_path / "bundle")
