"""Errors in the shape that OpenAI's clients read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from ldm.support.text import escaped

LONGEST_MESSAGE = 1000  # characters
NAMED = re.compile(r"^(?:unknown |the )?(\w+)")  # the option that a message of the library begins with


class ApiError(Exception):
    """A request that is answered with an error.

    Args:
        status: HTTP status.
        message: What was expected and what was given.
        param: The field at fault. Default: None.
        code: A word for programs, such as "invalid_size". Default: None.
        kind: OpenAI's type of the error. Default: "invalid_request_error".
        retry_after: Seconds after which a retry may help; None: it cannot help. Default: None.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.kind = status, param, code, kind
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """Return the error as JSON holds it."""
        message = escaped(self, LONGEST_MESSAGE)
        return {"error": {"message": message, "type": self.kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Return the headers that tell a client whether a retry can help."""
        if self.retry_after is None:
            return {"x-should-retry": "false"}
        return {"x-should-retry": "true", "retry-after": str(self.retry_after)}

    def response(self) -> JSONResponse:
        """Return the error as a response."""
        return JSONResponse(self.body(), status_code=self.status, headers=self.headers())


def bad_field(name: str, message: str, code: str = "invalid_value") -> ApiError:
    """Return the error for a value of a field; the message is preceded by the field's name."""
    return ApiError(400, f"{name}: {message}", param=name, code=code)


def refused_by_model(error: Exception, fields: Mapping[str, str]) -> ApiError:
    """Return the error for options that the library refuses.

    Args:
        error: Its error, whose message may begin with the name of an option.
        fields: Names of the library's options → names of the fields that they come from.
    """
    found = NAMED.match(str(error))
    param = fields.get(found[1]) if found else None
    return ApiError(400, str(error), param=param, code="invalid_value")


def server_failed(message: str = "the server failed to make the image; its log has the reason") -> ApiError:
    """Return the error for a failure of the server's own."""
    return ApiError(500, message, kind="server_error", code="server_error")
