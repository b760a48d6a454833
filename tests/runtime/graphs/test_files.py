"""What an ONNX file reads from other files, by our reading, the onnx package's and ONNX Runtime's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from calotype.runtime.errors import BundleError
from calotype.runtime.graphs.files import WAYS, external_locations, read_graph
from calotype.runtime.graphs.protobuf import field, fields

HIDDEN = "hidden.bin"
KINDS = {
    "ModelProto": "model",
    "TrainingInfoProto": "training",
    "FunctionProto": "function",
    "GraphProto": "graph",
    "NodeProto": "node",
    "AttributeProto": "attribute",
    "SparseTensorProto": "sparse",
    "TensorProto": "tensor",
}


def test_every_way_to_a_tensor_is_followed() -> None:
    """Derived from the onnx package's description of the format: what reaches a TensorProto, and nothing else."""
    found: dict[str, Any] = {"ModelProto": onnx.ModelProto.DESCRIPTOR}
    waiting = [onnx.ModelProto.DESCRIPTOR]
    while waiting:
        for item in waiting.pop().fields:
            if item.message_type is not None and item.message_type.name not in found:
                found[item.message_type.name] = item.message_type
                waiting.append(item.message_type)

    def reaches(kind: str, passed: frozenset[str] = frozenset()) -> bool:
        inner = [item.message_type.name for item in found[kind].fields if item.message_type is not None]
        return kind == "TensorProto" or any(name not in passed and reaches(name, passed | {kind}) for name in inner)

    expected = {
        KINDS[kind]: {
            item.number: KINDS[item.message_type.name]
            for item in description.fields
            if item.message_type is not None and reaches(item.message_type.name)
        }
        for kind, description in found.items()
        if reaches(kind) and kind != "TensorProto"
    }
    assert {kind: ways for kind, ways in WAYS.items() if kind != "tensor"} == expected
    assert found["TensorProto"].fields_by_name["external_data"].number in WAYS["tensor"]


def tensor(name: str = "w", location: str = HIDDEN) -> onnx.TensorProto:
    made = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    made.external_data.add(key="location", value=location)
    made.external_data.add(key="length", value="16")
    return made


def constant(value: onnx.TensorProto) -> onnx.NodeProto:
    return helper.make_node("Constant", [], ["c"], value=value)


def model(
    nodes: list[onnx.NodeProto], initializers: list[onnx.TensorProto], functions: list[onnx.FunctionProto]
) -> onnx.ModelProto:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", [values[0]], [values[1]], initializers)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=functions)


def in_initializer() -> onnx.ModelProto:
    return model([helper.make_node("Add", ["x", "w"], ["y"])], [tensor()], [])


def in_constant() -> onnx.ModelProto:
    return model([constant(tensor()), helper.make_node("Add", ["x", "c"], ["y"])], [], [])


def in_branch() -> onnx.ModelProto:
    inner = helper.make_graph(
        [helper.make_node("Identity", ["w"], ["out"])],
        "then",
        [],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, [4])],
        [tensor()],
    )
    condition = helper.make_tensor("yes", TensorProto.BOOL, [], [True])
    node = helper.make_node("If", ["yes"], ["c"], then_branch=inner, else_branch=inner)
    return model([node, helper.make_node("Add", ["x", "c"], ["y"])], [condition], [])


def in_function() -> onnx.ModelProto:
    nodes = [constant(tensor()), helper.make_node("Add", ["a", "c"], ["b"])]
    own = helper.make_function("own", "F", ["a"], ["b"], nodes, [helper.make_opsetid("", 20)])
    return model([helper.make_node("F", ["x"], ["y"], domain="own")], [], [own])


def in_default_of_function() -> onnx.ModelProto:
    value = helper.make_node("Constant", [], ["c"])
    value.attribute.add(name="value", ref_attr_name="value", type=onnx.AttributeProto.TENSOR)
    nodes = [value, helper.make_node("Add", ["a", "c"], ["b"])]
    default = helper.make_attribute("value", tensor())
    opsets = [helper.make_opsetid("", 20)]
    own = helper.make_function("own", "F", ["a"], ["b"], nodes, opsets, attribute_protos=[default])
    return model([helper.make_node("F", ["x"], ["y"], domain="own")], [], [own])


def in_sparse() -> onnx.ModelProto:
    made = in_initializer()
    del made.graph.initializer[:]
    indices = helper.make_tensor("indices", TensorProto.INT64, [4], [0, 1, 2, 3])
    made.graph.sparse_initializer.append(helper.make_sparse_tensor(tensor(), indices, [4]))
    return made


def in_training() -> onnx.ModelProto:
    made = model([helper.make_node("Identity", ["x"], ["y"])], [], [])
    made.training_info.add().algorithm.CopyFrom(in_initializer().graph)
    return made


PLACES: list[Callable[[], onnx.ModelProto]] = [
    in_initializer,
    in_constant,
    in_branch,
    in_function,
    in_default_of_function,
    in_sparse,
    in_training,
]


@pytest.mark.parametrize("place", PLACES)
def test_a_tensor_is_found_wherever_it_stands(place: Callable[[], onnx.ModelProto], tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(place().SerializeToString())
    assert external_locations(tmp_path / "m.onnx") == {HIDDEN}


def test_inputs_and_outputs_are_those_of_the_graph(tmp_path: Path) -> None:
    made = in_initializer()
    made.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    (tmp_path / "m.onnx").write_bytes(made.SerializeToString())
    graph = read_graph(tmp_path / "m.onnx")
    assert graph.inputs == {"x": ("float32", (None,))}
    assert graph.outputs == {"y": ("float32", (4,))}


def varint(value: int, size: int) -> bytes:
    """An integer in that many bytes at least, the last of which say nothing."""
    out = bytearray()
    while value > 0x7F or len(out) + 1 < size:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def rewritten(message: bytes, kind: str, draw: Callable[[str], Any]) -> bytes:
    """The same message to some reader: tags and lengths of other sizes, bits beyond the 32nd, a field cut in two."""
    out = b""
    for number, wire, value in fields(memoryview(message)):
        if isinstance(value, int):
            out += field(number, value)
            continue
        inner = bytes(value)
        if number in WAYS.get(kind, {}):
            inner = rewritten(inner, WAYS[kind][number], draw)
        tag = number << 3 | wire
        how = draw(f"{kind} {number}")
        if how == "high bit":
            out += varint(tag | 1 << draw("bit"), 5) + varint(len(inner), 1) + inner
        elif how == "long tag":
            out += varint(tag, draw("size")) + varint(len(inner), 1) + inner
        elif how == "long length":
            out += varint(tag, 1) + varint(len(inner), draw("size")) + inner
        elif how == "unknown before":
            out += field(number + draw("bit"), b"") + varint(tag, 1) + varint(len(inner), 1) + inner
        else:
            out += varint(tag, 1) + varint(len(inner), 1) + inner
    return out


def reads_hidden(path: Path) -> bool:
    """Whether ONNX Runtime, with what is hidden not there, looks for it."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        session.run(None, {"x": np.zeros(4, np.float32)})
    except Exception as error:
        return "hidden" in str(error)
    return False


def check(path: Path, data: bytes) -> None:
    """Where our reading sees no other file, ONNX Runtime looks for none."""
    path.write_bytes(data)
    try:
        locations = external_locations(path)
    except BundleError:
        return
    if not locations:
        assert not reads_hidden(path)


def mutate(data: st.DataObject) -> bytes:
    place = data.draw(st.sampled_from(PLACES))

    def draw(what: str) -> Any:
        if what == "bit":
            return data.draw(st.integers(32, 40))
        if what == "size":
            return data.draw(st.integers(1, 6))
        choices = ["plain"] * 6 + ["high bit", "long tag", "long length", "unknown before"]
        return data.draw(st.sampled_from(choices))

    return rewritten(place().SerializeToString(), "model", draw)


def test_the_runtime_does_look_for_it(tmp_path: Path) -> None:
    """What the property is held against: it notices a place of which nothing is said."""
    found = []
    for place in PLACES:
        (tmp_path / "m.onnx").write_bytes(place().SerializeToString())
        found.append(reads_hidden(tmp_path / "m.onnx"))
    assert sum(found) >= 4 and found[PLACES.index(in_initializer)]


def test_a_tag_with_a_bit_beyond_the_32nd_is_refused(tmp_path: Path) -> None:
    path, made = tmp_path / "m.onnx", in_initializer()
    graph = made.graph.SerializeToString()
    made.ClearField("graph")
    path.write_bytes(made.SerializeToString() + varint((7 << 3 | 2) | 1 << 32, 5) + varint(len(graph), 1) + graph)
    assert reads_hidden(path)
    with pytest.raises(BundleError, match="not an ONNX file"):
        external_locations(path)


@settings(max_examples=150, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_onnx_runtime_reads_nothing_that_was_not_seen(tmp_path: Path, data: st.DataObject) -> None:
    check(tmp_path / "m.onnx", mutate(data))


@pytest.mark.slow
@settings(max_examples=20_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_very_many_files(tmp_path: Path, data: st.DataObject) -> None:
    check(tmp_path / "m.onnx", mutate(data))


@settings(max_examples=100, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(place=st.sampled_from(PLACES), spot=st.integers(0, 2000), byte=st.integers(0, 255))
def test_a_file_with_another_byte(tmp_path: Path, place: Any, spot: int, byte: int) -> None:
    data = bytearray(place().SerializeToString())
    data[spot % len(data)] = byte
    check(tmp_path / "m.onnx", bytes(data))
