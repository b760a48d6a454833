"""Load on a server, from outside: requests arrive at their times whether or not those before them are answered."""

from __future__ import annotations

import dataclasses
import http.client
import itertools
import json
import random
import statistics
import time
import urllib.parse
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from calotype.runtime.errors import InputError, quoted

MOST_OPEN = 512  # connections at once; what comes later waits, and its wait counts
PROMPT = "a red apple, noto style"
ENDPOINT = "/v1/images/generations"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
    """What arrives.

    Attributes:
        rate: requests a second on average; they arrive at random, as a Poisson process.
        duration: seconds in which they arrive.
        steps: numbers of denoising steps, each as often as the others; None is the model's own.
        size: as the API takes it, such as "512x512"; None is the model's own.
        model: its name; None is the first that is served.
        prompt: of every picture.
        seed: of the arrivals and of the pictures: the same traffic again.
        slo: seconds within which an answer is good; None counts every picture.
        timeout: seconds after which the client gives up.
    """

    rate: float
    duration: float
    steps: tuple[int | None, ...] = (None,)
    size: str | None = None
    model: str | None = None
    prompt: str = PROMPT
    seed: int = 0
    slo: float | None = None
    timeout: float = 600.0

    def arrivals(self) -> list[tuple[float, dict[str, Any]]]:
        """Every request's time in seconds from the start, and its body."""
        source = random.Random(self.seed)
        found: list[tuple[float, dict[str, Any]]] = []
        at = source.expovariate(self.rate)
        while at < self.duration:
            body: dict[str, Any] = {"prompt": self.prompt, "seed": len(found)}
            steps = source.choice(self.steps)
            named = {"num_inference_steps": steps, "size": self.size, "model": self.model}
            found.append((at, body | {name: value for name, value in named.items() if value is not None}))
            at += source.expovariate(self.rate)
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """What came of a request.

    Attributes:
        steps: that it asked for; None is the model's own number.
        status: HTTP's; 0 where no answer came.
        latency: seconds from the time at which it was due until its last byte.
        late: seconds from that time until it was sent, which is the client's own fault.
        why: a word for what went wrong; "" where nothing did.
    """

    steps: int | None
    status: int
    latency: float
    late: float
    why: str = ""


def offer(url: str, traffic: Traffic, key: str | None = None) -> list[Answer]:
    """Send the traffic to a server that speaks OpenAI's images API, and wait for every answer.

    Args:
        url: such as ``http://127.0.0.1:8000``; what follows the host is put before the endpoint's path.
        traffic: what arrives.
        key: is sent as the bearer's.

    Raises:
        InputError: the address is none.
    """
    try:
        place = urllib.parse.urlsplit(url)
        place.port  # noqa: B018 - is read for its error
    except ValueError:
        place = urllib.parse.urlsplit("")
    if place.scheme not in ("http", "https") or not place.hostname:
        raise InputError(f"url={quoted(url)} is no address of a server; give http://127.0.0.1:8000")
    headers = {"Content-Type": "application/json"} | ({} if key is None else {"Authorization": f"Bearer {key}"})
    arrivals = traffic.arrivals()
    start = time.perf_counter() + 0.05

    def ask(due: float, body: Mapping[str, Any]) -> Answer:
        late = time.perf_counter() - start - due
        status, why = _post(place, json.dumps(body), headers, traffic.timeout)
        return Answer(
            steps=body.get("num_inference_steps"),
            status=status,
            latency=time.perf_counter() - start - due,
            late=late,
            why=why,
        )

    with ThreadPoolExecutor(MOST_OPEN, "load") as pool:
        futures = []
        for due, body in arrivals:
            time.sleep(max(0.0, start + due - time.perf_counter()))
            futures.append(pool.submit(ask, due, body))
        return [future.result() for future in futures]


def report(answers: Sequence[Answer], traffic: Traffic) -> dict[str, Any]:
    """The figures of a run: how many were answered how, and the seconds of those that got a picture.

    ``goodput`` is pictures a second of the traffic's duration that came within the SLO.
    """
    groups = {"all": list(answers)}
    if len(traffic.steps) > 1:
        groups |= {f"{steps} steps": [own for own in answers if own.steps == steps] for steps in traffic.steps}
    return {
        "traffic": dataclasses.asdict(traffic),
        "client_late_s": max((own.late for own in answers), default=0.0),
        "groups": [{"requests": name, **_figures(own, traffic)} for name, own in groups.items()],
        "refused": _refusals(answers),
    }


def compared(new: Any, old: Any) -> list[dict[str, Any]]:
    """Every figure that both reports have at the same place, and how many times the old one the new one is."""
    before = dict(_figures_in(old))
    return [
        {"figure": place, "before": before[place], "now": now, "times": now / before[place] if before[place] else None}
        for place, now in _figures_in(new)
        if place in before
    ]


def _post(place: urllib.parse.SplitResult, body: str, headers: Mapping[str, str], timeout: float) -> tuple[int, str]:
    """Status, and a word for what went wrong."""
    kind = http.client.HTTPSConnection if place.scheme == "https" else http.client.HTTPConnection
    assert place.hostname is not None
    connection = kind(place.hostname, place.port, timeout=timeout)
    try:
        connection.request("POST", place.path.rstrip("/") + ENDPOINT, body, dict(headers))
        answer = connection.getresponse()
        data = answer.read()
        return answer.status, "" if answer.status == 200 else _code(data)
    except (OSError, http.client.HTTPException) as error:
        return 0, type(error).__name__
    finally:
        connection.close()


def _code(data: bytes) -> str:
    """The code in an error's envelope."""
    try:
        error = json.loads(data)["error"]
        return str(error.get("code") or error.get("type"))
    except (ValueError, KeyError, TypeError, AttributeError):
        return "no envelope"


def _figures(answers: Sequence[Answer], traffic: Traffic) -> dict[str, Any]:
    seconds = sorted(own.latency for own in answers if own.status == 200)
    good = [own for own in seconds if traffic.slo is None or own <= traffic.slo]
    cut = statistics.quantiles(seconds, n=100, method="inclusive") if len(seconds) > 1 else seconds * 99
    return {
        "sent": len(answers),
        "pictures": len(seconds),
        "p50_s": cut[49] if seconds else None,
        "p95_s": cut[94] if seconds else None,
        "p99_s": cut[98] if seconds else None,
        "max_s": seconds[-1] if seconds else None,
        "goodput": len(good) / traffic.duration,
    }


def _refusals(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    failed = sorted((own.status, own.why, own.latency) for own in answers if own.status != 200)
    return [
        {"status": status, "why": why, "count": len(group), "median_s": statistics.median(own[2] for own in group)}
        for (status, why), group in (
            (key, list(own)) for key, own in itertools.groupby(failed, key=lambda own: (own[0], own[1]))
        )
    ]


def _figures_in(value: Any, place: str = "") -> list[tuple[str, float]]:
    """The numbers of a report by their places; a row of a list is known by its first text, or else by its number."""
    if isinstance(value, bool) or value is None:
        return []
    if isinstance(value, int | float):
        return [(place, float(value))]
    if isinstance(value, Mapping):
        return [item for name, own in value.items() for item in _figures_in(own, f"{place}.{name}".strip("."))]
    if isinstance(value, list):
        return [
            item for number, own in enumerate(value) for item in _figures_in(own, f"{place}[{_label(own, number)}]")
        ]
    return []


def _label(row: Any, number: int) -> str:
    texts = [own for own in row.values() if isinstance(own, str)] if isinstance(row, Mapping) else []
    return texts[0] if texts else str(number)
