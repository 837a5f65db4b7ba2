"""Builds the routes of the endpoint, without sockets and signals."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from cloc_mllm.inference.grounding_predictor import GroundingPredictor
from cloc_mllm.inference.results import Answer
from cloc_mllm.serve.errors import ApiError, ClientGone, error_body
from cloc_mllm.serve.intake import Intake, check_model
from cloc_mllm.serve.limits import Limits
from cloc_mllm.serve.metrics import CONTENT_TYPE, Metrics
from cloc_mllm.serve.request_log import CHAT_ROUTE, RequestLog
from cloc_mllm.serve.responses import DONE, Completion, event, model_object
from cloc_mllm.serve.worker import QueuedRequest, Worker

_CLIENT_CLOSED_REQUEST = 499  # nginx's status; the client is gone, so nobody reads it

Value = TypeVar("Value")


def build_app(predictor: GroundingPredictor, name: str, limits: Limits) -> ASGIApp:
    """Builds the endpoint of one model.

    Args:
        name: what clients call the model.
    """
    metrics = Metrics()
    worker = Worker(predictor, limits, metrics)
    intake = Intake(predictor.processor, limits, name)
    started = int(time.time())

    @asynccontextmanager
    async def closing_worker(_: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(worker.close)
        await run_in_threadpool(intake.close)

    # without FastAPI's pages of documentation, which load scripts from other servers
    app = FastAPI(title="cloc-mllm", openapi_url=None, lifespan=closing_worker)
    _answer_errors(app, metrics)
    models = [model_object(name, started, predictor.processor)]

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "model": name, "requests": worker.num_taken}

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": models}

    @app.get("/v1/models/{wanted:path}")
    async def one_model(wanted: str) -> dict[str, Any]:
        check_model(wanted, name)
        return models[0]

    @app.get("/metrics")
    async def show_metrics() -> Response:
        num_waiting = worker.num_taken - worker.num_answering
        shown = metrics.text(worker.num_answering, num_waiting)
        return Response(shown, media_type=CONTENT_TYPE)

    @app.post(CHAT_ROUTE)
    async def complete(http: Request) -> Response:
        deadline = asyncio.get_running_loop().time() + limits.seconds
        _check_content_type(http)
        try:
            taken = await intake.take(http.receive)
        except ClientGone:
            return Response(status_code=_CLIENT_CLOSED_REQUEST)
        queued = worker.start(taken.checked, http.client.host if http.client else "")
        completion = Completion(name, taken.checked)
        if not taken.stream:
            return await _answer_whole(http, queued, completion, deadline)
        return await _answer_stream(http, queued, completion, deadline, taken.wants_usage)

    return RequestLog(app, metrics)


async def _answer_whole(
    http: Request, queued: QueuedRequest, completion: Completion, deadline: float
) -> Response:
    async def last_event() -> Answer:
        async for piece in queued.events(deadline):
            if isinstance(piece, Answer):
                return piece
        raise AssertionError("the events end with the answer")

    try:
        return JSONResponse(completion.whole(await _unless_gone(http, last_event())))
    except ClientGone:
        return Response(status_code=_CLIENT_CLOSED_REQUEST)
    finally:
        queued.cancel()


async def _answer_stream(
    http: Request, queued: QueuedRequest, completion: Completion, deadline: float, wants_usage: bool
) -> Response:
    """Streams an answer. The headers go out with the first token, so a refusal has its status."""
    events = queued.events(deadline)

    async def lines(first: str) -> AsyncIterator[str]:
        yield completion.chunk({"role": "assistant", "content": ""})
        for line in completion.chunks(first, wants_usage):
            yield line
        try:
            async for piece in events:
                for line in completion.chunks(piece, wants_usage):
                    yield line
        except ApiError as error:
            yield event(error.body())
        yield DONE

    try:
        first = await _unless_gone(http, anext(events))
    except ClientGone:
        queued.cancel()
        return Response(status_code=_CLIENT_CLOSED_REQUEST)
    except BaseException:
        queued.cancel()
        raise
    assert isinstance(first, str), "every answer begins with a token"
    return _CancellingStream(lines(first), queued)


class _CancellingStream(StreamingResponse):
    """A stream that stops the model however it ends: the client leaves, the server closes."""

    def __init__(self, lines: AsyncIterator[str], queued: QueuedRequest) -> None:
        super().__init__(
            lines, media_type="text/event-stream", headers={"cache-control": "no-cache"}
        )
        self._queued = queued

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._queued.cancel()


async def _unless_gone(http: Request, value: Awaitable[Value]) -> Value:
    """Awaits a value. Raises `ClientGone` as soon as the client closes the connection."""

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    waiting, leaving = asyncio.ensure_future(value), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({waiting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            raise ClientGone
        return waiting.result()
    finally:
        waiting.cancel()
        leaving.cancel()


def _check_content_type(http: Request) -> None:
    """Refuses what is not JSON.

    A page of another site may post a form here, but for JSON its browser first asks for permission,
    which this server never gives.
    """
    came = http.headers.get("content-type", "")
    if came.partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, f"expected content-type application/json, got {came[:80]!r}")


def _answer_errors(app: FastAPI, metrics: Metrics) -> None:
    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> Response:
        metrics.add_refusal(error.code or str(error.status))
        return JSONResponse(error.body(), error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def no_such_route(http: Request, error: HTTPException) -> Response:
        message = f"{error.detail}: {http.method} {http.url.path}"
        return JSONResponse(error_body(error.status_code, message), error.status_code)

    @app.exception_handler(Exception)  # logged by the server, which gets it after this
    async def failed(_: Request, error: Exception) -> Response:
        return JSONResponse(error_body(500, "the server failed; its log says more"), 500)
