"""What goes wrong as HTTP says it: every answer that is an error is made here, as OpenAI's clients read them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from calotype.runtime.errors import InputError, quoted, shortened
from calotype.serving.errors import ServingError

# What OpenAI's clients try again of their own accord.
RETRIED = frozenset({408, 409, 429})
TYPES: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    409: "conflict_error",
    429: "rate_limit_error",
    504: "timeout_error",
}
CODES: Mapping[int, str] = {
    400: "invalid_value",
    404: "not_found",
    405: "method_not_allowed",
    413: "request_too_large",
    415: "unsupported_media_type",
}
LONGEST = 500  # of a message, in characters
UNEXPECTED = "something went wrong inside the server; its log says more under this request's id"


class Answer(Response):
    """JSON in ASCII: what a client sent may have halves of characters in it, which UTF-8 cannot hold."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """See :class:`starlette.responses.JSONResponse`."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


def status_of(error: BaseException) -> int:
    """HTTP's number of what went wrong."""
    if isinstance(error, ServingError):
        return error.status
    if isinstance(error, HTTPException):
        return error.status_code
    return 400 if isinstance(error, InputError | RequestValidationError) else 500


def envelope(error: BaseException) -> dict[str, Any]:
    """``{"error": {message, type, param, code}}``; of what was not expected it says nothing but that."""
    status = status_of(error)
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    message, param, code = UNEXPECTED, None, CODES.get(status, "server_error" if status >= 500 else "invalid_value")
    if isinstance(error, RequestValidationError):
        message, param = _first(error.errors())
    elif isinstance(error, HTTPException):
        message = str(error.detail)
    elif isinstance(error, ServingError):
        message, code, param = str(error), error.code, getattr(error, "param", None)
    elif isinstance(error, InputError):
        message = str(error)
    line = " ".join(shortened(message, LONGEST).split())
    return {"error": {"message": line, "type": kind, "param": param, "code": code}}


def answer(error: BaseException) -> Answer:
    """The whole answer, with the headers that say whether and when to come back."""
    status, headers = status_of(error), dict(getattr(error, "headers", None) or {})
    after = getattr(error, "retry_after", None)
    if after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(after)))
    again = isinstance(error, ServingError) and error.retry
    if not again and (status in RETRIED or status >= 500):
        headers["x-should-retry"] = "false"
    if status == 401:
        headers["WWW-Authenticate"] = 'Bearer realm="calotype"'
    if status == 408:
        headers["Connection"] = "close"  # nobody reads the rest
    return Answer(envelope(error), status_code=status, headers=headers)


def expected(error: BaseException) -> bool:
    """Whether its message is meant for the client; anything else is a fault of ours, and may name paths."""
    return isinstance(error, ServingError | InputError | HTTPException | RequestValidationError)


def _first(errors: Sequence[Any]) -> tuple[str, str | None]:
    """The first of what pydantic finds wrong: a line, and the field."""
    if not errors:
        return "the request is not valid", None
    place = [str(part) for part in errors[0]["loc"]]
    if place[:1] == ["body"] or (len(place) > 1 and place[0] in ("query", "path", "header")):
        place = place[1:]
    told = errors[0]["msg"][:1].lower() + errors[0]["msg"][1:]
    if errors[0]["type"] == "json_invalid":
        return "the body is no JSON", None
    if not place:
        return f"the body is no request: {told}", None
    name = ".".join(place)
    return f"{quoted(name)[1:-1]}: {told}", shortened(name, 100)
