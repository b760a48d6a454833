"""Float16: the islands are where a measurement says, and without them the numbers break."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from calotype.export.families.sd import TextEncoderGraph
from calotype.export.families.sdxl import SdxlTextEncoderGraph
from calotype.export.graphs import GraphPlan, text_encoder_plan, vae_plans
from calotype.export.models.autoencoder import Autoencoder, AutoencoderConfig
from calotype.export.models.clip import TextEncoder, TextEncoderConfig
from calotype.export.models.layers import sinusoidal_embedding
from calotype.export.parity import check, run_graph, run_module
from calotype.export.precision import find_islands, measure, run_float16, write_float16, write_rounded
from calotype.export.tokenizer import Tokenizer
from calotype.export.tracing import write_graph
from calotype.export.weights import write_weights
from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.bundle.manifest import FileRecord
from calotype.runtime.bundle.parity import MIN_COSINE
from calotype.runtime.bundle.spec import TensorSpec
from calotype.runtime.errors import ExportError
from calotype.runtime.pipeline import Pipeline

VOCABULARY = ["a", "b", "c", "<|startoftext|>", "<|endoftext|>"]


class Loud(nn.Module):
    """A residual stream of magnitudes beyond float16's, normalised again: SDXL's autoencoder in small."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.up = nn.Conv2d(8, 8, 1)
        self.norm = nn.GroupNorm(2, 8)
        self.out = nn.Conv2d(8, 3, 1)
        nn.init.normal_(self.up.weight, std=2e4)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.conv(latents)
        out: Tensor = self.out(self.norm(x + self.up(x)))
        return out


class Clock(nn.Module):
    """The embedding of a timestep, before and after a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, latents: Tensor, timestep: Tensor) -> Tensor:
        embedding = sinusoidal_embedding(timestep, 16, flip_sin_to_cos=True, freq_shift=0)
        out: Tensor = self.linear(embedding)[:, :, None, None] + latents.mean(dim=1, keepdim=True)
        return out


class Peaked(nn.Module):
    """Attention whose logits are beyond float16's, with nothing large before or after it."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(4, 64)
        nn.init.normal_(self.query.weight, std=40)

    def forward(self, latents: Tensor) -> Tensor:
        tokens = latents.flatten(2).transpose(1, 2)  # (B, N, 4)
        query = self.query(tokens)[:, None]
        attended = torch.nn.functional.scaled_dot_product_attention(query, query, query * 0.01)[:, 0]
        return attended.transpose(1, 2).unflatten(2, latents.shape[-2:])


class Under(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, latents: Tensor, timestep: Tensor | None = None) -> Tensor:
        out: Tensor = self.model(latents) if timestep is None else self.model(latents, timestep)
        return out


def written(model: nn.Module, channels: int, folder: Path, *, timestep: bool = False) -> tuple[GraphPlan, Path]:
    """``model``'s float32 graph over float16 weights."""
    shape: tuple[int | str, ...] = ("batch", 4, "height", "width")
    inputs = [TensorSpec(name="latents", dtype="float32", shape=shape)]
    if timestep:
        inputs.append(TensorSpec(name="timestep", dtype="float32", shape=("batch",)))
    plan = GraphPlan(
        network="graph",
        component="graph",
        module=Under(model.eval()),
        inputs=tuple(inputs),
        outputs=(TensorSpec(name="image", dtype="float32", shape=("batch", channels, "height", "width")),),
    )
    write_weights(model, folder / "graph.safetensors", torch.float16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_graph(plan, folder / "graph.safetensors", folder / "graph.onnx")
    return plan, folder / "graph.onnx"


def kinds(graph: Path, names: set[str]) -> set[str]:
    return {node.op_type for node in onnx.load(graph, load_external_data=False).graph.node if node.name in names}


def test_what_overflows_is_an_island(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plan, graph = written(Loud(), 3, tmp_path)
    cases = plan.cases()
    expected = run_module(plan, cases)
    gauges = measure(graph, cases)
    assert max(gauge.largest for gauge in gauges.values()) > 65504
    islands = find_islands(graph, gauges)
    # The first and the last convolution stay in float16.
    assert kinds(graph, set(islands)) == {"Conv", "Add", "GroupNormalization"}
    assert len(islands) == 3
    assert check(plan, "float16", graph, run_float16(graph, islands, cases), expected).min_cosine > 0.9999
    with pytest.raises(
        ExportError, match=r"graph\.onnx .* gives values that are not finite in 'image' on 'random' inputs"
    ):
        check(plan, "float16", graph, run_float16(graph, [], cases), expected)


def loud_autoencoder() -> list[GraphPlan]:
    """Of odd widths, its stream beyond float16's end from the first resnet on, in both halves, as in SDXL's."""
    vae = Autoencoder(AutoencoderConfig(block_out_channels=(12, 24), layers_per_block=1, norm_num_groups=3)).eval()
    for resnet in (vae.encoder.down_blocks[0].resnets[0], vae.decoder.up_blocks[0].resnets[0]):
        nn.init.uniform_(resnet.conv2.weight, -5e4, 5e4)
    return vae_plans(vae)


def loud_tower(family: str) -> list[GraphPlan]:
    """OpenCLIP's of odd widths, whose feed-forward throws its stream beyond float16's end.

    In the second of Stable Diffusion 2's layers, and in SDXL's last, of which the UNet is only given the pooled end.
    """
    config = TextEncoderConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=42,
        intermediate_size=70,
        num_hidden_layers=3,
        num_attention_heads=3,
        max_position_embeddings=11,
        hidden_act="gelu",
        projection_dim=26,
        eos_token_id=4,
        with_projection=family == "sdxl",
    )
    tower = TextEncoder(config).eval()
    nn.init.uniform_(tower.text_model.encoder.layers[1 if family == "sd2" else 2].mlp.fc2.weight, -5e4, 5e4)
    vocab = json.dumps({token: index for index, token in enumerate(VOCABULARY)}).encode()
    tokenizer = Tokenizer(vocab=vocab, merges=b"", pad_token="a").fitted(tower)
    graph, unread = (SdxlTextEncoderGraph, 1) if family == "sdxl" else (TextEncoderGraph, 0)
    return [text_encoder_plan("text_encoder", graph, tower, tokenizer, unread)]


@pytest.mark.parametrize(
    ("network", "kind"),
    [
        ("vae_decoder", "vae"),
        ("vae_encoder", "vae"),
        ("text_encoder", "sd2"),
        ("text_encoder", "sdxl"),
    ],
)
def test_loud_networks_have_islands_and_their_numbers_stay(network: str, kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = loud_autoencoder() if kind == "vae" else loud_tower(kind)
    plan = next(plan for plan in made if plan.network == network)
    write_weights(plan.module.get_submodule("model"), tmp_path / f"{plan.component}.safetensors", torch.float16)
    graph = tmp_path / "graph.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_graph(plan, tmp_path / f"{plan.component}.safetensors", graph)
    cases = plan.cases()
    expected = run_module(plan, cases)
    gauges = measure(graph, cases)
    assert max(gauge.largest for gauge in gauges.values()) > 65504
    islands = find_islands(graph, gauges)
    assert len(islands) < 0.7 * len(gauges)
    norms = {"GroupNormalization", "LayerNormalization"}
    assert norms & kinds(graph, set(islands)) and norms & kinds(graph, gauges.keys() - islands.keys())
    assert check(plan, "float16", graph, run_float16(graph, islands, cases), expected).min_cosine >= MIN_COSINE
    with pytest.raises(ExportError, match=r"graph\.onnx .* gives values that are not finite in "):
        check(plan, "float16", graph, run_float16(graph, [], cases), expected)
    write_float16(graph, islands, tmp_path / "half.onnx")
    assert all(np.isfinite(output).all() for (output, *_) in run_graph(tmp_path / "half.onnx", cases).values())


def test_what_magnifies_rounding_is_an_island_with_all_that_feeds_it(tmp_path: Path) -> None:
    plan, graph = written(Clock(), 16, tmp_path, timestep=True)
    cases = {
        "random": {"latents": np.zeros((9, 4, 2, 2), np.float32), "timestep": np.linspace(0, 999, 9, dtype=np.float32)}
    }
    expected = run_module(plan, cases)
    islands = find_islands(graph, measure(graph, cases))
    assert {"Sin", "Cos", "Mul"} <= kinds(graph, set(islands))
    assert not {"Gemm", "MatMul", "Concat", "Add"} & kinds(graph, set(islands))
    assert check(plan, "float16", graph, run_float16(graph, islands, cases), expected).min_cosine > 0.999999
    with pytest.raises(ExportError, match=r"cosine of 0\.\d+ to the reference; 0.9995 is the least, in 'image'"):
        check(plan, "float16", graph, run_float16(graph, [], cases), expected)


def test_attention_with_large_logits_is_an_island(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plan, graph = written(Peaked(), 64, tmp_path)
    gauges = measure(graph, plan.cases())
    assert "Attention" in kinds(graph, set(find_islands(graph, gauges)))
    calm = [gauge.largest for name, gauge in gauges.items() if kinds(graph, {name}) == {"Transpose"}]
    assert max(calm) < 8188


def test_the_float16_graph_computes_in_it_on_the_weights_as_stored(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plan, graph = written(Loud(), 3, tmp_path)
    islands = find_islands(graph, measure(graph, plan.cases()))
    write_float16(graph, islands, tmp_path / "half.onnx")
    run_graph(tmp_path / "half.onnx", plan.cases())
    model = onnx.shape_inference.infer_shapes(
        onnx.load(tmp_path / "half.onnx", load_external_data=False), strict_mode=True
    )
    types = {value.name: value.type.tensor_type.elem_type for value in (*model.graph.value_info, *model.graph.input)}
    types |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    weights = {tensor.name for tensor in model.graph.initializer if tensor.external_data}
    for node in model.graph.node:
        wanted = onnx.TensorProto.FLOAT if node.name in islands else onnx.TensorProto.FLOAT16
        if node.op_type in ("Conv", "Add", "GroupNormalization"):
            assert {types[name] for name in node.input} == {wanted}
        if node.op_type == "Cast" and node.input[0] in weights:
            assert all(user.name in islands for user in model.graph.node if node.output[0] in user.input)
    assert [value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)] == [1, 1]


@pytest.mark.parametrize("name", ["tiny", "talbot"])
def test_pictures_in_float16_equal_those_in_float32_to_35_db(name: str, tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(tiny_bundle if name == "tiny" else name)
    if "float16" not in bundle.manifest.parity["unet"]:
        pytest.skip("talbot was exported before there were float16 graphs")
    folder = tmp_path / name
    shutil.copytree(bundle.path, folder)
    networks, files = {}, dict(bundle.manifest.files)
    for network, spec in bundle.manifest.networks.items():
        islands = bundle.manifest.parity[network]["float16"]["float32_islands"]
        write_rounded(folder / spec.graphs["float32"], islands, folder / f"{network}.rounded.onnx")
        networks[network] = dataclasses.replace(spec, graphs={"float32": f"{network}.rounded.onnx"})
        files[f"{network}.rounded.onnx"] = FileRecord.of(folder / f"{network}.rounded.onnx")
    rounded = Bundle(folder, dataclasses.replace(bundle.manifest, networks=networks, files=files))
    shape = (2, bundle.manifest.vae.latent_channels, 16, 16)
    latents = np.random.default_rng(0).standard_normal(shape, np.float32)
    pictures = []
    for opened in (bundle, rounded):
        with Pipeline(opened, "cpu") as pipeline:
            settings: dict[str, Any] = {"latents": latents, "num_inference_steps": 20, "output_type": "np"}
            factor = bundle.manifest.vae.downscale
            settings |= {"height": 16 * factor, "width": 16 * factor}
            pictures.append(np.stack(pipeline(["red apple", "a"], **settings).images))
    assert 35 <= -10 * np.log10(np.mean((pictures[0] - pictures[1]) ** 2)) < 120
