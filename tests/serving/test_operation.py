"""Health, figures, logs, and what an operator may do."""

from __future__ import annotations

import json
import logging
from typing import Any

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from calotype.serving.errors import DrawingError, QueueFullError, WorkerDiedError
from calotype.serving.http.drawing import Settings
from calotype.serving.http.logs import JsonLines
from calotype.serving.http.security import Access
from tests.serving.conftest import Place
from tests.serving.test_security import ROOT, key

OPERATED = Settings(access=Access(admin_keys=(key(ROOT),)))


def test_health(place: Place) -> None:
    assert place.ask("GET", "/livez")[::2] == (200, {"status": "alive"})
    assert place.ask("GET", "/readyz")[::2] == (200, {"status": "ready", "why": {}})
    place.service.change("talbot", ready=False, why="its worker died three times")
    why = {"talbot": "its worker died three times"}
    assert place.ask("GET", "/readyz")[::2] == (503, {"status": "not ready", "why": why})
    place.service.stopping = True
    assert place.ask("GET", "/readyz")[::2] == (503, {"status": "not ready", "why": {"": "the server is stopping"}})
    assert place.ask("GET", "/livez")[0] == 200


def figures(place: Place) -> dict[str, float]:
    """By name and labels, as Prometheus' own parser reads them."""
    status, headers, text = place.ask("GET", "/metrics")
    assert status == 200 and headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    return {
        sample.name + "".join(f",{name}={sample.labels[name]}" for name in sorted(sample.labels)): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_figures(place: Place) -> None:
    before = figures(place)

    def more(name: str) -> float:
        return figures(place).get(name, 0) - before.get(name, 0)

    with place.client() as client:
        client.images.generate(prompt="x", n=2)
        list(client.images.generate(prompt="x", stream=True, partial_images=2))
        place.service.failure = DrawingError("no")
        with pytest.raises(openai.InternalServerError):
            client.images.generate(prompt="x")
        place.service.failure = WorkerDiedError("no")
        with pytest.raises(openai.InternalServerError):
            client.images.generate(prompt="x")
        place.service.failure, place.service.refusal = None, QueueFullError("no")
        with pytest.raises(openai.RateLimitError):
            client.images.generate(prompt="x", n=4)
        place.service.refusal, place.service.held = None, True
        with pytest.raises(openai.InternalServerError):
            client.images.generate(prompt="x", extra_body={"deadline": 0.05})
        stream = client.images.generate(prompt="x", stream=True)
        place.until(lambda: figures(place)["calotype_requests_waiting"] == 1)
        stream.close()
        place.until(lambda: more("calotype_requests_total,model=talbot,outcome=cancelled"))
    outcomes = {"finished": 3, "failed": 1, "worker_died": 1, "rejected": 4, "expired": 1, "cancelled": 1}
    for outcome, count in outcomes.items():
        assert more(f"calotype_requests_total,model=talbot,outcome={outcome}") == count, outcome
    for name in ("queue", "step", "decode", "total"):
        assert more(f"calotype_{name}_seconds_count,model=talbot") == 3, name
    assert more("calotype_first_preview_seconds_count,model=talbot") == 1
    now = figures(place)
    assert now["calotype_batch_rows_bucket,device=cpu,le=1,worker=0"] == 3
    assert now["calotype_batch_rows_bucket,device=cpu,le=2,worker=0"] == 8
    assert now["calotype_batch_rows_sum,device=cpu,worker=0"] == 13
    assert now["calotype_worker_restarts_total,device=cpu,worker=0"] == 2
    assert now["calotype_worker_memory_bytes,device=cpu,worker=0"] == 2**20
    assert now["calotype_model_ready,model=talbot"] == 1 and now["process_resident_memory_bytes"] > 0
    route = "method=POST,route=/v1/images/generations,status="
    assert more(f"calotype_http_responses_total,{route}429") == 1
    assert more(f"calotype_http_responses_total,{route}200") == 3


def test_what_clients_make_up_is_no_label(place: Place) -> None:
    place.ask("GET", "/made-up-by-a-client")
    place.ask("POST", "/v1/images/generations", b'{"prompt": "x", "model": "made-up"}', content_type="application/json")
    place.ask("GET", "/v1/models/made-up")
    assert "made-up" not in str(figures(place).keys())


def line(caplog: pytest.LogCaptureFixture, place: Place, request: str | None) -> dict[str, Any]:
    """The one line that there is of a request, as it is written; other tests' may come late."""

    def own() -> list[logging.LogRecord]:
        return [record for record in caplog.records if getattr(record, "fields", {}).get("id") == request]

    place.until(own)
    (record,) = own()
    found: dict[str, Any] = json.loads(JsonLines().format(record))
    return found


def test_a_line_for_each_request(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "calotype.serving.requests")
    with place.client() as client:
        answer = client.images.generate(prompt="a secret", n=2)
        found = line(caplog, place, answer._request_id)
        assert found["outcome"] == "finished"
        assert (found["method"], found["path"], found["status"]) == ("POST", "/v1/images/generations", 200)
        assert (found["model"], found["pictures"], found["address"], found["client"]) == ("talbot", 2, "127.0.0.1", "")
        assert 0 < found["denoise_seconds"] < found["seconds"] and found["level"] == "info"
        assert "secret" not in str(found)
        place.front.settings = Settings(log_prompts=True)
        answer = client.images.generate(prompt="a secret")
        assert line(caplog, place, answer._request_id)["prompt"] == "a secret"
        place.service.refusal = QueueFullError("full")
        with pytest.raises(openai.RateLimitError) as refused:
            client.images.generate(prompt="x")
        found = line(caplog, place, refused.value.request_id)
        assert (found["outcome"], found["error"], found["status"]) == ("rejected", "full", 429)
    _, headers, _ = place.ask("GET", "/\r\n{".replace("\r\n", "%0d%0a"))
    assert line(caplog, place, headers["x-request-id"])["path"] == "/\r\n{"


def test_an_operator_has_a_key_of_its_own(place: Place) -> None:
    for access in (Access(), OPERATED.access):
        place.front.settings = Settings(access=access)
        for path in ("/admin/state", "/admin/models/load", "/admin", "/admin/"):
            assert place.ask("GET", path)[0] == 401
            assert place.ask("GET", path, authorization="Bearer wrong")[0] == 401
    status, _, state = place.ask("GET", "/admin/state", authorization=f"Bearer {ROOT}")
    assert status == 200 and state["models"]["talbot"]["ready"] and state["workers"][0]["restarts"] == 2


def test_models_are_opened_closed_and_warmed_by_name(place: Place) -> None:
    place.front.settings = OPERATED

    def tell(what: str, **body: Any) -> tuple[int, Any]:
        headers = {"authorization": f"Bearer {ROOT}", "content_type": "application/json"}
        status, _, answer = place.ask("POST", f"/admin/models/{what}", json.dumps(body).encode(), **headers)
        return status, answer

    assert tell("load", model="talbot") == (202, {"model": "talbot", "ready": True, "why": ""})
    assert tell("unload", model="talbot")[0] == 202
    assert tell("warm", model="talbot", sizes=[[64, 96]])[0] == 202
    assert place.service.asked == [("open", "talbot"), ("unload", "talbot"), ("warm", ("talbot", [(64, 96)]))]
    for what in ("load", "unload"):
        assert tell(what, model="/etc")[0] == 404
    assert tell("warm", model="talbot", sizes=[[16384, 16384]])[1]["error"]["param"] == "sizes"
    assert tell("load", model="talbot", path="/etc")[1]["error"]["param"] == "path"
    place.service.held = True
    status, answer = tell("load", model="talbot")
    assert status == 409 and answer["error"]["code"] == "conflict"
