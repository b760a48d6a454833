"""Graphs rewritten for ONNX Runtime's CUDA kernels compute the same, on the CPU.

See ``standard_operators.py`` for the two that have no kernel there.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from calotype.runtime.bundle import Bundle
from calotype.runtime.errors import BundleError
from calotype.runtime.parity import SIZES, cases, judge
from calotype.runtime.sessions.cuda_operators import for_cuda
from calotype.runtime.sessions.onnxruntime_cuda import WEIGHTS_FOLDER
from calotype.runtime.verification import read_tokens
from tests.runtime.hub_cache import in_hub_cache
from tests.runtime.standard_operators import attributes, in_standard_operators


def nodes(model: onnx.ModelProto, op: str) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == op]


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
    rewritten, folder = for_cuda(path)
    assert folder == bundle.path.resolve()
    tried = cases(network, spec.inputs, read_tokens(bundle, network), bundle.manifest.max_clip_skip, SIZES)
    wanted = {case: run(path.read_bytes(), bundle.path, inputs) for case, inputs in tried.items()}
    standard = in_standard_operators(rewritten)
    got = {case: run(standard, bundle.path, inputs) for case, inputs in tried.items()}
    assert judge(precision, spec.outputs, got, wanted)[1] is None


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_what_is_rewritten(precision: str) -> None:
    bundle = Bundle.open("talbot")
    path = bundle.path / bundle.manifest.networks["unet"].graphs[precision]
    before, after = onnx.load(path, load_external_data=False), onnx.load_from_string(for_cuda(path)[0])
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


def test_weights_that_a_cache_of_the_hub_links_to_are_read_where_they_lie(tmp_path: Path) -> None:
    """ONNX Runtime refuses links out of the folder of a graph that is given as bytes."""
    bundle = Bundle.open(in_hub_cache(Bundle.open("talbot").path, tmp_path))
    spec = bundle.manifest.networks["unet"]
    path = bundle.path / spec.graphs["float32"]
    inputs = cases("unet", spec.inputs, None, 0, SIZES)["random"]
    with pytest.raises(Exception, match="External data path escapes model directory"):
        run(path.read_bytes(), bundle.path, inputs)
    rewritten, folder = for_cuda(path)
    assert folder == tmp_path.resolve() / "models--owner--name" / "blobs"
    own = Bundle.open("talbot")
    (wanted,) = run(for_standard(own.path / spec.graphs["float32"]), own.path, inputs)
    (got,) = run(in_standard_operators(rewritten), folder, inputs)
    np.testing.assert_array_equal(got, wanted)


def for_standard(path: Path) -> bytes:
    return in_standard_operators(for_cuda(path)[0])


def test_a_file_that_is_no_graph(tmp_path: Path) -> None:
    (tmp_path / "g.onnx").write_bytes(b"nothing of the kind")
    with pytest.raises(BundleError, match=r"g\.onnx is not an ONNX file"):
        for_cuda(tmp_path / "g.onnx")
