"""Counts what the server does, and writes it in the text format of Prometheus."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from cloc_mllm.inference.results import Answer

CONTENT_TYPE = "text/plain; version=0.0.4"
_BUCKETS_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class _Metric(NamedTuple):
    name: str
    kind: str
    help: str


_REQUESTS = _Metric("cloc_requests_total", "counter", "Chat requests by HTTP status.")
_REFUSED = _Metric("cloc_refused_total", "counter", "Requests that were refused, by reason.")
_TOKENS = _Metric("cloc_tokens_total", "counter", "Tokens of whole answers and their prompts.")
_SECONDS = _Metric("cloc_request_seconds", "histogram", "From the head to the end of the answer.")
_QUEUE = _Metric("cloc_queue", "gauge", "Requests that are answered now, and that wait.")


class Metrics:
    """The counts since the start of the server."""

    def __init__(self) -> None:
        self._statuses: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._tokens = Counter(prompt=0, completion=0)
        self._buckets: Counter[float] = Counter()
        self._seconds = 0.0

    def add_request(self, status: int, seconds: float) -> None:
        """Counts a chat request that has ended."""
        self._statuses[str(status)] += 1
        self._seconds += seconds
        self._buckets.update(bound for bound in _BUCKETS_S if seconds <= bound)

    def add_refusal(self, reason: str) -> None:
        """Counts a refusal."""
        self._refused[reason] += 1

    def add_answer(self, answer: Answer) -> None:
        """Counts the tokens of a whole answer."""
        self._tokens["prompt"] += answer.num_prompt_tokens
        self._tokens["completion"] += answer.num_new_tokens

    def text(self, num_answering: int, num_waiting: int) -> str:
        """Writes all metrics."""
        count = sum(self._statuses.values())
        buckets: dict[str, float] = {str(b): self._buckets[b] for b in _BUCKETS_S}
        name = _SECONDS.name
        seconds = [
            *_samples(f"{name}_bucket", "le", {**buckets, "+Inf": count}),
            f"{name}_sum {self._seconds:.6f}",
            f"{name}_count {count}",
        ]
        queue = {"answering": num_answering, "waiting": num_waiting}
        lines = [
            *_described(_REQUESTS, _samples(_REQUESTS.name, "status", self._statuses)),
            *_described(_REFUSED, _samples(_REFUSED.name, "reason", self._refused)),
            *_described(_TOKENS, _samples(_TOKENS.name, "kind", self._tokens)),
            *_described(_SECONDS, seconds),
            *_described(_QUEUE, _samples(_QUEUE.name, "state", queue)),
        ]
        return "\n".join(lines) + "\n"


def _described(metric: _Metric, samples: Iterable[str]) -> list[str]:
    return [
        f"# HELP {metric.name} {metric.help}",
        f"# TYPE {metric.name} {metric.kind}",
        *samples,
    ]


def _samples(name: str, label: str, values: Mapping[str, float]) -> list[str]:
    return [f'{name}{{{label}="{key}"}} {value}' for key, value in values.items()]
