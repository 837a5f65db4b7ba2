"""Bounds the connections whose request is not there yet.

uvicorn waits for ever for a first request, and for the rest of one that has begun; its
`limit_concurrency` counts such connections but turns away whoever comes after them. Here each has a
time limit, and where too many wait, the client with the most of them loses its oldest.
"""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from cloc_mllm.serve.limits import Limits

MAX_CONNECTS_AT_ONCE = 128  # more than there are file descriptors would stop the server
_MAX_CONNECTS_WAITING = 4096  # in the kernel, for the event loop; Linux may grant fewer


class QueueingServer(uvicorn.Server):
    """uvicorn's server, behind a longer queue than the number of connections it takes at once.

    What finds the queue full is dropped, and its client tries again only after 1 s, then 3 s.
    """

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts to listen."""
        await super().startup(sockets)
        for listening in sockets or []:
            listening.listen(_MAX_CONNECTS_WAITING)


class BoundedProtocol(H11Protocol):
    """uvicorn's protocol for connections whose waiting is bounded.

    A connection waits until its request is complete, and from the answer until the next request is.
    The time of a head is limited here, that of a body by the `Intake`, that between two requests by
    uvicorn's `timeout_keep_alive`.

    Args:
        waiting: the server's waiting connections with their timers, oldest first.
    """

    def __init__(
        self,
        *args: Any,
        limits: Limits,
        waiting: dict[BoundedProtocol, asyncio.TimerHandle],
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.limits = limits
        self.waiting = waiting

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            return
        if self.cycle.more_body:
            self.waiting[self].cancel()
        else:
            self._stop_waiting()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        # it has another cycle where the next request was there already
        if self.cycle.response_complete and not self.transport.is_closing():
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """Closes a connection that waits when the server stops; others first get their answer."""
        if self in self.waiting:
            self.transport.abort()
        else:
            super().shutdown()

    def _wait(self) -> None:
        self._stop_waiting()
        self.waiting[self] = self.loop.call_later(self.limits.head_seconds, self.transport.abort)
        if len(self.waiting) > self.limits.waiting_connections:
            counts = Counter(one.address for one in self.waiting)
            one_too_many = max(self.waiting, key=lambda one: counts[one.address])
            one_too_many._stop_waiting()
            one_too_many.transport.abort()

    @property
    def address(self) -> str:
        """Whoever is at the other end; "" if it has left already."""
        return self.client[0] if self.client else ""

    def _stop_waiting(self) -> None:
        timer = self.waiting.pop(self, None)
        if timer is not None:
            timer.cancel()
