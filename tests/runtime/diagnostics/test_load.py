"""``calotype bench --url``: what it sends, and what it counts."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from calotype.runtime.diagnostics.load import Answer, Traffic, compared, offer, report
from calotype.runtime.errors import InputError
from tests.runtime.command_line import calotype


class Images(BaseHTTPRequestHandler):
    """Draws at once what takes four steps, is full for eight, and hangs up on one."""

    seen: ClassVar[list[tuple[dict[str, Any], str | None]]] = []
    lock = threading.Lock()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.lock:
            self.seen.append((body, self.headers["Authorization"]))
        if body.get("num_inference_steps") == 1:
            self.close_connection = True
            return
        full = body.get("num_inference_steps") == 8
        text = json.dumps({"error": {"code": "queue_full"}} if full else {"data": []}).encode()
        self.send_response(429 if full else 200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args: Any) -> None:
        """Nothing."""


@pytest.fixture
def server() -> Iterator[str]:
    Images.seen = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Images) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_address[1]}"
        http.shutdown()
        thread.join()


def test_arrivals_are_a_poisson_process_and_the_same_for_a_seed() -> None:
    traffic = Traffic(rate=50, duration=40, steps=(4, 50))
    arrivals = traffic.arrivals()
    assert arrivals == traffic.arrivals() != Traffic(rate=50, duration=40, steps=(4, 50), seed=1).arrivals()
    gaps = [after - before for (before, _), (after, _) in itertools.pairwise(arrivals)]
    mean = sum(gaps) / len(gaps)
    spread = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert abs(len(arrivals) - 2000) < 3 * 2000**0.5  # three standard deviations
    assert 0.9 < spread / mean < 1.1  # an exponential's is its mean
    assert abs(sum(body["num_inference_steps"] == 4 for _, body in arrivals) - len(arrivals) / 2) < 3 * 500**0.5
    assert len({body["seed"] for _, body in arrivals}) == len(arrivals)


def test_every_request_is_sent_at_its_time_and_every_answer_counted(server: str) -> None:
    traffic = Traffic(rate=100, duration=0.4, steps=(4, 8, 1), size="64x64", model="talbot", slo=60)
    begin = time.perf_counter()
    found = report(offer(f"{server}/", traffic, "secret"), traffic)
    assert time.perf_counter() - begin >= traffic.arrivals()[-1][0]
    assert sorted(body["seed"] for body, _ in Images.seen) == list(range(len(traffic.arrivals())))
    assert {key for _, key in Images.seen} == {"Bearer secret"}
    assert {(body["size"], body["model"]) for body, _ in Images.seen} == {("64x64", "talbot")}
    groups = {row["requests"]: row for row in found["groups"]}
    sent = {steps: sum(body["num_inference_steps"] == steps for _, body in traffic.arrivals()) for steps in (4, 8, 1)}
    assert {steps: groups[f"{steps} steps"]["sent"] for steps in sent} == sent
    assert groups["all"]["pictures"] == groups["4 steps"]["pictures"] == sent[4]
    assert groups["all"]["goodput"] == pytest.approx(sent[4] / 0.4)
    assert [(row["status"], row["why"], row["count"]) for row in found["refused"]] == [
        (0, "RemoteDisconnected", sent[1]),
        (429, "queue_full", sent[8]),
    ]


def test_latency_counts_from_the_time_a_request_was_due() -> None:
    answers = [Answer(steps=None, status=200, latency=float(second), late=0.5) for second in range(1, 101)]
    traffic = Traffic(rate=1, duration=100, slo=50)
    found = report(answers, traffic)
    (row,) = found["groups"]
    assert (row["p50_s"], row["p95_s"], row["max_s"]) == pytest.approx((50.5, 95.05, 100.0))
    assert (row["goodput"], found["client_late_s"]) == (0.5, 0.5)
    (nothing,) = report([], traffic)["groups"]
    assert (nothing["p50_s"], nothing["goodput"]) == (None, 0.0)


def test_rows_of_two_reports_are_compared_by_their_names() -> None:
    old = {"groups": [{"requests": "all", "p50_s": 2.0}, {"requests": "4 steps", "p50_s": 0.0}], "gone": 1}
    new = {"groups": [{"requests": "4 steps", "p50_s": 1.0}, {"requests": "all", "p50_s": 3.0}]}
    assert compared(new, old) == [
        {"figure": "groups[4 steps].p50_s", "before": 0.0, "now": 1.0, "times": None},
        {"figure": "groups[all].p50_s", "before": 2.0, "now": 3.0, "times": 1.5},
    ]


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "file:///etc/passwd", "http://", "http://[1"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(InputError, match="no address of a server"):
        offer(url, Traffic(rate=1, duration=1))


def test_the_command_line_prints_a_table_json_and_a_comparison(server: str, tmp_path: Path) -> None:
    options = ("bench", "--url", server, "--rate", "40", "--duration", "0.3")
    printed = calotype(*options, "--json")
    assert printed.returncode == 0, printed.stderr
    earlier = tmp_path / "earlier.json"
    earlier.write_text(printed.stdout)
    told = calotype(*options, "--steps", "8", "--steps", "4")
    assert "queue_full" in told.stdout
    assert "8 steps" in told.stdout
    beside = calotype(*options, "--compare", earlier)
    assert "groups[all].p50_s" in beside.stdout
    earlier.write_text("{")
    assert calotype(*options, "--compare", earlier).returncode == 2
    assert calotype("bench", "--steps", "1", "--steps", "2").returncode == 2
