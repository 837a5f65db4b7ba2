"""Writes answers as OpenAI's objects; `boxes` and `box_failures` of a message are our own."""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

from cloc_mllm.data.wordings import FIRST_TASKS
from cloc_mllm.inference.results import Answer
from cloc_mllm.mllm.processing import ClocMllmProcessor
from cloc_mllm.serve.checks import CheckedRequest

DONE = "data: [DONE]\n\n"


class Completion:
    """Writes the objects of one answer, which share an id."""

    def __init__(self, model: str, request: CheckedRequest) -> None:
        self.phrase = request.phrase
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, answer: Answer) -> dict[str, Any]:
        """Makes the response to a request that is not streamed."""
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        choice = {"index": 0, "message": message | self._boxes(answer), "logprobs": None}
        choice["finish_reason"] = answer.finish_reason
        head = {**self._head, "object": "chat.completion"}
        return head | {"choices": [choice], "usage": usage(answer)}

    def chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> str:
        """Makes one event of a stream."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return self._chunk([choice])

    def chunks(self, piece: str | Answer, with_usage: bool) -> list[str]:
        """Makes the events of a stream for one event of `worker.QueuedRequest`."""
        if isinstance(piece, str):
            return [self.chunk({"content": piece})] if piece else []
        lines = [self.chunk(self._boxes(piece), piece.finish_reason)]
        return [*lines, self._chunk([], usage=usage(piece))] if with_usage else lines

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> str:
        head = {**self._head, "object": "chat.completion.chunk"}
        return event(head | {"choices": choices} | more)

    def _boxes(self, answer: Answer) -> dict[str, Any]:
        failures = {"box_failures": answer.box_failures} if answer.box_failures else {}
        return {"boxes": box_objects(answer, self.phrase)} | failures


def box_objects(answer: Answer, label: str | None) -> list[dict[str, Any]]:
    """Makes the objects of an answer's boxes.

    `xyxy` is in pixels of the image, so it is left out unless the request has exactly one image.

    Args:
        label: what was looked for, of boxes that the answer links to no phrase of their own.
    """
    normalized, scores = answer.boxes.xyxy.tolist(), answer.scores.tolist()
    shown: list[dict[str, Any]] = [
        {"text": answer.text[start:end], "xyxy_norm": box, "confidence": score}
        for (start, end), box, score in zip(answer.spans, normalized, scores, strict=True)
    ]
    labels = [phrase or label for phrase in answer.phrases]
    shown = [box | ({"label": of} if of else {}) for box, of in zip(shown, labels, strict=True)]
    if answer.boxes.image_wh is not None:
        pixels = answer.boxes.to_pixels().xyxy.tolist()
        shown = [box | {"xyxy": xyxy} for box, xyxy in zip(shown, pixels, strict=True)]
    return shown


def usage(answer: Answer) -> dict[str, int]:
    """Counts tokens, images included."""
    return {
        "prompt_tokens": answer.num_prompt_tokens,
        "completion_tokens": answer.num_new_tokens,
        "total_tokens": answer.num_prompt_tokens + answer.num_new_tokens,
    }


def event(value: dict[str, Any]) -> str:
    """Writes one server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def model_object(name: str, created: int, processor: ClocMllmProcessor) -> dict[str, Any]:
    """Describes a model; also how it writes boxes, and which questions it was taught."""
    box_format, wordings = processor.coordinates, processor.asked_in
    written = {"box_format": box_format.kind, "num_bins": box_format.num_bins}
    prompts = {task: wordings.first(task) for task in (*FIRST_TASKS, *processor.taught)}
    head = {"id": name, "object": "model", "created": created, "owned_by": "cloc-mllm"}
    return head | written | {"prompts": prompts}
