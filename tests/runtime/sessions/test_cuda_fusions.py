"""What is put together for ONNX Runtime's CUDA kernels is what was meant, and computes the same, on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.bundle.parity import SIZES, cases
from calotype.runtime.bundle.safetensors import SafetensorsFile
from calotype.runtime.sessions.cuda_fusions import FUSIONS
from calotype.runtime.sessions.cuda_operators import for_cuda
from tests.runtime.sessions.test_cuda_operators import nodes, run
from tests.runtime.standard_operators import in_standard_operators

WIDE = 320  # the least width of Stable Diffusion's UNets, whose feed-forward layers are four times as wide, twice


def feed_forward(path: Path, *, wide: int = WIDE, shared: bool = False, approximate: str = "none") -> None:
    """A transformer's feed-forward layer of tokens (2, T, wide), with its norm and residuals, as it is exported."""
    random = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        return onnx.numpy_helper.from_array((random.standard_normal(shape) / 16).astype(np.float32), name)

    weights = [weight(f"{part}.weight", *shape) for part, shape in {"o": (wide, wide), "norm": (wide,)}.items()]
    weights += [weight("up.weight", 8 * wide, wide), weight("down.weight", wide, 4 * wide)]
    weights += [weight(f"{name}.bias", size) for name, size in {"o": wide, "norm": wide, "down": wide}.items()]
    weights += [weight("up.bias", 8 * wide)]
    make, made = onnx.helper.make_node, []
    for name, x in (("o", "x"), ("up", "normed"), ("down", "gated")):
        made.append(make("Transpose", [f"{name}.weight"], [f"{name}.turned"], perm=[1, 0]))
        made.append(make("MatMul", [x, f"{name}.turned"], [f"{name}.product"]))
        made.append(make("Add", [f"{name}.product", f"{name}.bias"], [name]))
        if name == "o":
            made.append(make("Add", ["residual", "o"], ["sum"]))
            made.append(make("LayerNormalization", ["sum", "norm.weight", "norm.bias"], ["normed"], epsilon=1e-5))
        if name == "up":
            made.append(make("Split", ["up"], ["left", "right"], axis=2, num_outputs=2))
            made.append(make("Gelu", ["right"], ["gelu"], approximate=approximate))
            made.append(make("Mul", ["left", "gelu"], ["gated"]))
    made.append(make("Add", ["sum", "down"], ["out"]))
    outputs = ["out", "o"] if shared else ["out"]
    values = [onnx.helper.make_tensor_value_info(name, 1, [2, "tokens", wide]) for name in ("x", "residual", *outputs)]
    graph = onnx.helper.make_graph(made, "layer", values[:2], values[2:], weights)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(onnx.shape_inference.infer_shapes(model), path)


def fused(path: Path) -> onnx.ModelProto:
    """After it is shown to compute the same."""
    data, folder = for_cuda(path, FUSIONS, sums=True)
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    random = np.random.default_rng(1)
    inputs = {
        item.name: random.standard_normal([size if isinstance(size, int) else 9 for size in item.shape]).astype(
            np.float32
        )
        for item in session.get_inputs()
    }
    for wanted, got in zip(session.run(None, inputs), run(in_standard_operators(data), folder, inputs), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-5 * float(np.abs(wanted).max()))
    return onnx.load_from_string(data)


def test_a_feed_forward_layer(tmp_path: Path) -> None:
    feed_forward(tmp_path / "g.onnx")
    after = fused(tmp_path / "g.onnx")
    kinds = [node.op_type for node in after.graph.node if node.op_type != "Transpose"]
    assert kinds == ["MatMul", "SkipLayerNormalization", "MatMul", "BiasSplitGelu", "MatMul", "BiasAdd"]


@pytest.mark.parametrize(
    ("how", "left"),
    [
        ({"wide": 96}, {"Split", "Gelu", "Mul", "Add"}),  # no kernel of that width
        ({"approximate": "tanh"}, {"Split", "Gelu", "Mul", "Add"}),
        ({"shared": True}, {"Add", "LayerNormalization"}),  # what is put away there, the graph gives out
    ],
)
def test_what_is_left_alone(how: dict[str, object], left: set[str], tmp_path: Path) -> None:
    feed_forward(tmp_path / "g.onnx", **how)  # type: ignore[arg-type]
    after = fused(tmp_path / "g.onnx")
    assert left <= {node.op_type for node in after.graph.node}


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_every_network_of_a_small_model(family: str, tiny_bundle: Path, request: pytest.FixtureRequest) -> None:
    bundle = Bundle.open(tiny_bundle if family == "sd1" else request.getfixturevalue("sdxl").bundle)
    for network, spec in bundle.manifest.networks.items():
        if network.startswith("text_encoder"):
            continue  # its cases are of tokens; talbot's is compared beside
        for precision, graph in spec.graphs.items():
            data, folder = for_cuda(bundle.path / graph, FUSIONS, sums=True)
            for inputs in cases(network, spec.inputs, None, 0, SIZES).values():
                wanted = run((bundle.path / graph).read_bytes(), bundle.path, inputs)
                for one, other in zip(wanted, run(in_standard_operators(data), folder, inputs), strict=True):
                    bound = (2e-5 if precision == "float32" else 2e-2) * float(np.abs(one).max())
                    np.testing.assert_allclose(other, one, rtol=0, atol=bound)


def test_what_becomes_of_a_unet() -> None:
    """Every residual of its transformers, and every linear layer of the prompt and of the timestep."""
    bundle = Bundle.open("talbot")
    path = bundle.path / bundle.manifest.networks["unet"].graphs["float16"]
    before, after = onnx.load(path, load_external_data=False), onnx.load_from_string(for_cuda(path, FUSIONS)[0])
    attentions, blocks = len(nodes(before, "Attention")), len(nodes(before, "Gelu"))
    assert len(nodes(after, "SkipLayerNormalization")) == attentions == 2 * blocks
    assert len(nodes(after, "LayerNormalization")) == blocks
    made = {name: node for node in after.graph.node for name in node.output}
    splits = [node for node in nodes(after, "Split") if made[node.input[0]].op_type in ("Gemm", "MatMul")]
    merged = [made[node.input[0]] for node in splits]
    prompt = [node for node in merged if node.input[0] == "encoder_hidden_states.float16"]
    assert sum(len(node.output) for node in splits if made[node.input[0]] in prompt) == 2 * blocks
    assert not [node for node in nodes(after, "MatMul") if node.input[0] == prompt[0].input[0] and node not in prompt]
    # Tokens come from channels that are last already.
    assert not [node for node in nodes(after, "Transpose") if list(node.attribute[0].ints) == [0, 2, 1]]


def test_replaced_weights_are_put_together_too() -> None:
    """As a LoRA replaces them: of linear layers that become one, of norms, biases and a convolution."""
    bundle = Bundle.open("talbot")
    spec = bundle.manifest.networks["unet"]
    path = bundle.path / spec.graphs["float32"]
    block, parts = "down_blocks.0.attentions.0.transformer_blocks.0", {"attn2.to_k.weight", "attn2.to_v.weight"}
    parts |= {"attn1.to_out.0.bias", "norm2.weight", "ff.net.0.proj.bias"}
    names = {f"{block}.{part}" for part in parts} | {
        "down_blocks.0.resnets.0.time_emb_proj.weight",
        "down_blocks.0.resnets.0.conv1.bias",
    }
    stored = SafetensorsFile(bundle.path / "unet.safetensors")
    weights = {name: np.ascontiguousarray(2 * stored[name]) for name in names}
    data, folder = for_cuda(path, FUSIONS, sums=True)
    inputs = next(iter(cases("unet", spec.inputs, None, 0, SIZES).values()))
    plain = path.read_bytes()
    (unchanged,), (wanted,) = run(plain, bundle.path, inputs), run(plain, bundle.path, inputs, weights)
    (got,) = run(in_standard_operators(data), folder, inputs, weights)
    largest = float(np.abs(wanted).max())
    np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-5 * largest)
    assert float(np.abs(wanted - unchanged).max()) > 0.1 * largest
