"""Gives each request an id, logs how each chat ended, and counts it."""

from __future__ import annotations

import logging
import re
import time
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cloc_mllm.serve.metrics import Metrics

LOGGER = logging.getLogger("cloc_mllm.serve")
CHAT_ROUTE = "/v1/chat/completions"
_HEADER = b"x-request-id"
_USABLE_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")  # of a client: it goes into the log
_NEVER_ANSWERED = 499  # nginx's status for a client that left


class RequestLog:
    """Middleware around the whole app, so that failures have their id, too."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = _id_of(scope)
        status = _NEVER_ANSWERED

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (_HEADER, request_id)]
            await send(message)

        started = time.perf_counter()
        try:
            await self.app(scope, receive, send_with_id)
        finally:
            if scope["path"] == CHAT_ROUTE:
                seconds = time.perf_counter() - started
                self.metrics.add_request(status, seconds)
                client = (scope.get("client") or ("-",))[0]
                LOGGER.info(
                    "request %s from %s: %d in %.3f s", request_id.decode(), client, status, seconds
                )


def _id_of(scope: Scope) -> bytes:
    """Returns the id that the client or a proxy gave, or a new one."""
    given = next((value for name, value in scope["headers"] if name == _HEADER), b"")
    return given if _USABLE_ID.fullmatch(given) else uuid.uuid4().hex.encode()
