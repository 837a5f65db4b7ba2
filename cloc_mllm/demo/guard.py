"""Middleware in front of the demo that refuses what Gradio would accept.

Gradio downloads any http(s) address that a request names as a file, and reads JSON bodies of any
size. The demo needs neither, so both are refused before Gradio sees them, and browsers are told to
load nothing from anywhere but this server.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MAX_BODY_BYTES = 1_000_000  # of everything but uploads, whose limit is Gradio's max_file_size
_JOINS_AT_ONCE = 4  # each holds the event loop for milliseconds; others come in between
_ROUTES_TO_ELSEWHERE = ("/file=http", "/proxy=", "/process_recording", "/vibe-")
# Gradio's own page needs inline scripts and evaluates its templates
_CONTENT_POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; object-src 'none'; base-uri 'self'; form-action 'self'"
)


class RequestGuard:
    """Refuses requests that name remote files or are too large; adds a content policy."""

    def __init__(self, app: App) -> None:
        self.app = app
        self._joining = asyncio.Semaphore(_JOINS_AT_ONCE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path: str = scope["path"]
        if any(route in path for route in _ROUTES_TO_ELSEWHERE):
            await _refuse(send, 403, "this server fetches nothing from elsewhere")
            return
        if scope["method"] == "POST" and not path.endswith("/upload"):
            body = await read_body(receive, MAX_BODY_BYTES)
            if body is None:
                await _refuse(send, 413, f"the request is larger than {MAX_BODY_BYTES} bytes")
                return
            if _names_remote_file(body):
                await _refuse(send, 400, "a picture must be uploaded; addresses are not fetched")
                return
            receive = _replay(body, receive)
        is_question = path.endswith("/queue/join")
        async with self._joining if is_question else contextlib.nullcontext():
            await self.app(scope, receive, _with_policy(send))


async def read_body(receive: Receive, max_bytes: int) -> bytes | None:
    """Reads the whole body; returns None if it is longer than `max_bytes`."""
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > max_bytes:
            return None
        if not message.get("more_body", False):
            return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Makes a `receive` that gives the body that was read and then whatever follows it."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return pending.pop() if pending else await receive()

    return receive_again


def _with_policy(send: Send) -> Send:
    async def send_with_policy(message: Message) -> None:
        if message["type"] == "http.response.start":
            policy = (b"content-security-policy", _CONTENT_POLICY.encode())
            message["headers"] = [*message.get("headers", []), policy]
        await send(message)

    return send_with_policy


def _names_remote_file(body: bytes) -> bool:
    """Tells whether a JSON body has a file whose `path` is an address or whose `url` is inline.

    The page itself sends the `url` of a picture on this server, so http in `url` is allowed; Gradio
    fetches from `path` only.
    """
    try:
        waiting = [json.loads(body)]
    except (ValueError, RecursionError):
        return False  # no JSON, which Gradio refuses itself
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting.extend(value)
        elif isinstance(value, dict):
            if _starts(value.get("path"), "http") or _starts(value.get("url"), "data:"):
                return True
            waiting.extend(value.values())
    return False


def _starts(value: object, prefix: str) -> bool:
    return isinstance(value, str) and value.strip().lower().startswith(prefix)


async def _refuse(send: Send, status: int, reason: str) -> None:
    body = json.dumps({"detail": reason}).encode()
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
