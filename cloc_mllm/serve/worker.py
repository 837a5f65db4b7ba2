"""Runs the model in one thread, and keeps the queue in front of it."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import CancelledError, Future

from jinja2 import TemplateError

from cloc_mllm.data.images import ImageError, open_image
from cloc_mllm.inference.chat import PromptTooLong, prepare_chat
from cloc_mllm.inference.chat_batch import ChatBatch, Row
from cloc_mllm.inference.grounding_predictor import GroundingPredictor
from cloc_mllm.inference.inputs import EncodedImage
from cloc_mllm.inference.results import Answer
from cloc_mllm.serve.checks import CheckedRequest
from cloc_mllm.serve.errors import ApiError
from cloc_mllm.serve.limits import Limits
from cloc_mllm.serve.metrics import Metrics

_RETRY_AFTER_S = 5


class _Cancelled(Exception):
    """Raised into the model's loop when nobody waits for the answer any more."""


class QueuedRequest:
    """A request in the queue. Its events are pieces of text and then the answer.

    Args:
        client: whoever asks, for fairness.
    """

    def __init__(self, request: CheckedRequest, client: str) -> None:
        self.request = request
        self.client = client
        self.row: Row | None = None
        self.future: Future[Answer] = Future()
        self.cancelled = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[str | Future[Answer]] = asyncio.Queue()

    def on_token(self, piece: str) -> None:
        """Passes a piece on. Raises `_Cancelled` if nobody waits for it."""
        if self.cancelled.is_set():
            raise _Cancelled
        self.put(piece)

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
    """Answers requests in one thread: up to `limits.together` at once, the others wait.

    When there is room, the request of the client with the fewest answers under way is next, of
    several the one that came first.
    """

    def __init__(self, predictor: GroundingPredictor, limits: Limits, metrics: Metrics) -> None:
        self.predictor = predictor
        self.limits = limits
        self.metrics = metrics
        self._images = _ImageCache(predictor, limits.known_bytes)
        self._batch = ChatBatch(predictor, limits.known_bytes)
        self._answering: dict[Row, QueuedRequest] = {}
        self._waiting: list[QueuedRequest] = []
        self._unfinished: set[QueuedRequest] = set()
        self._changed = threading.Condition()
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    @property
    def num_taken(self) -> int:
        """The number of requests that wait or are being answered."""
        return len(self._unfinished)

    @property
    def num_answering(self) -> int:
        """The number of requests that are being answered."""
        return len(self._answering)

    def start(self, request: CheckedRequest, client: str = "") -> QueuedRequest:
        """Puts a request into the queue; its place is given back when it is done.

        Raises:
            ApiError: 429, there is no place.
        """
        queued = QueuedRequest(request, client)
        with self._changed:
            if self.num_taken >= self.limits.waiting + self.limits.together:
                raise ApiError(
                    429,
                    f"{self.num_taken} requests are waiting already; try again later",
                    code="queue_full",
                    headers={"Retry-After": str(_RETRY_AFTER_S)},
                )
            self._unfinished.add(queued)
            self._waiting.append(queued)
            self._changed.notify()
        queued.future.add_done_callback(lambda future: self._done(queued, future))
        return queued

    def close(self) -> None:
        """Stops what runs and waits for it; nothing else starts."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        for queued in list(self._unfinished):
            queued.cancel()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._answering or self._is_closing)
                if self._is_closing and not self._answering:
                    return
            try:
                ended = self._batch.step() if self._batch.rows else []
                self._finish(ended)
                if joining := self._next():
                    self._finish(self._batch.join(joining))
            except Exception as error:  # noqa: BLE001  every request that it hits gets it
                self._batch.clear()
                for queued in self._answering.values():
                    queued.future.set_exception(error)
                self._answering.clear()

    def _next(self) -> list[Row]:
        """Takes the waiting requests that can be answered now."""
        joining: list[Row] = []
        while len(self._answering) < self.limits.together:
            with self._changed:
                if not self._waiting:
                    break
                running = Counter(queued.client for queued in self._answering.values())
                queued = min(self._waiting, key=lambda queued: running[queued.client])
                self._waiting.remove(queued)
            try:
                queued.row = queued.row or self._prepare(queued)
            except Exception as error:  # noqa: BLE001  its request gets it
                if queued.future.set_running_or_notify_cancel():
                    queued.future.set_exception(_refusal(error))
                continue
            if not self._batch.has_room(queued.row, joining):
                with self._changed:
                    self._waiting.insert(0, queued)
                break
            if queued.future.set_running_or_notify_cancel():
                self._answering[queued.row] = queued
                joining.append(queued.row)
        return joining

    def _prepare(self, queued: QueuedRequest) -> Row:
        chat = queued.request.chat(self._images)
        return prepare_chat(self.predictor, chat, queued.request.sampling, queued.on_token)

    def _finish(self, rows: Sequence[Row]) -> None:
        for row in rows:
            queued = self._answering.pop(row)
            try:
                answer = row.answer(self.predictor)
                self.metrics.add_answer(answer)
                queued.future.set_result(answer)
            except Exception as error:  # noqa: BLE001  its request gets it
                queued.future.set_exception(error)

    def _done(self, queued: QueuedRequest, future: Future[Answer]) -> None:
        with self._changed:
            self._unfinished.discard(queued)
            if queued in self._waiting:
                self._waiting.remove(queued)
        queued.put(future)


class _ImageCache:
    """Encodes images; those of the last requests are known already.

    It makes one object of equal files, which `ChatBatch` then reads once.

    Args:
        num_bytes: the most that the known ones may take.
    """

    def __init__(self, predictor: GroundingPredictor, num_bytes: int) -> None:
        self._predictor = predictor
        self._encoded: OrderedDict[bytes, EncodedImage] = OrderedDict()
        self._num_bytes = num_bytes
        self._held = 0

    def __call__(self, data: bytes, name: str) -> EncodedImage:
        key = hashlib.sha256(data).digest()
        known = self._encoded.pop(key, None)
        if known is None:
            known = self._predictor.encode(open_image(data, name=name))
            self._held += _size(known)
        self._encoded[key] = known
        while self._held > self._num_bytes:
            self._held -= _size(self._encoded.popitem(last=False)[1])
        return known


def _size(image: EncodedImage) -> int:
    """Counts the bytes of a picture and its features."""
    return 3 * image.image.width * image.image.height + image.features.tokens.nbytes


def _refusal(error: Exception) -> Exception:
    """Makes the refusal of a request that cannot be answered; a failure of ours stays one."""
    if isinstance(error, PromptTooLong):
        return ApiError(400, str(error), param="messages", code="context_length_exceeded")
    if isinstance(error, ImageError):
        return ApiError(400, str(error), code="invalid_image")
    if isinstance(error, TemplateError):
        message = f"the model's chat template refuses these messages: {error}"
        return ApiError(400, message, param="messages")
    return ApiError(400, str(error)) if isinstance(error, ValueError) else error
