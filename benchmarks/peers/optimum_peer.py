"""optimum-onnx's ONNX Runtime pipeline as a peer, on the graphs that its own exporter makes."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.peers.diffusers_peer import draw
from benchmarks.peers.protocol import Array, Made, Task, serve


class Optimum:
    """A folder of ONNX graphs on the CPU."""

    def __init__(self, model: str, mode: str) -> None:
        from optimum.onnxruntime import ORTStableDiffusionPipeline

        self._pipeline = ORTStableDiffusionPipeline.from_pretrained(model, provider="CPUExecutionProvider")
        self._pipeline.set_progress_bar_config(disable=True)

    def generate(self, task: Task, latents: Array) -> Made:
        """See :class:`Server`."""
        import torch

        return draw(self._pipeline, task, latents, torch.float32)


def imports() -> Mapping[str, str]:
    """The pipeline's class loads what it needs."""
    import importlib.metadata

    from optimum.onnxruntime import ORTStableDiffusionPipeline  # noqa: F401

    names = ("optimum-onnx", "onnxruntime", "diffusers", "transformers", "torch")
    return {name: importlib.metadata.version(name) for name in names}


if __name__ == "__main__":
    serve(Optimum, imports)
