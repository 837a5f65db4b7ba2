"""Takes requests in: reads, parses and checks their bodies, without holding up the event loop."""

from __future__ import annotations

import asyncio
import ctypes
import sys
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass

from starlette.types import Message, Receive

from cloc_mllm.mllm.processing import ClocMllmProcessor
from cloc_mllm.serve.checks import CheckedRequest, check_request
from cloc_mllm.serve.errors import ApiError, ClientGone
from cloc_mllm.serve.limits import Limits
from cloc_mllm.serve.schema import parse_body

_LARGE_BODY_BYTES = 1_000_000
_CLOSE = {"Connection": "close"}  # the rest of the body is not read


@dataclass(frozen=True)
class Taken:
    """A request that has arrived.

    Args:
        stream: whether the answer is sent in pieces.
        wants_usage: whether a stream ends with the numbers of tokens.
    """

    checked: CheckedRequest
    stream: bool
    wants_usage: bool


class Intake:
    """Reads and checks requests.

    Bodies are parsed one after another in one thread, so that the memory this takes, several times
    the size of a body, is taken once. The bodies that wait are bounded together.

    Args:
        name: what clients call the model.
    """

    def __init__(self, processor: ClocMllmProcessor, limits: Limits, name: str) -> None:
        self.processor = processor
        self.limits = limits
        self.name = name
        self._num_bytes_held = 0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="intake")

    async def take(self, receive: Receive) -> Taken:
        """Reads, parses and checks a request.

        Raises:
            ApiError: why it is refused.
            ClientGone: the client left before the body was there.
        """
        async with self._body(receive) as body:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._pool, self._check, body)

    def close(self) -> None:
        """Waits for the request that is being checked."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    @asynccontextmanager
    async def _body(self, receive: Receive) -> AsyncIterator[bytearray]:
        """Reads a body, which the block may hold."""
        body = bytearray()
        started = asyncio.get_running_loop().time()
        try:
            more = True
            while more:
                message = await self._next(receive, started, len(body))
                if message["type"] == "http.disconnect":
                    raise ClientGone
                piece = message.get("body", b"")
                body += piece
                self._num_bytes_held += len(piece)
                self._check_size(len(body))
                more = message.get("more_body", False)
            yield body
        finally:
            self._num_bytes_held -= len(body)
            if len(body) > _LARGE_BODY_BYTES:
                body.clear()
                self._pool.submit(_give_memory_back)

    async def _next(self, receive: Receive, started: float, num_bytes: int) -> Message:
        """Waits for the next piece, as long as a body of so many bytes may take by now."""
        allowed = min(
            self.limits.seconds, self.limits.body_seconds + num_bytes / self.limits.body_rate
        )
        left = started + allowed - asyncio.get_running_loop().time()
        try:
            return await asyncio.wait_for(receive(), max(left, 0.0))
        except asyncio.TimeoutError as error:
            raise ApiError(
                408,
                f"{num_bytes:,} bytes of the request came in {allowed:.0f} s, which is too slow",
                code="timeout",
                headers=_CLOSE,
            ) from error

    def _check_size(self, num_bytes: int) -> None:
        if num_bytes > self.limits.body_bytes:
            raise ApiError(
                413,
                f"the request is larger than {self.limits.body_bytes:,} bytes; send smaller "
                "pictures",
                code="request_too_large",
                headers=_CLOSE,
            )
        if self._num_bytes_held > self.limits.bodies_bytes:
            raise ApiError(
                503,
                "too many large requests are arriving at once; try again later",
                code="busy",
                headers=_CLOSE | {"Retry-After": "5"},
            )

    def _check(self, body: bytearray) -> Taken:
        request = parse_body(body, self.limits)
        check_model(request.model or self.name, self.name)
        checked = check_request(request, self.limits, self.processor)
        wants_usage = request.stream_options and request.stream_options.include_usage
        return Taken(checked, bool(request.stream), bool(wants_usage))


def check_model(wanted: str, name: str) -> None:
    """Raises `ApiError` 404 if a client asks for another model than the one here."""
    if wanted != name:
        raise ApiError(
            404,
            f"there is no model {wanted[:80]!r} here; ask {name!r}",
            param="model",
            code="model_not_found",
        )


def _give_memory_back() -> None:
    """Returns freed memory to the system, which glibc would keep for the next large body."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)
