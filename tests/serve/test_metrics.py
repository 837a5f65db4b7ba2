from __future__ import annotations

import logging
import re

import pytest

pytest.importorskip("fastapi", reason="fastapi is not installed")

from fastapi.testclient import TestClient

from cloc_mllm.inference.grounding_predictor import GroundingPredictor
from cloc_mllm.serve.app import build_app
from cloc_mllm.serve.limits import Limits

ROUTE = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "Hello."}], "max_tokens": 2}


@pytest.fixture(scope="module")
def predictor(mllm_dir) -> GroundingPredictor:
    return GroundingPredictor.from_pretrained(mllm_dir, device="cpu")


def test_metrics_count_what_happened(predictor: GroundingPredictor) -> None:
    with TestClient(build_app(predictor, "tiny", Limits())) as client:
        usage = client.post(ROUTE, json=HELLO).json()["usage"]
        client.post(ROUTE, json={**HELLO, "stream": True})
        client.post(ROUTE, json={**HELLO, "model": "other"})
        client.post(ROUTE, json={**HELLO, "n": 2})
        response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = response.text.splitlines()
    assert 'cloc_requests_total{status="200"} 2' in lines
    assert 'cloc_refused_total{reason="model_not_found"} 1' in lines
    assert 'cloc_refused_total{reason="400"} 1' in lines
    assert f'cloc_tokens_total{{kind="completion"}} {2 * usage["completion_tokens"]}' in lines
    assert f'cloc_tokens_total{{kind="prompt"}} {2 * usage["prompt_tokens"]}' in lines
    assert 'cloc_request_seconds_bucket{le="+Inf"} 4' in lines
    assert "cloc_request_seconds_count 4" in lines
    assert 'cloc_queue{state="waiting"} 0' in lines
    sample = re.compile(r'[a-z_]+(\{[a-z]+="[^"]+"\})? [0-9.e-]+')
    assert all(sample.fullmatch(line) for line in lines if not line.startswith("# "))


@pytest.mark.parametrize(
    ("given", "is_kept"),
    [("trace-1.a", True), ("two\twords", False), ("x" * 65, False), ("", False)],
)
def test_a_request_has_an_id_in_its_answer_and_in_the_log(
    predictor: GroundingPredictor, caplog: pytest.LogCaptureFixture, given: str, is_kept: bool
) -> None:
    with (
        caplog.at_level(logging.INFO, logger="cloc_mllm.serve"),
        TestClient(build_app(predictor, "tiny", Limits())) as client,
    ):
        response = client.post(ROUTE, json=HELLO, headers={"x-request-id": given})
    shown = response.headers["x-request-id"]
    assert (shown == given) == is_kept
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,64}", shown)
    (line,) = caplog.messages
    assert re.fullmatch(rf"request {shown} from testclient: 200 in \d+\.\d{{3}} s", line)


def test_a_failure_of_ours_has_an_id_too(predictor: GroundingPredictor) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("secret")

    hook = predictor.model.get_output_embeddings().register_forward_pre_hook(fail)
    app = build_app(predictor, "tiny", Limits())
    with TestClient(app, raise_server_exceptions=False) as client:
        response = client.post(ROUTE, json=HELLO, headers={"x-request-id": "mine"})
        hook.remove()
        metrics = client.get("/metrics").text
    assert (response.status_code, response.headers["x-request-id"]) == (500, "mine")
    assert 'cloc_requests_total{status="500"} 1' in metrics
