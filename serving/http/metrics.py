"""What Prometheus is told, in its conventions: https://prometheus.io/docs/practices/naming."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fastapi import APIRouter, Response
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from calotype.serving.errors import CancelledError, DeadlineError, WorkerDiedError
from calotype.serving.service import Service

OUTCOMES = ("finished", "rejected", "cancelled", "expired", "failed", "worker_died")
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)
STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25)
ROWS = (1, 2, 4, 6, 8, 12, 16, 24, 32)
TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """The figures of one server. A request is one picture here: one of HTTP's that asks for ``n`` counts ``n``."""

    def __init__(self, service: Service) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "calotype_requests", "Pictures asked for, by outcome.", ("model", "outcome"), registry=self.registry
        )
        self.responses = Counter(
            "calotype_http_responses", "Answers of HTTP.", ("method", "route", "status"), registry=self.registry
        )
        self._queue = self._histogram("queue", "From the request to its first run.")
        self._preview = self._histogram("first_preview", "From the request to the first preview.")
        self._step = self._histogram("step", "A step of a picture, on average over its steps.", STEP_SECONDS)
        self._decode = self._histogram("decode", "Turning latents into pixels.")
        self._total = self._histogram("total", "From the request to the picture.")
        self.registry.register(_Workers(service))
        ProcessCollector(registry=self.registry)

    def rejected(self, model: str, pictures: int) -> None:
        """So many were refused; ``model`` is one that is served, or "" for others."""
        self.requests.labels(model, "rejected").inc(pictures)

    def previewed(self, model: str, seconds: float) -> None:
        """The first preview came after so many."""
        self._preview.labels(model).observe(seconds)

    def finished(self, model: str, seconds: Mapping[str, float], steps: int) -> None:
        """A picture is drawn; ``seconds`` as of :class:`calotype.serving.tasks.Drawn`."""
        self.requests.labels(model, "finished").inc()
        for name, histogram in (("queue", self._queue), ("decode", self._decode), ("total", self._total)):
            if name in seconds:
                histogram.labels(model).observe(seconds[name])
        if steps and "denoise" in seconds:
            self._step.labels(model).observe(seconds["denoise"] / steps)

    def ended(self, model: str, error: BaseException) -> None:
        """A picture is not drawn."""
        self.requests.labels(model, outcome_of(error)).inc()

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
        return Histogram(f"calotype_{name}_seconds", text, ("model",), buckets=buckets, registry=self.registry)


def outcome_of(error: BaseException) -> str:
    """A word of ``OUTCOMES`` for what ended a picture that was accepted."""
    if isinstance(error, DeadlineError):
        return "expired"
    if isinstance(error, WorkerDiedError):
        return "worker_died"
    if isinstance(error, CancelledError) or not isinstance(error, Exception):
        return "cancelled"  # asyncio's own, too: the client has left
    return "failed"


def router(metrics: Metrics) -> APIRouter:
    """``GET /metrics``."""
    found = APIRouter(tags=["operation"])

    @found.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    def prometheus() -> Response:
        """Figures for Prometheus, in its text format."""
        return Response(generate_latest(metrics.registry), headers={"Content-Type": TYPE})

    return found


class _Workers(Collector):
    """What the service knows of itself, asked when Prometheus asks; what a worker does not say is left out.

    Of ``service.snapshot()["workers"]``, each a mapping: ``number``; ``device``; ``pid``, None where it does not run;
    ``restarts``; ``memory``, in bytes: ``resident`` of the process, ``device`` of its GPU; ``runs``, how many the
    denoiser had, by their number of rows.
    """

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Any]:
        """See Prometheus' client."""
        load = self._service.load
        yield GaugeMetricFamily("calotype_requests_waiting", "Pictures that no run has taken yet.", load.waiting)
        yield GaugeMetricFamily("calotype_requests_running", "Pictures that runs have taken.", load.running)
        yield GaugeMetricFamily("calotype_predicted_seconds", "Until all of them are finished.", load.seconds)
        ready = GaugeMetricFamily("calotype_model_ready", "Whether a model is open and warm.", labels=["model"])
        for model in self._service.models.values():
            ready.add_metric([model.name], float(model.ready))
        yield ready
        workers: list[Mapping[str, Any]] = self._service.snapshot().get("workers", [])
        labels = ["worker", "device"]
        up = GaugeMetricFamily("calotype_worker_up", "Whether a worker's process runs.", labels=labels)
        restarts = CounterMetricFamily("calotype_worker_restarts", "Of a worker's process.", labels=labels)
        resident = GaugeMetricFamily("calotype_worker_memory_bytes", "That a worker takes.", labels=labels)
        memory = GaugeMetricFamily("calotype_device_memory_bytes", "That a worker takes of its GPU.", labels=labels)
        rows = HistogramMetricFamily("calotype_batch_rows", "Rows of a run of the denoiser.", labels=labels)
        for worker in workers:
            device = worker.get("device")
            own = [str(worker.get("number", "")), "cpu" if device is None else str(device)]
            up.add_metric(own, float(worker.get("pid") is not None))
            restarts.add_metric(own, float(worker.get("restarts") or 0))
            taken = worker.get("memory") or {}
            for family, name in ((resident, "resident"), (memory, "device")):
                if taken.get(name) is not None:
                    family.add_metric(own, float(taken[name]))
            if worker.get("runs"):
                rows.add_metric(own, *_buckets(worker["runs"]))
        yield from (up, restarts, resident, memory, rows)


def _buckets(runs: Mapping[int, int]) -> tuple[list[tuple[str, float]], float]:
    """Prometheus' buckets, each with what those below it have, and the sum of all rows."""
    found = [(f"{bound:g}", float(sum(n for rows, n in runs.items() if rows <= bound))) for bound in ROWS]
    return [*found, ("+Inf", float(sum(runs.values())))], float(sum(rows * n for rows, n in runs.items()))
