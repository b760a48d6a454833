"""Graphs rewritten for ONNX Runtime's CUDA kernels compute the same, on the CPU.

See ``standard_operators.py`` for the two that have no kernel there.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from calotype.export.precision import write_float16
from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.bundle.parity import SIZES, cases, judge
from calotype.runtime.diagnostics.verification import read_tokens
from calotype.runtime.errors import BundleError
from calotype.runtime.sessions.cuda_fusions import FUSIONS
from calotype.runtime.sessions.cuda_operators import for_cuda
from calotype.runtime.sessions.onnxruntime_cuda import WEIGHTS_FOLDER
from tests.runtime.hub_cache import in_hub_cache
from tests.runtime.standard_operators import attributes, in_standard_operators


def nodes(model: onnx.ModelProto, op: str) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == op]


def run(
    data: bytes,
    folder: Path,
    inputs: dict[str, np.ndarray],  # type: ignore[type-arg]
    weights: dict[str, np.ndarray] | None = None,  # type: ignore[type-arg]
) -> list[np.ndarray]:  # type: ignore[type-arg]
    """What a graph computes, ``weights`` in place of its own, as a session puts in those of a LoRA."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(WEIGHTS_FOLDER, str(folder))
    values = [onnxruntime.OrtValue.ortvalue_from_numpy(value) for value in (weights or {}).values()]
    options.add_external_initializers(list(weights or {}), values)
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return list(session.run(None, inputs))


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("network", ["text_encoder", "unet", "vae_decoder", "vae_encoder"])
@pytest.mark.parametrize("how", [{}, {"fusions": FUSIONS, "sums": True}], ids=["plain", "fused"])
def test_a_rewritten_graph_computes_the_same(how: dict[str, Any], network: str, precision: str) -> None:
    bundle = Bundle.open("talbot")
    spec = bundle.manifest.networks[network]
    path = bundle.path / spec.graphs[precision]
    rewritten, folder = for_cuda(path, **how)
    assert folder == bundle.path.resolve()
    tried = cases(network, spec.inputs, read_tokens(bundle, network), bundle.manifest.max_clip_skip, SIZES)
    wanted = {case: run(path.read_bytes(), bundle.path, inputs) for case, inputs in tried.items()}
    standard = in_standard_operators(rewritten)
    got = {case: run(standard, bundle.path, inputs) for case, inputs in tried.items()}
    assert judge(precision, spec.outputs, got, wanted)[1] is None


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("sums", [False, True])
def test_what_is_rewritten(sums: bool, precision: str) -> None:
    bundle = Bundle.open("talbot")
    path = bundle.path / bundle.manifest.networks["unet"].graphs[precision]
    before, after = onnx.load(path, load_external_data=False), onnx.load_from_string(for_cuda(path, sums=sums)[0])
    assert len(nodes(after, "MultiHeadAttention")) == len(nodes(before, "Attention"))
    assert len(nodes(after, "NhwcConv")) == len(nodes(before, "Conv"))
    for gone in ("GroupNormalization", "Conv", "Attention"):
        assert nodes(before, gone)
        assert not nodes(after, gone)
    # 96 and 288 channels in 32 groups have an odd number in each, which the kernel does not take.
    shapes = {item.name: tuple(item.dims) for item in before.graph.initializer}
    norms = [node.input[1].removesuffix(".float32") for node in nodes(before, "GroupNormalization")]
    made = [*nodes(after, "GroupNorm"), *nodes(after, "SkipGroupNorm")]
    assert len(made) == sum(shapes[name][0] // 32 % 2 == 0 for name in norms)
    assert 0 < len([node for node in made if attributes(node)["activation"]]) < len(made)
    assert bool(nodes(after, "SkipGroupNorm")) == sums
    assert {item.domain for item in after.opset_import} == {"", "com.microsoft"}


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_no_attention_stays_but_the_text_encoders(
    family: str, tiny_bundle: Path, request: pytest.FixtureRequest
) -> None:
    """``Attention`` is wrong in some shapes on CUDA."""
    folder = tiny_bundle if family == "sd1" else request.getfixturevalue("sdxl").bundle
    paths = sorted(folder.glob("*.onnx"))
    assert {path.name.partition(".")[0] for path in paths} >= {"text_encoder", "unet", "vae_decoder", "vae_encoder"}
    for path in paths:
        stayed = nodes(onnx.load_from_string(for_cuda(path)[0]), "Attention")
        assert all(attributes(node)["is_causal"] for node in stayed)
        assert bool(stayed) == path.name.startswith("text_encoder")


@pytest.mark.parametrize("seed", range(4))
def test_attention_in_float32_among_float16(seed: int, tmp_path: Path) -> None:
    """Casts then lie between an attention and what takes its heads apart and puts them together."""
    source = Bundle.open("talbot")
    shutil.copytree(source.path, tmp_path / "bundle")
    spec, folder = source.manifest.networks["unet"], tmp_path / "bundle"
    whole, mixed = folder / spec.graphs["float32"], folder / "mixed.onnx"
    graph = onnx.load(whole, load_external_data=False).graph
    random = np.random.default_rng(seed)
    islands = [
        node.name for node in graph.node if (node.op_type == "Attention" if seed == 0 else random.random() < 0.5)
    ]
    write_float16(whole, islands, mixed)
    before, after = onnx.load(mixed, load_external_data=False), onnx.load_from_string(for_cuda(mixed)[0])
    assert not nodes(after, "Attention")
    assert len(nodes(after, "MultiHeadAttention")) == len(nodes(before, "Attention"))
    inputs = cases("unet", spec.inputs, None, 0, SIZES)["random"]
    (wanted,), (got,) = run(mixed.read_bytes(), folder, inputs), run(for_standard(mixed), folder, inputs)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=0.01 * np.abs(wanted).max())


def attention(path: Path, heads: int, size: int, dtype: type, *, together: bool = True, **how: object) -> None:
    """A graph of one attention, of tokens (B, T, heads * size) to itself, written to ``path``."""
    kind, wide = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), heads * size
    numbers = {"rows": 2, "length": -1, "heads": heads, "size": size, "wide": wide}
    constants = [onnx.numpy_helper.from_array(np.array([value]), name) for name, value in numbers.items()]
    made = [onnx.helper.make_node("Concat", ["rows", "length", "heads", "size"], ["apart"], axis=0)]
    made += [onnx.helper.make_node("Concat", ["rows", "length", "wide"], ["together"], axis=0)]
    for name in "qkv":
        made.append(onnx.helper.make_node("Reshape", [f"{name}.tokens", "apart"], [f"{name}.split"]))
        made.append(onnx.helper.make_node("Transpose", [f"{name}.split"], [name], perm=[0, 2, 1, 3]))
    made.append(onnx.helper.make_node("Attention", ["q", "k", "v"], ["y" if together else "out"], **how))
    if together:
        made.append(onnx.helper.make_node("Transpose", ["y"], ["joined"], perm=[0, 2, 1, 3]))
        made.append(onnx.helper.make_node("Reshape", ["joined", "together"], ["out"]))
    values = [onnx.helper.make_tensor_value_info(f"{name}.tokens", kind, [2, 9, wide]) for name in "qkv"]
    out = onnx.helper.make_tensor_value_info("out", kind, None)
    graph = onnx.helper.make_graph(made, "attention", values, [out], constants)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=10)
    onnx.save(onnx.shape_inference.infer_shapes(model, data_prop=True), path)


@pytest.mark.parametrize(
    ("heads", "size", "dtype", "how", "becomes"),
    [
        (1, 512, np.float16, {}, "Softmax"),
        (2, 264, np.float16, {"scale": 0.03}, "Softmax"),
        (1, 512, np.float32, {}, "MultiHeadAttention"),
        (2, 160, np.float16, {}, "MultiHeadAttention"),
        (2, 160, np.float16, {"together": False}, "Softmax"),
        (2, 160, np.float32, {"together": False, "scale": 0.03}, "Softmax"),
        (2, 64, np.float16, {"is_causal": 1}, "Attention"),
    ],
)
def test_what_becomes_of_an_attention(
    heads: int, size: int, dtype: type, how: dict[str, object], becomes: str, tmp_path: Path
) -> None:
    attention(tmp_path / "g.onnx", heads, size, dtype, **how)  # type: ignore[arg-type]
    after = onnx.load_from_string(for_cuda(tmp_path / "g.onnx")[0])
    kinds = ("Attention", "MultiHeadAttention", "Softmax")
    assert [kind for kind in kinds for _ in nodes(after, kind)] == [becomes]
    random = np.random.default_rng(0)
    inputs = {f"{name}.tokens": random.standard_normal((2, 9, heads * size)).astype(dtype) for name in "qkv"}
    (wanted,) = run((tmp_path / "g.onnx").read_bytes(), tmp_path, inputs)
    (got,) = run(for_standard(tmp_path / "g.onnx"), tmp_path, inputs)
    assert got.dtype == dtype
    np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-5 if dtype is np.float32 else 3e-3)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("keepdims", [0, 1])
def test_the_first_of_the_largest_integers_is_found_among_floats_without_ties(
    dtype: type, keepdims: int, tmp_path: Path
) -> None:
    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    made = [onnx.helper.make_node("Identity", ["given"], ["x"])]
    made += [onnx.helper.make_node("ArgMax", ["x"], ["place"], axis=-1, keepdims=keepdims, select_last_index=0)]
    given = onnx.helper.make_tensor_value_info("given", kind, ["rows", 77])
    place = onnx.helper.make_tensor_value_info("place", onnx.TensorProto.INT64, None)
    graph = onnx.helper.make_graph(made, "end", [given], [place])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=10)
    onnx.save(onnx.shape_inference.infer_shapes(model), tmp_path / "g.onnx")
    rewritten = onnx.load_from_string(for_cuda(tmp_path / "g.onnx")[0])
    ranks = onnx.helper.make_tensor_value_info(rewritten.graph.node[-1].input[0], onnx.TensorProto.FLOAT, None)
    rewritten.graph.output.append(ranks)
    random, rows = np.random.default_rng(0), [np.zeros(77), np.full(77, 49407), np.arange(77), np.arange(77)[::-1]]
    for most in (2, 4, 49408):  # ties are many, some, few
        rows += list(random.integers(0, most, (40, 77)))
    rows += [np.where(np.arange(77) < end, random.integers(0, 49406, 77), 49407) for end in range(77)]
    x = np.array(rows, dtype)
    got, ranked = run(rewritten.SerializeToString(), tmp_path, {"given": x})
    np.testing.assert_array_equal(got, x.argmax(-1, keepdims=bool(keepdims)))
    assert all(np.unique(row).size == row.size for row in ranked)


def test_sdxl_s_second_text_encoder_finds_the_end_of_each_text(request: pytest.FixtureRequest) -> None:
    bundle = Bundle.open(request.getfixturevalue("sdxl").bundle)
    spec = bundle.manifest.networks["text_encoder_2"]
    path = bundle.path / spec.graphs["float32"]
    tokens = read_tokens(bundle, "text_encoder_2")
    tried = cases("text_encoder_2", spec.inputs, tokens, bundle.manifest.max_clip_skip, SIZES)
    for inputs in tried.values():
        wanted, got = run(path.read_bytes(), bundle.path, inputs), run(for_standard(path), bundle.path, inputs)
        for one, other in zip(wanted, got, strict=True):
            np.testing.assert_allclose(other, one, rtol=0, atol=1e-5)
    (ending,) = nodes(onnx.load_from_string(for_cuda(path)[0]), "ArgMax")
    assert ending.input[0].endswith(".ranked")


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
