"""Graphs rewritten for ONNX Runtime's CUDA kernels, in operators that it has on the CPU too.

Its ``MultiHeadAttention`` runs there as it is; ``GroupNorm`` and ``NhwcConv`` have no kernel there and are replaced by
what their description says, in standard operators.
"""

from __future__ import annotations

import onnx
import onnx.helper

LAST, FIRST = [0, 2, 3, 1], [0, 3, 1, 2]


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
