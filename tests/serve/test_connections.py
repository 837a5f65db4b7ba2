"""Connections that send nothing, or not all, over real sockets."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial

import pytest

pytest.importorskip("uvicorn", reason="uvicorn is not installed")

import uvicorn

from cloc_mllm.serve import listen
from cloc_mllm.serve.connections import BoundedProtocol, QueueingServer
from cloc_mllm.serve.limits import Limits

REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
_PATIENCE_S = 60


is_busy, is_free = threading.Event(), threading.Event()


async def app(scope: dict, receive, send) -> None:
    if scope["path"] == "/busy":  # holds the event loop
        is_busy.set()
        is_free.wait(_PATIENCE_S)
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body"})


@pytest.fixture
def port(request: pytest.FixtureRequest) -> Iterator[int]:
    """A server with the limits of the test's parameter."""
    http = partial(BoundedProtocol, limits=Limits(**request.param), waiting={})
    config = uvicorn.Config(app, http=http, lifespan="off", log_level="error", backlog=4)
    server = QueueingServer(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        yield listening.getsockname()[1]
        server.should_exit = True
        thread.join(_PATIENCE_S)
        assert not thread.is_alive()


def opened(port: int, sent: bytes = b"", source: str = "127.0.0.1") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), _PATIENCE_S, (source, 0))
    connection.sendall(sent)
    return connection


def is_closed(connection: socket.socket) -> bool:
    """Waits until something comes: the end of the connection, or an answer."""
    try:
        return connection.recv(100) == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize("port", [{"waiting_connections": 4, "head_seconds": 60}], indirect=True)
@pytest.mark.parametrize(
    "sent",
    [b"", REQUEST[:9], b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n1234"],
    ids=["nothing", "half a head", "half a body"],
)
def test_the_oldest_of_many_incomplete_requests_makes_room(port: int, sent: bytes) -> None:
    waiting = [opened(port, sent) for _ in range(20)]
    assert opened(port, REQUEST).recv(100).startswith(b"HTTP/1.1 204")
    assert all(is_closed(connection) for connection in waiting[:15])
    waiting[-1].settimeout(0.2)
    with pytest.raises(TimeoutError):
        waiting[-1].recv(1)


@pytest.mark.parametrize("port", [{"waiting_connections": 4, "head_seconds": 60}], indirect=True)
def test_room_is_made_by_the_address_with_the_most_connections(port: int) -> None:
    if sys.platform != "linux":
        pytest.skip("only Linux has all of 127.0.0.0/8")
    patient = opened(port, REQUEST[:9], "127.0.0.2")
    crowd = [opened(port) for _ in range(20)]
    assert all(is_closed(connection) for connection in crowd[:16])
    patient.sendall(REQUEST[9:])
    assert patient.recv(100).startswith(b"HTTP/1.1 204")


def test_answers_are_sent_at_once() -> None:
    with listen("127.0.0.1", 0) as listening:
        client = opened(listening.getsockname()[1])
        connection, _ = listening.accept()
        with client, connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize("port", [{"head_seconds": 1}], indirect=True)
@pytest.mark.parametrize("sent", [b"", REQUEST[:9], REQUEST + REQUEST[:9]])
def test_a_head_has_a_time_limit(port: int, sent: bytes) -> None:
    connection = opened(port, sent)
    if sent.startswith(REQUEST):
        assert connection.recv(100).startswith(b"HTTP/1.1 204")
    started = time.monotonic()
    assert is_closed(connection)
    assert time.monotonic() - started < _PATIENCE_S / 2


@pytest.mark.parametrize("port", [{"head_seconds": 1}], indirect=True)
def test_requests_one_after_another_are_answered(port: int) -> None:
    connection = opened(port, REQUEST + REQUEST)
    answers = b""
    while answers.count(b"HTTP/1.1 204") < 2:
        answers += connection.recv(1000)
    connection.sendall(REQUEST)
    assert connection.recv(100).startswith(b"HTTP/1.1 204")


@pytest.mark.parametrize("port", [{}], indirect=True)
def test_clients_wait_in_line_while_the_event_loop_is_busy(port: int) -> None:
    busy = opened(port, REQUEST.replace(b"/", b"/busy", 1))
    assert is_busy.wait(_PATIENCE_S)
    try:
        waiting = [socket.create_connection(("127.0.0.1", port), 0.9) for _ in range(50)]
    finally:
        is_free.set()
    for connection in [busy, *waiting]:
        connection.settimeout(_PATIENCE_S)
        connection.sendall(REQUEST)
        assert connection.recv(100).startswith(b"HTTP/1.1 204")
