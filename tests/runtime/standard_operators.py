"""Graphs rewritten for ONNX Runtime's CUDA kernels, in operators that it has on the CPU too.

Its ``MultiHeadAttention`` runs there as it is; ``GroupNorm`` and ``NhwcConv`` have no kernel there and are replaced by
what their description says, in standard operators.
"""

from __future__ import annotations

import numpy as np
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

        if node.op_type in ("GroupNorm", "SkipGroupNorm"):
            how = attributes(node)
            assert how["channels_last"] == 1
            assert {casts[name] for name in node.input[1:3]} == {onnx.TensorProto.FLOAT}
            x = node.input[0]
            if node.op_type == "SkipGroupNorm":
                skip, total = node.input[3], node.output[1] if len(node.output) == 2 else f"{out}.sum"
                if node.input[3].endswith(".skip"):  # (B, H, W, C), as x is; else (B, C)
                    skip = add("Identity", [skip], f"{out}.g")
                else:
                    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1, 2]), f"{out}.axes"))
                    skip = add("Unsqueeze", [skip, f"{out}.axes"], f"{out}.g")
                if len(node.input) == 5:
                    x = add("Add", [x, node.input[4]], f"{out}.h")
                x = add("Add", [x, skip], total)
            x = add("Cast", [add("Transpose", [x], f"{out}.a", perm=FIRST)], f"{out}.b", to=1)
            norm = {"num_groups": how["groups"], "epsilon": how["epsilon"]}
            x = add("GroupNormalization", [x, *node.input[1:3]], f"{out}.c", **norm)
            if how["activation"]:
                x = add("Mul", [x, add("Sigmoid", [x], f"{out}.d")], f"{out}.e")
            x = add("CastLike", [x, node.input[0]], f"{out}.f")
            add("Transpose", [x], out, perm=LAST)
        elif node.op_type == "NhwcConv":
            x = add("Transpose", [node.input[0]], f"{out}.a", perm=FIRST)
            kernel = add("Transpose", [node.input[1]], f"{out}.b", perm=FIRST)
            x = add("Conv", [x, kernel, *node.input[2:]], f"{out}.c", **attributes(node))
            add("Transpose", [x], out, perm=LAST)
        elif node.op_type == "BiasSplitGelu":
            halves = [f"{out}.a", f"{out}.b"]
            x = add("Add", list(node.input), f"{out}.c")
            made.append(onnx.helper.make_node("Split", [x], halves, axis=-1, num_outputs=2))
            add("Mul", [halves[0], add("Gelu", [halves[1]], f"{out}.d")], out)
        elif node.op_type == "BiasAdd":
            add("Add", [add("Add", list(node.input[:2]), f"{out}.a"), node.input[2]], out)
        else:
            made.append(node)
        found += made
    del model.graph.node[:]
    model.graph.node.extend(found)
    return model.SerializeToString()
