"""Huge bodies: what they cost in memory and in time of the event loop."""

from __future__ import annotations

import asyncio
import base64
import json
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="fastapi is not installed")

from cloc_mllm.mllm.processing import ClocMllmProcessor
from cloc_mllm.serve.errors import ApiError
from cloc_mllm.serve.intake import Intake
from cloc_mllm.serve.limits import Limits
from cloc_mllm.serve.schema import parse_body
from serve_abuse import BODIES

_MEGABYTE = 1_000_000


def arriving(body: bytes, piece: int = 65_536) -> Callable:
    """An ASGI `receive` that hands a body out in pieces."""
    starts = iter(range(0, len(body), piece))

    async def receive() -> dict:
        start = next(starts)
        return {
            "type": "http.request",
            "body": body[start : start + piece],
            "more_body": start + piece < len(body),
        }

    return receive


@pytest.fixture(scope="module")
def processor(mllm_dir: Path) -> ClocMllmProcessor:
    return ClocMllmProcessor.from_pretrained(mllm_dir)


@pytest.mark.parametrize("name", BODIES)
def test_a_huge_body_takes_little_memory(processor: ClocMllmProcessor, name: str) -> None:
    body = BODIES[name]()
    intake = Intake(processor, Limits(), "tiny")
    tracemalloc.start()
    with pytest.raises(ApiError) as refused:
        asyncio.run(intake.take(arriving(body)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    intake.close()
    assert refused.value.status == 400
    assert peak < 300 * _MEGABYTE


def test_the_event_loop_goes_on_while_a_body_is_parsed(processor: ClocMllmProcessor) -> None:
    intake = Intake(processor, Limits(), "tiny")

    async def longest_stop() -> float:
        taking = asyncio.ensure_future(intake.take(arriving(BODIES["boxes"]())))
        longest, last = 0.0, time.perf_counter()
        while not taking.done():
            await asyncio.sleep(0)
            longest, last = max(longest, time.perf_counter() - last), time.perf_counter()
        with pytest.raises(ApiError, match="commas and opening brackets"):
            taking.result()
        return longest

    assert asyncio.run(longest_stop()) < 0.5
    intake.close()


@pytest.mark.parametrize("name", ["text", "escapes", "escaped base64"])
def test_texts_are_counted_before_they_are_parsed(name: str) -> None:
    with pytest.raises(ApiError, match="bytes beside its pictures, the limit is"):
        parse_body(BODIES[name](), Limits())


def test_pictures_do_not_count_as_text() -> None:
    lines = base64.encodebytes(bytes(range(256)) * 8192).decode()
    part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{lines}"}}
    content = [part, {"type": "text", "text": "\U0001f980" * 8_000}, part]
    body = json.dumps({"messages": [{"role": "user", "content": content}]}).replace("/", "\\/")
    assert len(body) > 5 * Limits().text_bytes
    assert parse_body(body.encode(), Limits()).messages[0].content[2].image_url is not None


def test_bodies_that_arrive_are_bounded_together(processor: ClocMllmProcessor) -> None:
    intake = Intake(processor, Limits(bodies_bytes=250_000), "tiny")

    async def take(_: int) -> object:
        receive = arriving(b"x" * 100_000, piece=10_000)

        async def slowly() -> dict:
            await asyncio.sleep(0)
            return await receive()

        return await intake.take(slowly)

    async def three() -> list:
        return await asyncio.gather(*map(take, range(3)), return_exceptions=True)

    statuses = [error.status for error in asyncio.run(three())]
    assert sorted(statuses) == [400, 400, 503]
    assert intake._num_bytes_held == 0
    intake.close()


@pytest.mark.parametrize(
    ("pause_s", "rate", "is_refused"),
    [(0.05, 10, False), (0.05, 10_000, True), (60.0, 1, True)],
    ids=["fast enough", "too slow", "silent"],
)
def test_a_slow_body_is_refused(
    processor: ClocMllmProcessor, pause_s: float, rate: int, is_refused: bool
) -> None:
    intake = Intake(processor, Limits(body_seconds=1, body_rate=rate), "tiny")
    receive = arriving(b"x" * 40, piece=1)

    async def slowly() -> dict:
        await asyncio.sleep(pause_s)
        return await receive()

    with pytest.raises(ApiError) as refused:
        asyncio.run(intake.take(slowly))
    assert refused.value.status == (408 if is_refused else 400)
    intake.close()
