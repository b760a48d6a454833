"""A picture made band by band: what lies between takes the memory of some rows of pixels, not of all.

ONNX's ``Scan`` runs a graph for one band after the other and puts what it makes together.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto, helper

from calotype.engine.graph import Graph


def by_bands(
    graph: Graph, x: str, out: str, channels: int, m: int, tiles: int, band: Callable[[str, str], list[onnx.NodeProto]]
) -> list[onnx.NodeProto]:
    """The nodes that make ``out`` (B, channels, H, W) of ``x`` (B, C, H, W), of any size, a band after the other.

    Args:
        graph: gets the constants.
        x: read by nothing but what a band of the same rows, and the one row above and below it, is made of.
        out: names of values in between begin with it.
        channels: of ``out``.
        m: rows of a band are a multiple of it.
        tiles: of m x m pixels that a band has about.
        band: the nodes that make a value (B, channels, rows, W) of one (B, C, rows + 2, W), given both names. Above and
            below the picture its rows are zeros.
    """
    none, down = (graph.constant(f"{out}.{name}", np.asarray([axis])) for name, axis in {"none": 0, "down": 2}.items())
    body = helper.make_graph(
        [*_padded_band(x, out, none, down), *band(f"{out}.padded", f"{out}.band")],
        f"{out}.body",
        [helper.make_tensor_value_info(f"{out}.start", TensorProto.INT64, [])],
        [helper.make_tensor_value_info(f"{out}.band", TensorProto.FLOAT, None)],
    )
    shape = graph.constant(f"{out}.channels", np.asarray([channels, -1]))
    make = helper.make_node
    return [
        *_starts(graph, x, out, m, tiles),
        make("Scan", [f"{out}.starts"], [f"{out}.bands"], body=body, num_scan_inputs=1, scan_output_axes=[2]),
        make("Concat", [f"{out}.batch", shape, f"{out}.width"], [f"{out}.shape"], axis=0),
        make("Reshape", [f"{out}.bands", f"{out}.shape"], [f"{out}.joined"]),  # from (B, channels, bands, rows, W)
        make("Slice", [f"{out}.joined", none, f"{out}.height", down], [out]),  # the last band may reach below
    ]


def _starts(graph: Graph, x: str, out: str, m: int, tiles: int) -> list[onnx.NodeProto]:
    """Where bands begin, with the row above them: -1, rows - 1, 2 rows - 1, … ; and how far each reaches.

    Its rows are those of as many rows of tiles as have ``tiles`` tiles, one at least, no more than there are.
    """

    def constant(name: str, value: object) -> str:
        return graph.constant(f"{out}.{name}", np.asarray(value))

    make, one, tile = helper.make_node, constant("one", [1]), constant("m", [m])
    return [
        make("Shape", [x], [f"{out}.batch"], start=0, end=1),
        make("Shape", [x], [f"{out}.height"], start=2, end=3),
        make("Shape", [x], [f"{out}.width"], start=3),
        make("Mul", [f"{out}.batch", f"{out}.width"], [f"{out}.across"]),
        make("Div", [constant("most", [tiles * m]), f"{out}.across"], [f"{out}.fitting"]),
        make("Add", [f"{out}.height", constant("rest", [m - 1])], [f"{out}.rounded"]),
        make("Div", [f"{out}.rounded", tile], [f"{out}.all"]),
        make("Min", [f"{out}.fitting", f"{out}.all"], [f"{out}.few"]),
        make("Max", [f"{out}.few", one], [f"{out}.high"]),
        make("Mul", [f"{out}.high", tile], [f"{out}.rows"]),
        make("Add", [f"{out}.rows", constant("margins", [2])], [f"{out}.reach"]),
        make("Sub", [f"{out}.height", one], [f"{out}.last"]),
        make("Squeeze", [f"{out}.last"], [f"{out}.limit"]),
        make("Squeeze", [f"{out}.rows"], [f"{out}.delta"]),
        make("Range", [constant("above", -1), f"{out}.limit", f"{out}.delta"], [f"{out}.starts"]),
    ]


def _padded_band(x: str, out: str, none: str, down: str) -> list[onnx.NodeProto]:
    """The rows from ``start`` on, as many as ``reach`` says; zeros where the picture has none."""
    make = helper.make_node
    return [
        make("Max", [f"{out}.start", none], [f"{out}.first"]),
        make("Add", [f"{out}.start", f"{out}.reach"], [f"{out}.end"]),
        make("Slice", [x, f"{out}.first", f"{out}.end", down], [f"{out}.part"]),
        make("Sub", [f"{out}.first", f"{out}.start"], [f"{out}.top"]),
        make("Sub", [f"{out}.end", f"{out}.height"], [f"{out}.over"]),
        make("Max", [f"{out}.over", none], [f"{out}.bottom"]),
        make("Concat", [f"{out}.top", f"{out}.bottom"], [f"{out}.zeros"], axis=0),
        make("Pad", [f"{out}.part", f"{out}.zeros", "", down], [f"{out}.padded"]),
    ]
