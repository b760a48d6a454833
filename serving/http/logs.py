"""What the server says of itself: a line of JSON for each request, with its id; prompts only where asked for."""

from __future__ import annotations

import dataclasses
import json
import logging
import secrets
import time
from typing import Any

from prometheus_client import Counter
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from calotype.runtime.errors import shortened
from calotype.serving.http.answers import answer, expected

logger = logging.getLogger("calotype.serving.requests")
LONGEST = 200  # of a path, in characters
KEY = "calotype"  # in a scope
GONE = 499  # the client left before there was an answer


@dataclasses.dataclass(kw_only=True)
class Record:
    """What is known of a request on its way.

    Attributes:
        id: names it in its answer, in logs and in the ids of its tasks.
        client: the name of its key; "" where none is needed.
        address: where it comes from, by the nearest proxy that is trusted; "" of a socket file.
        fields: what else its line says; ``model``, ``pictures``, ``outcome``, and more.
    """

    id: str = dataclasses.field(default_factory=lambda: f"req_{secrets.token_hex(12)}")
    client: str = ""
    address: str = ""
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)


def record_of(scope: Scope) -> Record:
    """The record of the request that ``scope`` is of."""
    found: Record = scope[KEY]
    return found


class JsonLines(logging.Formatter):
    """Log records as lines of JSON: ``time``, ``level``, ``logger``, ``message``, and what ``fields`` has."""

    def format(self, record: logging.LogRecord) -> str:
        """See :class:`logging.Formatter`."""
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class RequestLog:
    """The outermost layer: gives each request its id, answers what went wrong below, and writes its line."""

    def __init__(self, app: ASGIApp, count: Counter) -> None:
        self._app, self._count = app, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = scope[KEY] = Record()
        begin, status, failure = time.monotonic(), 0, None

        async def told(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", record.id.encode())]
            await send(message)

        try:
            try:
                await self._app(scope, receive, told)
            except Exception as error:
                failure = error
                if status:  # half of an answer is out: the connection has to end
                    raise
                await answer(error)(scope, receive, told)
        finally:
            self._write(scope, record, status or GONE, time.monotonic() - begin, failure)

    def _write(self, scope: Scope, record: Record, status: int, seconds: float, failure: Exception | None) -> None:
        unexpected = failure is not None and not expected(failure)
        fields = {
            "id": record.id,
            "method": scope["method"],
            "path": shortened(scope["path"], LONGEST),
            "status": status,
            "seconds": round(seconds, 6),
            "client": record.client,
            "address": record.address,
            **record.fields,
        }
        if failure is not None and not unexpected:
            fields["error"] = " ".join(str(failure).split())
        route = getattr(scope.get("route"), "path", "")  # what a client made up is no label
        self._count.labels(scope["method"] if route else "", route, str(status)).inc()
        level = logging.ERROR if unexpected else logging.WARNING if status >= 500 else logging.INFO
        logger.log(level, "request", exc_info=failure if unexpected else None, extra={"fields": fields})


def note(scope: Scope, error: BaseException) -> None:
    """Have a request's line say why it was not drawn; what nobody expected is logged at once, with its trace."""
    record = record_of(scope)
    record.fields["error"] = " ".join(str(error).split()) if expected(error) else type(error).__name__
    if not expected(error):
        logger.error("%s", record.id, exc_info=error, extra={"fields": {"id": record.id}})
