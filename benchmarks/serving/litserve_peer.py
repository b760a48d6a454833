"""LitServe with dynamic batching over a pipeline of diffusers: what waits at the same time is drawn in one call.

python litserve_peer.py CHECKPOINT SIZE PORT
"""

from __future__ import annotations

import itertools
import sys
from typing import Any

import litserve
from drawing import STEPS, draw, load

MOST, WAIT = 8, 0.05  # requests of a batch, seconds


class Images(litserve.LitAPI):
    """Requests of a batch that take the same number of steps share a call."""

    def setup(self, device: str) -> None:
        """Open the pipeline; see LitServe."""
        self.pipeline = load(sys.argv[1])

    def predict(self, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Draw a batch; see LitServe."""
        order = sorted(range(len(bodies)), key=lambda number: bodies[number].get("num_inference_steps", STEPS))
        answers: list[dict[str, Any]] = [{}] * len(bodies)
        for _, group in itertools.groupby(order, key=lambda number: bodies[number].get("num_inference_steps", STEPS)):
            numbers = list(group)
            drawn = draw(self.pipeline, [bodies[number] for number in numbers], int(sys.argv[2]))
            for number, own in zip(numbers, drawn, strict=True):
                answers[number] = own
        return answers


if __name__ == "__main__":
    api = Images(max_batch_size=MOST, batch_timeout=WAIT, api_path="/v1/images/generations")
    server = litserve.LitServer(api, accelerator="cpu", timeout=False, healthcheck_path="/readyz")
    server.run(host="127.0.0.1", port=int(sys.argv[3]), generate_client_file=False, log_level="warning")
