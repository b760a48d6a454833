"""A 3 x 3 convolution with fewer products: m x m pixels at a time from (m + 2) x (m + 2) values a pair of channels.

Winograd's minimal filtering (Lavin and Gray 2015, arXiv 1509.09308) in ONNX's own operators: a strided convolution of
one channel transforms the pixels of each tile, matrix products of all tiles take the place of the kernel, and another
one turns sums into pixels. Per pixel and pair of channels 9 products become 4 (m = 2) or 2.25 (m = 4); weights grow by
16/9 or to 4 times. ``python -m benchmarks.micro convolutions`` says where that pays: not with few channels, nor with
large kernels on the few pixels of a UNet's deepest level.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from calotype.engine.bands import by_bands
from calotype.engine.graph import CONTRIB, Arrays, Graph, attributes, import_contrib
from calotype.runtime.graphs.winograd import POINTS, spread, transforms

FEWEST_CHANNELS = 256  # in or out; with fewer the transforms cost what the products save
LARGEST_KERNEL = 640 * 1280  # pairs of channels for which weights may take four times the room; above it, 16/9
# Tiles that are worked on at a time where a picture is larger than what came in, as a decoder's are. All at once they
# take gigabytes in SD 1.5's at 512 x 512 pixels; a UNet has few, and bands would cost it time.
BAND = 512
USUAL = {"pads": [1] * 4, "strides": [1, 1], "dilations": [1, 1], "group": 1, "auto_pad": b"NOTSET"}


def rewrite(model: onnx.ModelProto, stored: Arrays, largest: int = 4) -> dict[str, NDArray[np.float32]]:
    """Rewrite ``model`` in place where it pays; returns the weights that it reads besides ``stored``, by name.

    Args:
        model: with weights in ``stored`` where they are external data.
        stored: by name.
        largest: pixels a side that are made at a time at most; 4 rounds ten times as coarsely as one product after the
            other does, 2 about as finely.
    """
    graph, added = Graph(model.graph), dict[str, NDArray[np.float32]]()
    depths = halvings(graph)
    for index, m in tiles(graph).items():
        m = min(m, largest)
        if m in POINTS:
            convolution = graph.nodes[index]
            name = f"{convolution.output[0]}.weights"
            added[name] = spread(graph.floats(convolution.input[1], stored), m)
            weights = graph.external(name, added[name])
            graph.replace(convolution, minimal(graph, convolution, weights, m, bands=depths[index] < 0))
    graph.finish()
    import_contrib(model)
    return added


def growth(graph: Graph) -> int:
    """Bytes that weights in float32 grow by."""
    return sum(
        4 * ((m + 2) ** 2 - 9) * math.prod((graph.weight(graph.nodes[index].input[1]) or [])[:2])
        for index, m in tiles(graph).items()
    )


def tiles(graph: Graph) -> dict[int, int]:
    """How many pixels a side convolutions should make at a time, by the index of their nodes, where that pays."""
    found, depths = {}, halvings(graph)
    for index, node in enumerate(graph.nodes):
        kernel = graph.weight(node.input[1]) if node.op_type == "Conv" else None
        if kernel is None or kernel[2:] != [3, 3] or min(kernel[:2]) < FEWEST_CHANNELS or not _usual(node):
            continue
        if kernel[0] * kernel[1] <= LARGEST_KERNEL:
            found[index] = 4
        elif depths[index] < max(depths):
            found[index] = 2
    return found


def halvings(graph: Graph) -> list[int]:
    """How often the picture that a node makes was halved, of each node; below 0 where it is larger than the input."""
    of_value = dict.fromkeys(graph.inputs, 0)
    found = []
    for node in graph.nodes:
        read = [of_value[name] for name in node.input if name in of_value]
        depth = max(read, default=0)
        if node.op_type == "Conv" and attributes(node).get("strides") == [2, 2]:
            depth += 1
        elif node.op_type == "Resize":
            depth -= 1
        found.append(depth)
        if read and node.op_type != "Shape":  # a picture's size is no picture, nor what is computed from it
            of_value |= dict.fromkeys(node.output, depth)
    return found


def _usual(node: onnx.NodeProto) -> bool:
    how = {
        "pads": [0] * 4,
        "strides": [1, 1],
        "dilations": [1, 1],
        "group": 1,
        "auto_pad": b"NOTSET",
        **attributes(node),
    }
    return all(how[name] == value for name, value in USUAL.items())


def minimal(graph: Graph, node: onnx.NodeProto, weights: str, m: int, *, bands: bool = False) -> list[onnx.NodeProto]:
    """The nodes that compute ``node`` on x (B, C, H, W), of any size, by tiles of m x m pixels, with spread weights.

    With ``bands`` of about ``BAND`` tiles, one after the other.
    """
    (x, _, *bias), (out,) = node.input, node.output
    kernels, *_ = graph.weight(node.input[1]) or []
    column = []
    if bias:  # not in a band, where ONNX Runtime would keep a copy
        column = [helper.make_node("Reshape", [*bias, graph.constant(f"{out}.column", [-1, 1, 1])], [f"{out}.bias"])]
    # As many tiles as cover the picture, since it is padded by m on the right, and below.
    if not bands:
        return [*column, *_tiled(graph, node, weights, m, x, out, [1, 1, m, m])]
    make_band = functools.partial(_tiled, graph, node, weights, m, pads=[0, 1, 0, m])
    return [*column, *by_bands(graph, x, out, kernels, m, BAND, make_band)]


def _tiled(
    graph: Graph, node: onnx.NodeProto, weights: str, m: int, x: str, made: str, pads: list[int]
) -> list[onnx.NodeProto]:
    """The nodes that make ``made`` of ``x`` with as many zeros around it as ``pads`` says."""
    (_, weight, *bias), (out,), make = node.input, node.output, helper.make_node
    (kernels, channels, *_), size = graph.weight(weight) or [], (m + 2) ** 2
    back, _, tile = (np.einsum("ij,kl->ikjl", own, own) for own in transforms(m))
    cut = [axis for axis, zeros in ((2, pads[2]), (3, pads[3])) if zeros]  # where tiles reach beyond the picture

    def constant(name: str, value: Sequence[int] | NDArray[np.generic]) -> str:
        return graph.constant(f"{out}.{name}", np.asarray(value))

    nodes = [
        make("Transpose", [x], [f"{out}.turned"], perm=[1, 0, 2, 3]),
        make("Reshape", [f"{out}.turned", constant("planes", [-1, 1, 0, 0])], [f"{out}.plane"]),
        make(
            "Conv",
            [f"{out}.plane", constant("tile", tile.reshape(size, 1, m + 2, m + 2).astype(np.float32))],
            [f"{out}.seen"],
            kernel_shape=[m + 2] * 2,
            strides=[m, m],
            pads=pads,
        ),
        make("Shape", [f"{out}.seen"], [f"{out}.tiles"], start=2),
        make("ReduceProd", [f"{out}.tiles"], [f"{out}.count"]),
        make("Concat", [constant("factor", [channels, -1, size]), f"{out}.count"], [f"{out}.apart"], axis=0),
        make("Reshape", [f"{out}.seen", f"{out}.apart"], [f"{out}.factors"]),
        # Channels stand first in the factors, (C, B, size, tiles): read so, they need not be copied.
        make("FusedMatMul", [weights, f"{out}.factors"], [f"{out}.products"], domain=CONTRIB, transBatchB=1),
        make("Reshape", [f"{out}.products", constant("flat", [0, size, -1])], [f"{out}.sums"]),
        make("MatMul", [constant("back", back.reshape(m * m, size).astype(np.float32)), f"{out}.sums"], [f"{out}.own"]),
        make("Concat", [constant("blocks", [-1, m * m * kernels]), f"{out}.tiles"], [f"{out}.places"], axis=0),
        make("Reshape", [f"{out}.own", f"{out}.places"], [f"{out}.pixels"]),
        make("DepthToSpace", [f"{out}.pixels"], [f"{out}.whole"], blocksize=m, mode="DCR"),
        make("Shape", [x], [f"{out}.size"], start=cut[0]),
        make(
            "Slice",
            [f"{out}.whole", constant("corner", [0] * len(cut)), f"{out}.size", constant("sides", cut)],
            [f"{out}.cut" if bias else made],
        ),
    ]
    if bias:
        nodes.append(make("Add", [f"{out}.cut", f"{out}.bias"], [made]))
    return nodes
