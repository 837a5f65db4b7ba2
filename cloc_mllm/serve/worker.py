"""Runs the model in one thread, and keeps the queue in front of it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor

from jinja2 import TemplateError

from cloc_mllm.data.images import ImageError
from cloc_mllm.inference.chat import PromptTooLong, answer_chat
from cloc_mllm.inference.grounding_predictor import GroundingPredictor
from cloc_mllm.inference.results import Answer
from cloc_mllm.serve.checks import CheckedRequest
from cloc_mllm.serve.errors import ApiError
from cloc_mllm.serve.limits import Limits
from cloc_mllm.serve.metrics import Metrics

_RETRY_AFTER_S = 5


class _Cancelled(Exception):
    """Raised into the model's loop when nobody waits for the answer any more."""


class QueuedRequest:
    """A request in the queue. Its events are pieces of text and then the answer."""

    def __init__(self) -> None:
        self.future: Future[Answer]
        self.cancelled = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[str | Future[Answer]] = asyncio.Queue()

    def cancel(self) -> None:
        """Leaves the queue, or stops after the current token; does nothing if it is done."""
        self.cancelled.set()
        self.future.cancel()

    def put(self, event: str | Future[Answer]) -> None:
        """Adds an event; may be called from any thread."""
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def events(self, deadline: float) -> AsyncIterator[str | Answer]:
        """Yields the events.

        Args:
            deadline: by the clock of the event loop.

        Raises:
            ApiError: the reason the request was refused for, or 504 at the deadline.
        """
        while True:
            left = deadline - self._loop.time()
            try:
                event = await asyncio.wait_for(self._events.get(), max(left, 0.0))
            except asyncio.TimeoutError as error:
                self.cancel()
                raise ApiError(
                    504, "the answer took too long; ask for less, or later", code="timeout"
                ) from error
            if isinstance(event, str):
                yield event
                continue
            try:
                yield event.result()
                return
            except (CancelledError, _Cancelled) as error:
                raise ApiError(503, "the server is closing", code="closing") from error


class Worker:
    """Answers one request at a time, in the order in which they came."""

    def __init__(self, predictor: GroundingPredictor, limits: Limits, metrics: Metrics) -> None:
        self.predictor = predictor
        self.metrics = metrics
        self._num_places = limits.waiting + 1
        self._num_taken = 0
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._unfinished: set[QueuedRequest] = set()

    @property
    def num_taken(self) -> int:
        """The number of requests that wait or are being answered."""
        return self._num_taken

    @property
    def num_answering(self) -> int:
        """The number of requests that are being answered."""
        return min(self._num_taken, 1)

    def start(self, request: CheckedRequest) -> QueuedRequest:
        """Puts a request into the queue; its place is given back when it is done.

        Raises:
            ApiError: 429, there is no place.
        """
        with self._lock:
            if self._num_taken >= self._num_places:
                raise ApiError(
                    429,
                    f"{self._num_taken} requests are waiting already; try again later",
                    code="queue_full",
                    headers={"Retry-After": str(_RETRY_AFTER_S)},
                )
            self._num_taken += 1
        queued = QueuedRequest()
        self._unfinished.add(queued)
        queued.future = self._pool.submit(self._answer, request, queued)
        queued.future.add_done_callback(lambda future: self._done(queued, future))
        return queued

    def close(self) -> None:
        """Stops what runs and waits for it; nothing else starts."""
        for queued in list(self._unfinished):
            queued.cancel()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _answer(self, request: CheckedRequest, queued: QueuedRequest) -> Answer:
        def on_token(piece: str) -> None:
            if queued.cancelled.is_set():
                raise _Cancelled
            queued.put(piece)

        try:
            answer = answer_chat(self.predictor, request.chat(), request.sampling, on_token)
            self.metrics.add_answer(answer)
            return answer
        except PromptTooLong as error:
            raise ApiError(
                400, str(error), param="messages", code="context_length_exceeded"
            ) from error
        except ImageError as error:
            raise ApiError(400, str(error), code="invalid_image") from error
        except TemplateError as error:
            raise ApiError(
                400,
                f"the model's chat template refuses these messages: {error}",
                param="messages",
            ) from error
        except ValueError as error:
            raise ApiError(400, str(error)) from error

    def _done(self, queued: QueuedRequest, future: Future[Answer]) -> None:
        self._unfinished.discard(queued)
        with self._lock:
            self._num_taken -= 1
        queued.put(future)
