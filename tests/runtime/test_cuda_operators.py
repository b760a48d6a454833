"""Graphs rewritten for ONNX Runtime's CUDA kernels compute the same, on the CPU.

Its ``MultiHeadAttention`` runs there as it is; ``GroupNorm`` and ``NhwcConv`` have no kernel there and are replaced by
what their description says, in standard operators.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.helper
import onnxruntime
import pytest

from calotype.runtime.bundle import Bundle
from calotype.runtime.errors import BundleError
from calotype.runtime.parity import SIZES, cases, judge
from calotype.runtime.sessions.cuda_operators import for_cuda
from calotype.runtime.sessions.onnxruntime_cuda import WEIGHTS_FOLDER
from calotype.runtime.verification import read_tokens

LAST, FIRST = [0, 2, 3, 1], [0, 3, 1, 2]


def nodes(model: onnx.ModelProto, op: str) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == op]


def attributes(node: onnx.NodeProto) -> dict[str, object]:
    return {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}


def in_standard_operators(data: bytes) -> bytes:
    model, found = onnx.load_from_string(data), []
    casts = {node.output[0]: attributes(node)["to"] for node in model.graph.node if node.op_type == "Cast"}
    for node in model.graph.node:
        made, (out,) = [], node.output[:1]

        def add(op: str, inputs: list[str], into: str, made: list[onnx.NodeProto] = made, **how: object) -> str:
            made.append(onnx.helper.make_node(op, inputs, [into], **how))
            return into

        if node.op_type == "GroupNorm":
            how = attributes(node)
            assert how["channels_last"] == 1
            assert {casts[name] for name in node.input[1:]} == {onnx.TensorProto.FLOAT}
            x = add("Cast", [add("Transpose", [node.input[0]], f"{out}.a", perm=FIRST)], f"{out}.b", to=1)
            norm = {"num_groups": how["groups"], "epsilon": how["epsilon"]}
            x = add("GroupNormalization", [x, *node.input[1:]], f"{out}.c", **norm)
            if how["activation"]:
                x = add("Mul", [x, add("Sigmoid", [x], f"{out}.d")], f"{out}.e")
            x = add("CastLike", [x, node.input[0]], f"{out}.f")
            add("Transpose", [x], out, perm=LAST)
        elif node.op_type == "NhwcConv":
            x = add("Transpose", [node.input[0]], f"{out}.a", perm=FIRST)
            kernel = add("Transpose", [node.input[1]], f"{out}.b", perm=FIRST)
            x = add("Conv", [x, kernel, *node.input[2:]], f"{out}.c", **attributes(node))
            add("Transpose", [x], out, perm=LAST)
        else:
            made.append(node)
        found += made
    del model.graph.node[:]
    model.graph.node.extend(found)
    return model.SerializeToString()


def run(data: bytes, folder: Path, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:  # type: ignore[type-arg]
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(WEIGHTS_FOLDER, str(folder))
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return list(session.run(None, inputs))


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("network", ["text_encoder", "unet", "vae_decoder", "vae_encoder"])
def test_a_rewritten_graph_computes_the_same(network: str, precision: str) -> None:
    bundle = Bundle.open("talbot")
    spec = bundle.manifest.networks[network]
    path = bundle.path / spec.graphs[precision]
    rewritten = for_cuda(path)
    tried = cases(network, spec.inputs, read_tokens(bundle, network), bundle.manifest.max_clip_skip, SIZES)
    wanted = {case: run(path.read_bytes(), bundle.path, inputs) for case, inputs in tried.items()}
    standard = in_standard_operators(rewritten)
    got = {case: run(standard, bundle.path, inputs) for case, inputs in tried.items()}
    assert judge(precision, spec.outputs, got, wanted)[1] is None


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_what_is_rewritten(precision: str) -> None:
    bundle = Bundle.open("talbot")
    path = bundle.path / bundle.manifest.networks["unet"].graphs[precision]
    before, after = onnx.load(path, load_external_data=False), onnx.load_from_string(for_cuda(path))
    assert len(nodes(after, "MultiHeadAttention")) == len(nodes(before, "Attention"))
    assert len(nodes(after, "NhwcConv")) == len(nodes(before, "Conv"))
    for gone in ("GroupNormalization", "Conv", "Attention"):
        assert nodes(before, gone)
        assert not nodes(after, gone)
    # 96 and 288 channels in 32 groups have an odd number in each, which the kernel does not take.
    shapes = {item.name: tuple(item.dims) for item in before.graph.initializer}
    norms = [node.input[1].removesuffix(".float32") for node in nodes(before, "GroupNormalization")]
    assert len(nodes(after, "GroupNorm")) == sum(shapes[name][0] // 32 % 2 == 0 for name in norms)
    activated = [node for node in nodes(after, "GroupNorm") if attributes(node)["activation"]]
    assert 0 < len(activated) < len(nodes(after, "GroupNorm"))
    assert {item.domain for item in after.opset_import} == {"", "com.microsoft"}


def test_a_file_that_is_no_graph(tmp_path: Path) -> None:
    (tmp_path / "g.onnx").write_bytes(b"nothing of the kind")
    with pytest.raises(BundleError, match=r"g\.onnx is not an ONNX file"):
        for_cuda(tmp_path / "g.onnx")
