"""OpenVINO GenAI's Text2ImagePipeline as a peer. Modes: ``f32`` computes in float32, none leaves that to OpenVINO.

It chooses bfloat16 where the processor has instructions for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.peers.protocol import Array, Made, Task, serve


class OpenVino:
    """A folder of OpenVINO models on the CPU."""

    def __init__(self, model: str, mode: str) -> None:
        import openvino_genai

        settings = {"INFERENCE_PRECISION_HINT": mode} if mode else {}
        self._pipeline = openvino_genai.Text2ImagePipeline(model, "CPU", **settings)

    def generate(self, task: Task, latents: Array) -> Made:
        """See :class:`Server`."""
        tensor = self._pipeline.generate(
            task.prompt,
            negative_prompt=task.negative_prompt,
            height=task.height,
            width=task.width,
            num_inference_steps=task.steps,
            guidance_scale=task.guidance_scale,
            num_images_per_prompt=task.images,
            generator=_given(latents),
        )
        metrics = self._pipeline.get_performance_metrics()
        stages = {
            "text_encoder": sum(metrics.get_text_encoder_infer_duration().values()) / 1e3,
            "vae_decoder": metrics.get_vae_decoder_infer_duration() / 1e3,
        }
        return Made(
            pictures=np.array(tensor.data),
            steps=[duration / 1e6 for duration in metrics.raw_metrics.iteration_durations],
            stages=stages,
        )


def _given(latents: Array) -> Any:
    """A source of random numbers that gives ``latents``, picture by picture."""
    import openvino
    import openvino_genai

    class Given(openvino_genai.Generator):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self._position = 0

        def next(self) -> float:
            value = float(latents.reshape(-1)[self._position])
            self._position += 1
            return value

        def randn_tensor(self, shape: Any) -> Any:
            count = int(np.prod(tuple(shape)))
            part = latents.reshape(-1)[self._position : self._position + count]
            self._position += count
            return openvino.Tensor(np.ascontiguousarray(part.reshape(tuple(shape))))

    return Given()


def imports() -> Mapping[str, str]:
    """OpenVINO and its pipelines."""
    import openvino
    import openvino_genai

    return {module.__name__: module.__version__ for module in (openvino, openvino_genai)}


if __name__ == "__main__":
    serve(OpenVino, imports)
