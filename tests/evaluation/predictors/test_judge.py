"""The judge against a real HTTP server on this machine."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cloc_mllm.evaluation.predictors.judge import (
    INSTRUCTION,
    Context,
    Judge,
    judge_answers,
    judge_prompt,
    read_rules,
    read_scores,
    with_judgements,
)
from cloc_mllm.evaluation.rows.rows import PredictionRow, ReferenceRow, ScoredPair


class FakeJudge:
    """Answers with `replies` in turn: a text, a status, or raw bytes."""

    def __init__(self) -> None:
        self.replies: list[Any] = []
        self.requests: list[tuple[str, dict[str, Any], str | None]] = []
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                fake.requests.append((self.path, body, self.headers.get("Authorization")))
                reply = fake.replies.pop(0)
                status = reply if isinstance(reply, int) else 200
                if isinstance(reply, str):
                    message = {"choices": [{"message": {"content": reply}}], "model": "judge-v2"}
                    reply = json.dumps(message).encode()
                elif isinstance(reply, int):
                    reply = b"busy"
                self.send_response(status)
                self.send_header("Content-Length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def fake() -> Iterator[FakeJudge]:
    judge = FakeJudge()
    yield judge
    judge.server.shutdown()
    judge.server.server_close()


def make_pair(row_id: str, text: str = "a dog <loc_0><loc_0><loc_10><loc_19>") -> ScoredPair:
    settings = {"box_format": "location_tokens", "num_bins": 20}
    return ScoredPair(
        PredictionRow(row_id, "i", "ferret_bench", raw_text=text, settings=settings),
        ReferenceRow(row_id, "i", "ferret_bench", labels=["a dog"], kind="ground_conv"),
    )


CONTEXT = Context("dog at [0, 0, 1, 1]", "What is it?")
TOLD = {"a": CONTEXT, "b": CONTEXT}
PAIRS = [make_pair("a"), make_pair("b")]
ROWS = [pair.prediction for pair in PAIRS]


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("8 6.5\nBecause", (8.0, 6.5)),
        ("8, 6", (8.0, 6.0)),
        ("\n 8  6 \n", (8.0, 6.0)),
        ("Scores: 8 6", None),
        ("8", None),
        ("8 6 7", None),
        ("11 6", None),
        ("0 6", None),
        ("8/10 6/10", None),
        ("", None),
    ],
)
def test_two_scores_on_the_first_line_or_none(raw: str, expected) -> None:
    assert read_scores(raw) == expected


def test_scores_are_kept_with_judge_prompt_and_raw_text(fake: FakeJudge, tmp_path: Path) -> None:
    fake.replies = ["8 6\nFine.", "9 3"]
    path = tmp_path / "judgements.jsonl"
    judge = Judge(fake.url, "judge", key="secret")
    actual = judge_answers(judge, PAIRS, TOLD, path)
    assert [(j.reference_score, j.answer_score) for j in actual] == [(8, 6), (9, 3)]
    stored = json.loads(path.read_text().splitlines()[0])
    assert stored["judge"] == "judge" and stored["served_by"] == "judge-v2"
    assert stored["raw"] == "8 6\nFine." and stored["prompt"] == actual[0].prompt
    url_path, body, authorization = fake.requests[0]
    assert url_path == "/v1/chat/completions" and authorization == "Bearer secret"
    assert body["model"] == "judge" and body["temperature"] == 0
    assert body["messages"] == [{"role": "user", "content": stored["prompt"]}]
    assert "secret" not in path.read_text()
    rows = with_judgements(ROWS, actual)
    assert rows[1].labels == ["answer", "reference"] and rows[1].scores == [3, 9]
    assert rows[1].settings["judge"] == "judge" and rows[1].failure is None


def test_failures_are_recorded_and_tried_again(fake: FakeJudge, tmp_path: Path) -> None:
    path = tmp_path / "judgements.jsonl"
    judge = Judge(fake.url, "judge", wait_s=0)
    fake.replies = ["I cannot say.", 401]
    first = judge_answers(judge, PAIRS, TOLD, path)
    assert [j.failure for j in first] == ["no_scores", "http_401"]
    assert first[0].raw == "I cannot say." and first[1].raw == "busy"
    assert fake.requests[0][2] is None  # no key, no header
    failed = with_judgements(ROWS, first)
    assert [row.failure for row in failed] == ["judge_no_scores", "judge_http_401"]
    assert all(row.scores == [] for row in failed)
    path.write_text(path.read_text() + '{"id": "cut')  # killed while writing
    fake.replies = ["8 6", b"<html>"]
    second = judge_answers(judge, PAIRS, TOLD, path)
    assert [j.failure for j in second] == [None, "no_answer"]
    fake.replies = ["7 7"]
    third = judge_answers(judge, PAIRS, TOLD, path)
    assert [j.answer_score for j in third] == [6, 7] and fake.replies == []
    assert len(path.read_text().splitlines()) == 5  # nothing that was said is lost


def test_overload_is_tried_again(fake: FakeJudge, tmp_path: Path) -> None:
    fake.replies = [503, 429, "8 6", 503, 503, 503]
    judge = Judge(fake.url, "judge", wait_s=0)
    actual = judge_answers(judge, PAIRS, TOLD, tmp_path / "j")
    assert [j.failure for j in actual] == [None, "http_503"] and len(fake.requests) == 6


def test_judgements_of_another_judge_or_answer_do_not_count(fake, tmp_path: Path) -> None:
    fake.replies = ["8 6", "8 6", "5 5", "4 4", "3 3"]
    judge = Judge(fake.url, "judge")
    judge_answers(judge, PAIRS, TOLD, tmp_path / "j")
    other = judge_answers(replace(judge, model="other"), PAIRS, TOLD, tmp_path / "j")
    assert [j.answer_score for j in other] == [5, 4]
    pairs = [PAIRS[0], make_pair("b", "a cat")]
    changed = judge_answers(judge, pairs, TOLD, tmp_path / "j")
    assert [j.answer_score for j in changed] == [6, 3]


def test_an_endpoint_that_is_not_there(tmp_path: Path) -> None:
    judge = Judge("http://127.0.0.1:9/v1", "judge", wait_s=0)
    (actual,) = judge_answers(judge, PAIRS[:1], TOLD, tmp_path / "j")
    assert actual.failure == "unreachable"
    with pytest.raises(ValueError, match="--judge_url must start with http"):
        Judge("file:///etc/passwd", "judge")


def test_boxes_of_the_answer_are_written_as_in_the_context() -> None:
    prompt = judge_prompt(PAIRS[0], CONTEXT, {})
    assert "[Assistant 1]\na dog\n" in prompt
    assert "[Assistant 2]\na dog [0.000, 0.000, 0.526, 1.000]\n" in prompt
    assert "[Context]\ndog at [0, 0, 1, 1]\n" in prompt and INSTRUCTION in prompt


def test_other_prompts_by_category(tmp_path: Path) -> None:
    path = tmp_path / "rule.json"
    path.write_text(json.dumps({"ground_conv": {"role": "Robot", "prompt": "Rate them."}}))
    prompt = judge_prompt(PAIRS[0], CONTEXT, read_rules(path))
    assert "[Robot 2]" in prompt and "Rate them." in prompt and INSTRUCTION not in prompt
    with pytest.raises(ValueError, match="no prompt for 'ground_conv', only"):
        judge_prompt(PAIRS[0], CONTEXT, {"refer_desc": {"prompt": "x"}})
    path.write_text("[1]")
    with pytest.raises(ValueError, match=r"rule.json: expected \{category"):
        read_rules(path)
