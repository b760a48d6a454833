"""Activations before anything is built: shapes against those that ONNX Runtime makes, sizes against a builder's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from calotype.engine.build import Options, build_bundle
from calotype.engine.memory import estimate_activations, infer_tensors
from calotype.engine.profiles import Profile, Range
from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.sessions import libraries
from calotype.runtime.sessions.plans import describe_plan

NETWORKS = ["text_encoder", "unet", "vae_decoder", "vae_encoder"]
# No two alike where that can be, so that none stands for another.
SIZES = {"rows": 2, "batch": 1, "extra": 3, "tokens": 77, "height": 12, "width": 20}


def shapes_made(graph: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[tuple[int, ...], int]]:
    """Shape and element size of every value of a float32 ``graph``, as ONNX Runtime makes them, not optimizing."""
    model = onnx.load(graph, load_external_data=False)
    outputs = {item.name for item in model.graph.output}
    values = [name for node in model.graph.node for name in node.output if name not in outputs]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in values)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(graph.parent))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {
        item.name: np.zeros(shapes[item.name], np.int64 if item.type == "tensor(int64)" else np.float32)
        for item in session.get_inputs()
    }
    made = session.run([*outputs, *values], feeds)
    return {name: (value.shape, value.itemsize) for name, value in zip([*outputs, *values], made, strict=True)}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", ["talbot", "tiny"])
def test_every_value_has_the_shape_that_onnx_runtime_makes(name: str, network: str, tiny_bundle: Path) -> None:
    """The autoencoder of the tiny bundle, not of talbot, has attention in its middle, as Stable Diffusion's has."""
    bundle = Bundle.open(tiny_bundle if name == "tiny" else name)
    spec = bundle.manifest.networks[network]
    shapes = {item.name: item.resolve(SIZES) for item in spec.inputs}
    graph = bundle.path / spec.graphs["float32"]
    model = onnx.load(graph, load_external_data=False)
    assert name == "talbot" or any(node.op_type == "Attention" for node in model.graph.node)
    found = infer_tensors(model, shapes)
    made = shapes_made(graph, shapes)
    assert {value: (found[value].shape, found[value].itemsize) for value in made if value in found} == made


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", ["talbot", "tiny"])
def test_every_value_in_float16_has_a_shape(name: str, network: str, tiny_bundle: Path) -> None:
    """Such graphs do not run on the CPU; their values are those of the float32 graph, but for casts."""
    bundle = Bundle.open(tiny_bundle if name == "tiny" else name)
    spec = bundle.manifest.networks[network]
    shapes = {item.name: item.resolve(SIZES) for item in spec.inputs}
    model = onnx.load(bundle.path / spec.graphs["float16"], load_external_data=False)
    values = {value for node in model.graph.node for value in node.output}
    assert values <= infer_tensors(model, shapes).keys()


@pytest.mark.parametrize(
    ("name", "network", "precision"),
    [
        ("talbot", "unet", "float32"),
        ("talbot", "vae_decoder", "float32"),
        ("tiny", "unet", "float32"),
        ("tiny", "unet", "float16"),  # heads of 8, which no fused kernel takes
        ("tiny", "vae_decoder", "float32"),
        ("tiny", "vae_encoder", "float32"),
    ],
)
def test_the_estimate_is_of_the_size_the_builder_states(
    name: str, network: str, precision: str, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where attention keeps its scores. TensorRT-RTX states what a plan takes when it has built it."""
    libraries.load_library("tensorrt-rtx")
    monkeypatch.setenv("CALOTYPE_CACHE", str(tmp_path))
    bundle = Bundle.open(tiny_bundle if name == "tiny" else name)
    size = Range.parse("256" if name == "talbot" else "128")
    large = Profile(name="large", batch=Range.parse("2"), height=size, width=size)
    options = Options(precision=precision)
    plans = build_bundle(bundle, backend="tensorrt-rtx", profiles=[large], options=options, networks=[network])
    record, graph = describe_plan(plans[network]), bundle.path / bundle.manifest.networks[network].graphs[precision]
    shapes = {item: tuple(bounds[2]) for item, bounds in record.tensors["profiles"][0].items()}
    assert 0.5 < estimate_activations(graph, shapes) / record.figures["activations"] < 2


def write(path: Path, nodes: list[onnx.NodeProto], inputs: dict[str, list[str | int]]) -> Path:
    """A graph whose last node makes its output, in float32."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)],
        [helper.make_tensor("flat", TensorProto.INT64, [2], [0, -1])],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("ours", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets), path)
    return path


def test_attention_of_three_dimensions_and_fewer_heads_of_keys(tmp_path: Path) -> None:
    """The last dimension is the query's heads times the value's head size: 6 and 5."""
    node = helper.make_node("Attention", ["q", "k", "v"], ["out"], q_num_heads=6, kv_num_heads=2)
    graph = write(tmp_path / "g.onnx", [node], {"q": ["b", 8, 24], "k": ["b", 9, 8], "v": ["b", 9, 10]})
    shapes = {"q": (2, 8, 24), "k": (2, 9, 8), "v": (2, 9, 10)}
    assert infer_tensors(onnx.load(graph), shapes)["out"].shape == (2, 8, 30)
    scores = 2 * 2 * 6 * 8 * 9 * 4  # twice (B, heads, length, length of the keys) in float32
    assert estimate_activations(graph, shapes) == 2 * 8 * 30 * 4 + scores


def test_an_operator_that_onnx_does_not_know_makes_as_much_as_it_reads(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Mystery", ["a"], ["b"], domain="ours"),
        helper.make_node("Reshape", ["b", "flat"], ["c"]),
    ]
    graph, shapes = write(tmp_path / "g.onnx", nodes, {"x": ["n", 3]}), {"x": (7, 3)}
    assert not {"b", "c"} & infer_tensors(onnx.load(graph), shapes).keys()
    assert estimate_activations(graph, shapes) == 2 * 7 * 3 * 4
