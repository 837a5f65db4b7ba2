"""Refusals of the endpoint, in the form of OpenAI's errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class ClientGone(Exception):
    """The client closed the connection before there was anything to send."""


class ApiError(Exception):
    """A refusal with its HTTP status.

    Args:
        message: what was expected, what came and what to do.
        param: path of the field, such as `messages[0].content[1].image_url.url`.
        code: a word that programs can check for.
        headers: headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers

    def body(self) -> dict[str, Any]:
        """Makes the JSON that is sent."""
        return error_body(self.status, str(self), self.param, self.code)


def error_body(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """Makes the JSON of OpenAI's errors."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    kind = "rate_limit_error" if status == 429 else kind
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
