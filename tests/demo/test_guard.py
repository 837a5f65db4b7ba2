"""The middleware refuses addresses and huge bodies, and leaves the rest as it came."""

from __future__ import annotations

import asyncio
import json

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.testclient import TestClient

from cloc_mllm.demo.guard import MAX_BODY_BYTES, RequestGuard

PICTURE = {"meta": {"_type": "gradio.FileData"}}


@pytest.fixture
def client() -> TestClient:
    """A guarded server that sends every body back."""

    async def echo(request: Request) -> Response:
        return Response(await request.body())

    app = Starlette(routes=[Route("/{path:path}", echo, methods=["GET", "POST"])])
    app.add_middleware(RequestGuard)
    return TestClient(app)


def post(client: TestClient, data: object):
    return client.post("/gradio_api/queue/join", content=json.dumps({"data": [data]}))


@pytest.mark.parametrize(
    "data",
    [
        PICTURE | {"path": "http://127.0.0.1:1/secret"},
        PICTURE | {"path": "http://169.254.169.254/latest/meta-data"},
        PICTURE | {"path": "https://example.org/a.png"},
        PICTURE | {"path": "HTTPS://example.org/a.png"},
        {"deep": [[{"er": PICTURE | {"path": "http://example.org"}}]]},
        PICTURE | {"path": "/tmp/x.png", "url": "data:image/png;base64,AAAA"},
    ],
)
def test_addresses_are_refused(client: TestClient, data: object) -> None:
    response = post(client, data)
    assert response.status_code == 400
    assert "addresses are not fetched" in response.json()["detail"]


def test_escaped_key_is_no_way_around(client: TestClient) -> None:
    body = r'{"data":[{"\u0070ath":"\u0068ttp://example.org"}]}'
    assert client.post("/gradio_api/run/find", content=body).status_code == 400


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=https://example.org/a.png",
        "/gradio_api/file=%68ttp://example.org/a.png",
        "/gradio_api/proxy=https://example.org",
    ],
)
def test_routes_to_elsewhere_are_refused(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 403


def test_what_the_page_sends_passes_unchanged(client: TestClient) -> None:
    sent = {"data": [PICTURE | {"path": "/tmp/x.png", "url": "http://127.0.0.1:7860/x"}, "http:"]}
    response = client.post("/gradio_api/queue/join", json=sent)
    assert response.status_code == 200
    assert response.json() == sent


def test_huge_body_is_refused_but_uploads_have_their_own_limit(client: TestClient) -> None:
    huge = b" " * (MAX_BODY_BYTES + 1)
    assert client.post("/gradio_api/queue/join", content=huge).status_code == 413
    assert client.post("/gradio_api/upload", content=huge).status_code == 200


@pytest.mark.parametrize("body", [b"", b"no json", b"[" * 100_000, b"\xff\xfe"])
def test_what_is_no_json_is_left_to_gradio(client: TestClient, body: bytes) -> None:
    assert client.post("/gradio_api/reset", content=body).content == body


def test_page_may_load_from_this_server_only(client: TestClient) -> None:
    policy = client.get("/").headers["content-security-policy"]
    assert policy.startswith("default-src 'self'")
    assert "http" not in policy


def test_few_questions_at_once_join_the_line() -> None:
    now, most = 0, 0

    async def app(scope, receive, send) -> None:
        nonlocal now, most
        now, most = now + 1, max(most, now + 1)
        await asyncio.sleep(0.01)
        now -= 1

    async def receive() -> dict:
        return {"type": "http.request", "body": b"{}"}

    async def crowd(path: str) -> int:
        nonlocal most
        most, guard = 0, RequestGuard(app)
        scope = {"type": "http", "path": path, "method": "POST"}
        await asyncio.gather(*[guard(scope, receive, None) for _ in range(20)])
        return most

    assert asyncio.run(crowd("/gradio_api/queue/join")) == 4
    assert asyncio.run(crowd("/gradio_api/upload")) == 20
