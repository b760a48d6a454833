"""Forms of attention compute the same, and what a GPU run writes of them, without a GPU."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from benchmarks import gpu
from benchmarks.micro import __main__ as micro
from benchmarks.micro import attention, attention_forms, attention_gpu, attention_plans
from benchmarks.micro.attention_forms import LAYERS, OPSETS, Shape, model, reference
from benchmarks.subject import Subject
from calotype.engine.build import build_plan
from calotype.engine.profiles import Shapes
from calotype.runtime.sessions.cuda_operators import for_cuda
from calotype.runtime.sessions.device import Device
from calotype.runtime.sessions.libraries import load_library
from tests import computing_standins
from tests.runtime import cuda_standin

SMALL = Shape(2, 3, 20, 7, 8)
FORMS = {"cuda": {*OPSETS, "MultiHeadAttention"}, "tensorrt-rtx": set(OPSETS)}


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> cuda_standin.Cuda:
    """A GPU, and what runs on it, that computes on the CPU."""
    found = cuda_standin.Cuda()
    found.limit = 1 << 30
    graphs: list[bytes] = []

    def build(_: Any, path: Path, shapes: Any) -> Any:
        graphs.append(path.read_bytes())
        return computing_standins.plan(None, path, shapes)

    def compute(inputs: dict[str, Any]) -> dict[str, Any]:
        session = onnxruntime.InferenceSession(graphs[-1], providers=["CPUExecutionProvider"])
        return {"out": session.run(["out"], inputs)[0]}

    library = cuda_standin.Library(found, compute, dict.fromkeys(SMALL.tensors(), "float16"))
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", found)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", library)
    monkeypatch.setattr(attention_gpu, "onnxruntime", computing_standins.OnnxRuntime)
    monkeypatch.setattr(attention_gpu, "build_plan", build)
    return found


@pytest.mark.parametrize("backend", FORMS)
def test_every_form_is_timed_and_gives_everything_back(backend: str, cuda: cuda_standin.Cuda) -> None:
    found = attention_gpu.row(backend, SMALL, rounds=1)
    assert found.keys() == FORMS[backend]
    for form, own in found.items():
        assert own.keys() - {"ratio"} == {"ready_s", "off", "cuda_graph", "ms"}, (form, own)
        assert 0 < own["off"] < attention_gpu.MOST_OFF
        assert own["cuda_graph"]
        assert own["ms"]["min"] <= own["ms"]["median"] <= own["ms"]["max"]
    assert sum("ratio" in own for own in found.values()) == len(found) - 1  # all but the first
    assert cuda.used() == 0


def test_a_form_that_fails_or_is_wrong_is_one_line_and_the_others_are_timed(
    cuda: cuda_standin.Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = attention_gpu.opened

    def some(backend: str, form: str, shape: Shape, device: Device, *rest: Any) -> Any:
        if form == "Attention":
            device.cuda.begin_capture(device.stream)
            raise ZeroDivisionError("a\nb")
        return (lambda: None, True) if form == "parts" else opened(backend, form, shape, device, *rest)

    monkeypatch.setattr(attention_gpu, "opened", some)
    found = attention_gpu.row("cuda", SMALL, rounds=1)
    assert found["Attention"] == {"failed": "ZeroDivisionError: a b"}
    assert found["parts"] == {"failed": "ArithmeticError: it is off by nan"}
    assert found["Attention of tokens"]["ms"]["median"] > 0
    assert cuda.used() == 0


@pytest.mark.parametrize("form", OPSETS)
@pytest.mark.parametrize("shape", [SMALL, Shape(1, 1, 20, 20, 512)])
def test_forms_compute_attention(form: str, shape: Shape) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(size).astype(np.float16) for size in list(shape.tensors().values())[:3])
    session = onnxruntime.InferenceSession(model(form, shape).SerializeToString(), providers=["CPUExecutionProvider"])
    (made,) = session.run(None, {name: {"q": q, "k": k, "v": v}[name[0]] for name in list(shape.tensors())[:-1]})
    np.testing.assert_allclose(made, reference(shape, q, k, v), atol=2e-2)


def test_the_reference_is_attention() -> None:
    """Beside the operator's own, in float32, layer by layer."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(size).astype(np.float16) for size in list(SMALL.tensors().values())[:3])
    node = onnx.helper.make_node("Attention", ["q", "k", "v"], ["y"], q_num_heads=SMALL.heads, kv_num_heads=SMALL.heads)
    edges = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["b", "t", 24]) for name in ("q", "k", "v")
    ]
    outs = [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)]
    graph = onnx.helper.make_graph([node], "g", edges, outs)
    one = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=10)
    session = onnxruntime.InferenceSession(one.SerializeToString(), providers=["CPUExecutionProvider"])
    x = q.astype(np.float32)
    for _ in range(LAYERS):
        x = x + session.run(None, {"q": x, "k": k.astype(np.float32), "v": v.astype(np.float32)})[0]
    np.testing.assert_allclose(reference(SMALL, q, k, v), x, atol=1e-4)


def test_the_session_on_cuda_rewrites_every_layer(tmp_path: Path) -> None:
    onnx.save(model("Attention", SMALL), tmp_path / "g.onnx")
    nodes = onnx.load_from_string(for_cuda(tmp_path / "g.onnx")[0]).graph.node
    assert [node.op_type for node in nodes].count("MultiHeadAttention") == attention_forms.LAYERS
    assert "Attention" not in {node.op_type for node in nodes}


@pytest.mark.parametrize("form", OPSETS)
@pytest.mark.parametrize("title", ["SD 1.5 at 512, prompt, first level", "VAE at 512, pixels"])
def test_plans_build_without_a_gpu(form: str, title: str, tmp_path: Path) -> None:
    shape = attention_gpu.SHAPES[title]
    onnx.save(model(form, shape), tmp_path / "g.onnx")
    profile: Shapes = {name: (size,) * 3 for name, size in list(shape.tensors().items())[:-1]}
    assert build_plan(load_library("tensorrt-rtx"), tmp_path / "g.onnx", [profile]).tensors["inputs"]


def test_a_crash_costs_its_row_and_one_at_the_start_does_not_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    said: Iterator[list[tuple[str, Any]]] = iter(
        [
            [("a", 1), ("b", {"failed": "its process ended with -6"})],
            [("start", {"failed": "its process ended with 1"})],
            [("d", 4), ("end", {"failed": "its process ended with -11"})],
        ]
    )
    monkeypatch.setattr(gpu, "run", lambda *_: next(said))
    found = dict(attention_gpu.measured("cuda", ["a", "b", "c", "d"], 1))
    assert list(found) == ["a", "b", "c", "d"]
    assert found == {
        "a": 1,
        "b": {"failed": "its process ended with -6"},
        "c": {"failed": "its process ended with 1"},
        "d": 4,
    }


def test_what_no_form_survives_is_one_line_and_the_next_row_gets_a_new_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    told: list[Any] = []
    subject = Subject(model="attention", backend="cuda", work=Path())
    attention_gpu._rows(list(attention_gpu.SHAPES), subject, lambda *item: told.append(item))
    first = next(iter(attention_gpu.SHAPES))
    assert told[0] == (first,)
    assert told[1][0] == first
    assert told[1][1]["failed"].startswith("MissingPackageError: cuda-bindings is not installed")
    assert len(told) == 2


def test_rows_are_written_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    title = "talbot, self"
    about = {"gpu": {"name": "NVIDIA H100 80GB HBM3"}, "date": "2026-01-01"}

    def stops(*_: Any) -> Iterator[tuple[str, Any]]:
        yield title, {"parts": {"ms": {"median": 1.0}}}
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "about", lambda **_: dict(about))
    monkeypatch.setattr(attention_gpu, "measured", stops)
    monkeypatch.setattr(micro, "RESULTS", tmp_path)
    path = tmp_path / "r.json"
    for where in (["--output", str(path)], ["--write"]):
        with pytest.raises(KeyboardInterrupt):
            micro.main(["attention-gpu", "--backend", "cuda", *where])
    report = json.loads(path.read_text())
    shape = list(attention_gpu.SHAPES[title])
    assert report["rows"] == [{"title": title, "facts": {"shape": shape}, "forms": {"parts": {"ms": {"median": 1.0}}}}]
    written = json.loads((tmp_path / "micro-attention-gpu-cuda-nvidia-h100-80gb-hbm3.json").read_text())
    assert written["rows"] == report["rows"]
    assert written["command"] == "python -m benchmarks.micro attention-gpu --backend cuda"


def test_without_a_gpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(SystemExit, match="nothing was measured: cuda-bindings is not installed"):
        micro.main(["attention-gpu", "--output", str(tmp_path / "none.json")])
    assert not (tmp_path / "none.json").exists()


def test_both_forms_on_the_cpu_agree_and_are_timed() -> None:
    result = attention.row("small", 1, 2, 8, 5, 4).timed(1)
    assert list(result.forms) == ["one node", "parts"]
    assert "ratio" in result.forms["parts"]


def test_tensorrt_rtx_fuses_an_attention_in_either_form() -> None:
    """Real plans, of one shape whose logits take more than all else together."""
    shape = Shape(2, 8, 2048, 2048, 40)
    made = attention_plans.row(load_library("tensorrt-rtx"), "one", shape)
    assert made.facts["logits_mib"] == 2 * 2 * 8 * 2048 * 2048 / 2**20
    assert set(made.forms) == set(OPSETS)
    for form, own in made.forms.items():
        assert 0 < own["mib"] < made.facts["logits_mib"], form
