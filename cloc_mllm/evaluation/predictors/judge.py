"""A judge model behind any OpenAI-compatible endpoint: prompts, calls, scores, all kept in a file.

A call that fails is a judgement with a `failure`; it is tried again by the next run.
"""

from __future__ import annotations

import http.client
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tqdm import tqdm

from cloc_mllm.evaluation.benchmark_files import read_json_rows
from cloc_mllm.evaluation.rows.resume import cut_half_line
from cloc_mllm.evaluation.rows.rows import PredictionRow, ScoredPair

SCORED = ["answer", "reference"]  # `labels` of a judged row; `scores` are theirs, 1 to 10
MAX_SCORE = 10
ROLE = "Assistant"
INSTRUCTION = (
    "Two assistants answered the question above about an image. The context describes the image: "
    "its objects with boxes [x1, y1, x2, y2] (left, top, right, bottom, as parts of the width and "
    "height, 0 to 1), how they relate, and what is in its regions. Rate each answer from 1 to 10: "
    "is it right, relevant, helpful and detailed, and does it speak of the right place? Boxes that "
    "an answer gives should match the object; forgive deviations under a fifth of its width or "
    "height. Do not let the order of the answers matter.\n"
    "Write the two scores alone on the first line, first that of Assistant 1, then that of "
    "Assistant 2, with a space between them. Explain them from the second line on."
)
_TWO_SCORES = re.compile(r"\s*(\d+(?:\.\d+)?)[\s,]+(\d+(?:\.\d+)?)\s*")
_TRIES = 3
_RETRIED = {"unreachable", "timeout"} | {
    f"http_{status}" for status in (408, 409, 429, 500, 502, 503, 504)
}


@dataclass(frozen=True)
class Context:
    """The description of the image for the judge, and the question in the benchmark's words."""

    text: str
    question: str


@dataclass(frozen=True)
class Judgement:
    """The judgement of one answer, or the reason why there is none.

    Args:
        judge: the requested name of the model; `served_by` is the endpoint's name for it.
        prompt, raw: what the judge was told and what it said, whole.
        failure: None, `no_scores`, `no_answer` (not the expected JSON), `http_STATUS`,
            `unreachable` or `timeout`.
    """

    id: str
    judge: str
    prompt: str
    raw: str = ""
    served_by: str = ""
    answer_score: float | None = None
    reference_score: float | None = None
    failure: str | None = None


class JudgeError(Exception):
    """The judge gave no answer. `reason` is the key it is counted under."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Judge:
    """An endpoint that understands POST `{url}/chat/completions`.

    Args:
        url: with its version, for instance `https://api.openai.com/v1`.
        key: sent as a bearer token; "" sends none. It is never written anywhere.
        wait_s: before the first retry; doubled each time.
    """

    url: str
    model: str
    key: str = ""
    timeout_s: float = 120.0
    wait_s: float = 2.0

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"--judge_url must start with http:// or https://, got {self.url!r}")

    def ask(self, prompt: str) -> tuple[str, str]:
        """Returns the judge's answer and the endpoint's name of the model; retries overload.

        Raises:
            JudgeError: there is no answer.
        """
        for attempt in range(_TRIES):
            try:
                return self._ask_once(prompt)
            except JudgeError as error:
                if error.reason not in _RETRIED or attempt == _TRIES - 1:
                    raise
                time.sleep(self.wait_s * 2**attempt)
        raise AssertionError("the last attempt returns or raises")

    def _ask_once(self, prompt: str) -> tuple[str, str]:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
        }
        request = urllib.request.Request(
            f"{self.url.rstrip('/')}/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        if self.key:  # not carried along to wherever a redirect leads
            request.add_unredirected_header("Authorization", f"Bearer {self.key}")
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
                data = json.loads(response.read())
            return str(data["choices"][0]["message"]["content"]), str(data.get("model", ""))
        except urllib.error.HTTPError as error:
            detail = error.read(500).decode(errors="replace")
            raise JudgeError(f"http_{error.code}", detail) from error
        except TimeoutError as error:
            raise JudgeError("timeout", str(error)) from error
        except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
            raise JudgeError("unreachable", str(error)) from error
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise JudgeError("no_answer", f"{type(error).__name__}: {error}") from error


def read_rules(path: str | Path) -> dict[str, dict[str, str]]:
    """Prompts by category: a JSON object `{category: {"role": ..., "prompt": ...}}` (Ferret's
    `rule.json`), in place of `INSTRUCTION`."""
    from cloc_mllm.data.texts import read_json

    rules = read_json(path)
    if not isinstance(rules, dict) or not all(
        isinstance(rule, dict) and isinstance(rule.get("prompt"), str) for rule in rules.values()
    ):
        raise ValueError(f'{path}: expected {{category: {{"role": ..., "prompt": ...}}}}')
    return rules


def judge_prompt(pair: ScoredPair, told: Context, rules: Mapping[str, Mapping[str, str]]) -> str:
    """The reference stands first; boxes of the answer are written as in the context."""
    from cloc_mllm.mllm.coordinates import BoxFormat

    row, category = pair.prediction, pair.reference.kind
    if rules and category not in rules:
        raise ValueError(f"--judge_rules has no prompt for {category!r}, only {list(rules)}")
    rule = rules.get(category, {"role": ROLE, "prompt": INSTRUCTION})
    role = rule.get("role", ROLE)
    answer = row.raw_text
    if "box_format" in row.settings:  # our own model's
        box_format = BoxFormat(row.settings["box_format"], row.settings["num_bins"])
        decimals = "[{0[0]:.3f}, {0[1]:.3f}, {0[2]:.3f}, {0[3]:.3f}]"
        answer = box_format.rewrite(answer, decimals.format)
    return (
        f"[Context]\n{told.text}\n\n[Question]\n{told.question}\n\n"
        f"[{role} 1]\n{pair.reference.labels[0]}\n\n[End of {role} 1]\n\n"
        f"[{role} 2]\n{answer}\n\n[End of {role} 2]\n\n[System]\n{rule['prompt']}\n\n"
    )


def read_scores(raw: str) -> tuple[float, float] | None:
    """Reads the scores of reference and answer, 1 to 10 each, from the first line; else None."""
    match = _TWO_SCORES.fullmatch(raw.strip().partition("\n")[0])
    if match is None:
        return None
    first, second = float(match[1]), float(match[2])
    return (first, second) if all(1 <= s <= MAX_SCORE for s in (first, second)) else None


def judge_answers(
    judge: Judge,
    pairs: Sequence[ScoredPair],
    told: Mapping[str, Context],
    path: Path,
    rules: Mapping[str, Mapping[str, str]] | None = None,
) -> list[Judgement]:
    """Yields one judgement per answer, in their order.

    Args:
        pairs: answers with their references; the kind of a reference is its category.
        told: what the judge sees beside an answer, by row id.
        path: each judgement is appended as it comes; those without a failure are kept.
    """
    prompts = {
        pair.reference.id: judge_prompt(pair, told[pair.reference.id], rules or {})
        for pair in pairs
    }
    cut_half_line(path)
    path.touch()
    before = (Judgement(**row) for _, row in read_json_rows(path, "id", "judge", "prompt"))
    judgements = {
        old.id: old
        for old in before
        if not old.failure and (old.judge, old.prompt) == (judge.model, prompts.get(old.id))
    }
    todo = [row_id for row_id in prompts if row_id not in judgements]
    with open(path, "a", encoding="utf-8") as file:
        for row_id in tqdm(todo, f"judge {judge.model}"):
            judgements[row_id] = _judged(judge, row_id, prompts[row_id])
            file.write(json.dumps(asdict(judgements[row_id]), ensure_ascii=False) + "\n")
            file.flush()
    return [judgements[row_id] for row_id in prompts]


def with_judgements(
    rows: Iterable[PredictionRow], judgements: Iterable[Judgement]
) -> list[PredictionRow]:
    """Rows with the judge's scores as their own: `labels` are `SCORED`."""
    by_id = {judgement.id: judgement for judgement in judgements}
    judged = []
    for row in rows:
        found = by_id[row.id]
        row = replace(row, settings={**row.settings, "judge": found.judge})
        if found.failure or found.answer_score is None or found.reference_score is None:
            judged.append(replace(row, failure=f"judge_{found.failure}"))
        else:
            scores = [found.answer_score, found.reference_score]
            judged.append(replace(row, labels=list(SCORED), scores=scores))
    return judged


def _judged(judge: Judge, row_id: str, prompt: str) -> Judgement:
    judgement = Judgement(row_id, judge.model, prompt)
    try:
        raw, served_by = judge.ask(prompt)
    except JudgeError as error:
        return replace(judgement, raw=str(error), failure=error.reason)
    judgement = replace(judgement, raw=raw, served_by=served_by)
    scores = read_scores(raw)
    if scores is None:
        return replace(judgement, failure="no_scores")
    return replace(judgement, reference_score=scores[0], answer_score=scores[1])
