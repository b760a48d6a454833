"""Why a picture that was asked for is not drawn; each says what the client can do, and how HTTP puts it."""

from __future__ import annotations

from typing import ClassVar

from calotype.runtime.errors import CalotypeError


class ServingError(CalotypeError):
    """The root of what the server answers instead of a picture.

    Attributes:
        status: HTTP's.
        code: a word for programs.
        retry: whether the same request may succeed later.
        retry_after: in how many seconds; None where that is not known.
        usually: what ``retry_after`` is where nothing is said of it.
    """

    status: ClassVar[int] = 500
    code: ClassVar[str] = "server_error"
    retry: ClassVar[bool] = False
    usually: ClassVar[float | None] = None

    def __init__(self, message: object = "", *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = self.usually if retry_after is None else retry_after


class RequestRefusedError(ServingError):
    """The request cannot be drawn as it is; ``param`` names the field, None where it is not known."""

    status, code = 400, "invalid_value"

    def __init__(self, message: object = "", *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class UnknownModelError(ServingError):
    """There is no model of that name."""

    status, code = 404, "model_not_found"


class FilteredError(ServingError):
    """An output filter, or the model's safety checker, refuses the picture; a filter of one's own raises this."""

    status, code = 400, "moderation_blocked"


class AccessError(ServingError):
    """Nobody that is let in: no key, or an unknown one."""

    status, code = 401, "invalid_api_key"


class ForbiddenError(ServingError):
    """It comes from where it may not: a page of another site, or under a name that is not this server's."""

    status, code = 403, "forbidden"


class ConflictError(ServingError):
    """What an operator asks for does not fit what is going on: the model is being opened, say."""

    status, code = 409, "conflict"


class TooLargeError(ServingError):
    """The body is larger than is read."""

    status, code = 413, "request_too_large"


class MediaTypeError(ServingError):
    """The body is of a kind that is not taken here."""

    status, code = 415, "unsupported_media_type"


class SlowError(ServingError):
    """The body did not arrive in time."""

    status, code = 408, "request_timeout"


class RateLimitError(ServingError):
    """The key has asked for more than it may at once, or in a minute."""

    status, code, retry = 429, "rate_limit_exceeded", True


class QueueFullError(ServingError):
    """So much is waiting that this would wait too long; ``retry_after`` says when to come back."""

    status, code, retry = 429, "queue_full", True


class NotReadyError(ServingError):
    """The model is not open (yet), or the server is stopping; ``retry_after`` says when to come back."""

    status, code, retry, usually = 503, "not_ready", True, 10.0


class OutOfMemoryError(ServingError):
    """What was asked for does not fit into memory; what others asked for is not touched."""

    status, code, retry = 503, "out_of_memory", False


class DeadlineError(ServingError):
    """The deadline cannot be met, or has passed."""

    status, code, retry = 504, "deadline_exceeded", False


class CancelledError(ServingError):
    """The client, or an operator, no longer wants it."""

    status, code = 499, "cancelled"


class WorkerDiedError(ServingError):
    """The processes that drew it died, more than once; it is not tried again."""

    status, code = 500, "worker_died"


class DrawingError(ServingError):
    """The engine failed, or what came out is no picture."""

    status, code = 500, "drawing_failed"
