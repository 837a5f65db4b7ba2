"""The routes over the smallest real model, without sockets."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import textwrap
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

pytest.importorskip("fastapi", reason="fastapi is not installed")

from fastapi.testclient import TestClient

from cloc_mllm.geometry import Boxes
from cloc_mllm.inference.chat import Chat, answer_chat
from cloc_mllm.inference.grounding_predictor import GroundingPredictor
from cloc_mllm.inference.sampling import Sampling
from cloc_mllm.serve.app import build_app
from cloc_mllm.serve.limits import Limits

LIMITS = Limits(
    body_bytes=300_000,
    images=2,
    image_bytes=100_000,
    image_pixels=20_000,
    messages=4,
    parts=6,
    regions=3,
    text_chars=400,
    together=1,
    waiting=1,
)
ROUTE = "/v1/chat/completions"


def data_url(image: Image.Image, kind: str = "png") -> str:
    file = io.BytesIO()
    image.save(file, kind)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


PICTURE = Image.new("RGB", (96, 48), "teal")
URL = data_url(PICTURE)


def picture(url: str = URL, **more: object) -> dict:
    return {"type": "image_url", "image_url": {"url": url, "detail": "high"}, **more}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def body(*content: dict, **more: object) -> dict:
    return {"messages": [{"role": "user", "content": list(content)}], **more}


def regions(*boxes: list, unit: str = "pixels") -> dict:
    return {"unit": unit, "boxes": list(boxes)}


@pytest.fixture(scope="module")
def predictor(mllm_dir: Path) -> GroundingPredictor:
    return GroundingPredictor.from_pretrained(mllm_dir, device="cpu")


@pytest.fixture(scope="module")
def client(predictor: GroundingPredictor) -> Iterator[TestClient]:
    with TestClient(build_app(predictor, "tiny", LIMITS), raise_server_exceptions=False) as client:
        yield client


def events(response) -> list[dict]:
    lines = response.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def test_an_answer_is_the_models(client: TestClient, predictor: GroundingPredictor) -> None:
    response = client.post(ROUTE, json=body(picture(), text("Where is the crab?"), max_tokens=7))
    assert response.status_code == 200, response.text
    chat = Chat(
        [{"role": "user", "content": [{"type": "image"}, text("Where is the crab?")]}],
        [PICTURE],
        [Boxes.normalized([])],
    )
    expected = answer_chat(predictor, chat, Sampling(max_new_tokens=7), lambda piece: None)
    (choice,) = response.json()["choices"]
    assert choice["message"]["content"] == expected.text
    assert choice["finish_reason"] == expected.finish_reason
    assert response.json()["usage"] == {
        "prompt_tokens": expected.num_prompt_tokens,
        "completion_tokens": expected.num_new_tokens,
        "total_tokens": expected.num_prompt_tokens + expected.num_new_tokens,
    }
    assert response.json()["object"] == "chat.completion"


def test_a_stream_says_the_same_in_pieces(client: TestClient) -> None:
    question = body(picture(), text("What is there?"), model="tiny", max_completion_tokens=20)
    whole = client.post(ROUTE, json=question).json()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    response = client.post(ROUTE, json=question | options)
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, last, usage = events(response)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    message = whole["choices"][0]["message"]
    assert "".join(delta["content"] for delta in deltas) == message["content"]
    assert last["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert last["choices"][0]["delta"]["boxes"] == message["boxes"]
    assert (usage["choices"], usage["usage"]) == ([], whole["usage"])
    assert len({chunk["id"] for chunk in (*chunks, last, usage)}) == 1


@pytest.mark.parametrize(
    ("content", "num_boxes"),
    [
        ([picture(), text("Where is the crab?")], 1),
        ([picture(), picture(), text("Where is the crab?")], 2),
    ],
    ids=["one picture", "two pictures"],
)
def test_boxes_are_decoded(
    client: TestClient, predictor: GroundingPredictor, content: list, num_boxes: int
) -> None:
    ids = predictor.processor.tokenize("<loc_0><loc_5><loc_19><loc_10>")
    ids.append(predictor.processor.tokenizer.eos_token_id)
    left = iter(ids)

    def write(module, inputs, logits):
        logits[..., next(left)] += 1e4

    hook = predictor.model.get_output_embeddings().register_forward_hook(write)
    response = client.post(ROUTE, json=body(*content))
    hook.remove()
    (box,) = response.json()["choices"][0]["message"]["boxes"]
    assert box["xyxy_norm"] == pytest.approx([0, 5 / 19, 1, 10 / 19])
    assert box["confidence"] == pytest.approx(1.0)
    assert (box["label"], box["text"]) == ("the crab", "<loc_0><loc_5><loc_19><loc_10>")
    # of several pictures none can be told, so there are no pixels
    expected = [0, 48 * 5 / 19, 96, 48 * 10 / 19] if num_boxes == 1 else None
    assert box.get("xyxy") == (expected and pytest.approx(expected))


def test_pixel_and_normalised_regions_ask_the_same(client: TestClient) -> None:
    question = text("What is in {box} <region>?")
    in_pixels = regions([-9, 12, 48, 36])
    normalised = regions([0, 0.25, 0.5, 0.75], unit="normalized")
    answers = [
        client.post(ROUTE, json=body(picture(regions=given), question))
        for given in (in_pixels, normalised)
    ]
    assert answers[0].status_code == 200, answers[0].text
    assert answers[0].json()["choices"] == answers[1].json()["choices"]
    bare = client.post(ROUTE, json=body(picture(regions=in_pixels), text("What is in <region>?")))
    # four location tokens and the blank behind them
    assert answers[0].json()["usage"]["prompt_tokens"] > bare.json()["usage"]["prompt_tokens"] + 3


def test_fields_without_a_meaning_here_are_ignored(client: TestClient) -> None:
    more = {"user": "x", "store": False, "metadata": {}, "tools": [], "logprobs": None, "n": 1}
    more |= {"response_format": {"type": "text"}, "stream": None, "temperature": None, "stop": None}
    messages = [
        {"role": "developer", "content": "Be brief.", "name": "x"},
        {"role": "user", "content": "Hello."},
    ]
    response = client.post(ROUTE, json={"messages": messages, **more})
    assert response.status_code == 200, response.text


BASE64 = URL.partition(",")[2]
QUESTION = text("Where is the crab?")
CHAT = body(picture(), QUESTION)["messages"]
HEAD = "data:image/png;base64,"
ACCEPTED = {
    "wrapped": body(picture(HEAD + "\r\n".join(textwrap.wrap(BASE64, 76))), QUESTION),
    "of URLs": body(picture(HEAD + BASE64.replace("+", "-").replace("/", "_")), QUESTION),
    "unpadded": body(picture(HEAD + BASE64.rstrip("=")), QUESTION),
    "quoted": body(picture(HEAD + quote(BASE64, safe="")), QUESTION),
    "no kind": body(picture("data:image;base64," + BASE64), QUESTION),
    "address as text": body({"type": "image_url", "image_url": URL}, QUESTION),
    "responses API": body(
        {"type": "input_image", "image_url": URL}, {**QUESTION, "type": "input_text"}
    ),
    "cold": body(picture(), QUESTION, temperature=1e-40, seed=2**64 - 1),
    "coldest": body(picture(), QUESTION, temperature=5e-324),
    "top_p of nothing": body(picture(), QUESTION, temperature=1.0, top_p=0),
    "floats": body(picture(), QUESTION, max_tokens=256.0, seed=-1.0),
    "silent assistant": {
        "messages": [
            {"role": "user", "content": "Hello."},
            {"role": "assistant", "content": None},
            *CHAT,
        ]
    },
    "tools were called": {"messages": [{"role": "assistant", "tool_calls": []}, *CHAT]},
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_clients_send_is_accepted(client: TestClient, name: str) -> None:
    response = client.post(ROUTE, json=ACCEPTED[name])
    assert response.status_code == 200, response.text
    if "messages" in ACCEPTED[name] and len(ACCEPTED[name]["messages"]) == 1:
        plain = client.post(ROUTE, json=body(picture(), QUESTION))
        assert response.json()["choices"] == plain.json()["choices"]


def test_a_byte_order_mark_is_taken_off(client: TestClient) -> None:
    content = b"\xef\xbb\xbf" + json.dumps(body(text("Hello."), max_tokens=2)).encode()
    headers = {"content-type": "application/json"}
    assert client.post(ROUTE, content=content, headers=headers).status_code == 200


NUMBERS = st.one_of(
    st.integers(-(2**70), 2**70), st.floats(), st.sampled_from([0, 1, -0.0, 5e-324, 2**63, 2**64])
)


@given(
    fields=st.dictionaries(
        st.sampled_from(["temperature", "top_p", "seed", "max_tokens", "n", "stop", "stream"]),
        NUMBERS | st.text(max_size=3) | st.none() | st.booleans(),
        max_size=3,
    ),
    payload=st.text(alphabet="AZaz09+/-_=% \n?", max_size=9),
    box=st.lists(NUMBERS, min_size=4, max_size=4),
)
@settings(max_examples=60, deadline=None)
def test_no_field_is_a_failure_of_ours(
    client: TestClient, fields: dict, payload: str, box: list
) -> None:
    asked = [
        body(text("Hello."), **{"max_tokens": 2, **fields}),
        body(picture(HEAD + payload), QUESTION, max_tokens=2),
        body(picture(regions=regions(box)), text("<region>"), max_tokens=2),
    ]
    for one in asked:
        response = client.post(
            ROUTE, content=json.dumps(one), headers={"content-type": "application/json"}
        )
        assert response.status_code in (200, 400), (one, response.text)


BOMB = data_url(Image.new("L", (10_000, 10_000)))  # 100 million pixels in 100 KB
CUT = data_url(Image.effect_noise((96, 48), 50))[: len("data:image/png;base64,") + 800]
FIRST = "messages[0].content[0]"
FIRST_URL = f"{FIRST}.image_url.url"
CASES = {
    "model": ({"model": "gpt"}, 404, "model", "there is no model 'gpt'"),
    "no messages": ({"messages": []}, 400, "messages", "at least 1"),
    "messages of text": ({"messages": "hi"}, 400, "messages", "got 'hi'"),
    "many": ({"messages": [{"role": "user", "content": "a"}] * 5}, 400, "messages", "limit is 4"),
    "role": ({"messages": [{"role": "tool", "content": "a"}]}, 400, "messages[0].role", "'tool'"),
    "last": ({"messages": [{"role": "assistant", "content": "a"}]}, 400, "messages", "user's"),
    "no content": ({"messages": [{"role": "user"}]}, 400, "messages[0].content", "required"),
    "tools": ({"tools": [{"type": "function"}]}, 400, "tools", "not supported"),
    "json": ({"response_format": {"type": "json_object"}}, 400, "response_format", "not supp"),
    "logprobs": ({"logprobs": True}, 400, "logprobs", "not supported"),
    "n": ({"n": 2}, 400, "n", "should be 1, got 2"),
    "hot": ({"temperature": 2.5}, 400, "temperature", "less than or equal to 2"),
    "words": ({"temperature": "1"}, 400, "temperature", "valid number, got '1'"),
    "seed": ({"seed": 2**64}, 400, "seed", f"less than or equal to {2**64 - 1}"),
    "low seed": ({"seed": -(2**63) - 1}, 400, "seed", f"or equal to {-(2**63)}"),
    "silent user": (
        {"messages": [{"role": "user", "content": None}]}, 400, "messages[0].content", "valid array"
    ),
    "no tokens": ({"max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
    "stops": ({"stop": ["a"] * 5}, 400, "stop", "at most 4"),
    "blank stop": ({"stop": ""}, 400, "stop[0]", "at least 1"),
    "part": (body({"type": "input_audio"}), 400, "messages[0].content[0].type", "input_audio"),
    "no url": (body({"type": "image_url"}), 400, FIRST, "`image_url`"),
    "http": (body(picture("http://127.0.0.1/x")), 400, FIRST_URL, "ad"),
    "file": (body(picture("file:///etc/passwd")), 400, FIRST_URL, "ad"),
    "path": (body(picture("/etc/passwd")), 400, FIRST_URL, "address"),
    "html": (body(picture("data:text/html;base64,")), 400, FIRST_URL, ""),
    "base64": (
        body(picture("data:image/png;base64,?")), 400, FIRST_URL, "bas"
    ),
    "no picture": (
        body(picture("data:image/png;base64,aGk=")), 400, FIRST_URL,
        "it is none",
    ),
    "large": (
        body(picture(data_url(Image.new("RGB", (200, 200))))), 400,
        FIRST_URL, "200 x 200 pixels",
    ),
    "bomb": (body(picture(BOMB)), 400, FIRST_URL, "10000 x 10000"),
    "heavy": (
        body(picture("data:image/png;base64," + "A" * 140_000)), 400,
        FIRST_URL, "bytes, the limit",
    ),
    "broken": (body(picture(CUT)), 400, None, "broken_image"),
    "three": (
        body(picture(), picture(), picture()), 400, "messages[0].content[2].image_url.url", "2 pic"
    ),
    "parts": (body(*[text("a")] * 7), 400, "messages[0].content[6]", "more than 6 parts"),
    "regions": (
        body(picture(regions=regions(*[[0, 0, 9, 9]] * 2)),
             picture(regions=regions(*[[0, 0, 9, 9]] * 2))), 400,
        "messages[0].content[1].regions", "more than 3 regions",
    ),
    "pixels of two": (
        body(picture(data_url(Image.new("RGB", (120, 100)))),
             picture(data_url(Image.new("RGB", (120, 100))))), 400,
        "messages[0].content[1].image_url.url", "12,000 of them used",
    ),
    "system": (
        {"messages": [{"role": "system", "content": [picture()]}, *body(text("a"))["messages"]]},
        400, FIRST, "only messages of the user",
    ),
    "placeholder": (body(text("<image>")), 400, FIRST, "image_url item"),
    "long": (body(text("x" * 300), text("x" * 101)), 400, "messages[0].content[1]", "400"),
    "context": (body(text("é" * 390)), 400, "messages", "context holds 256"),
    "no region": (body(picture(), text("<region>")), 400, "messages", "1 <region> but the pic"),
    "unsaid": (
        body(picture(regions=regions([0, 0, 9, 9])), text("a")), 400, "messages", "1 regions"
    ),
    "one box": (
        body(picture(regions=regions([0, 0, 9, 9])), text("{box} {box} <region>")), 400, "messages",
        "2 {box}",
    ),
    "no unit": (
        body(picture(regions={"boxes": []})), 400, "messages[0].content[0].regions.unit", "required"
    ),
    "three numbers": (
        body(picture(regions=regions([0, 0, 9]))), 400, f"{FIRST}.regions.boxes[0]",
        "at least 4",
    ),
    "inverted": (
        body(picture(regions=regions([9, 9, 0, 0])), text("<region>")), 400,
        f"{FIRST}.regions.boxes[0]", "inverted",
    ),
    "outside": (
        body(picture(regions=regions([96, 0, 99, 9])), text("<region>")), 400,
        f"{FIRST}.regions.boxes[0]", "outside",
    ),
}  # fmt: skip


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_is_refused(client: TestClient, case: tuple, stream: bool) -> None:
    fields, status, param, message = case
    asked = {"messages": [{"role": "user", "content": "Hello."}], "stream": stream, **fields}
    response = client.post(ROUTE, json=asked)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert message in error["message"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert len(error["message"]) < 400
    assert client.get("/health").json()["requests"] == 0


@pytest.mark.parametrize(
    ("content", "headers", "status", "message"),
    [
        (b"{", {}, 400, "no JSON"),
        (b"[" * 700, {}, 400, "no JSON"),
        (b"[" * 100_000, {}, 400, "100,000 commas and opening brackets, the limit is"),
        (b'{"messages":' + b"1" * 50_000 + b"}", {}, 400, "no JSON"),
        (b'{"messages": "\\ud800"}', {}, 400, "no JSON"),
        (b"\xff", {}, 400, "no JSON"),
        (b"[]", {}, 400, "the body"),
        (b"", {}, 400, "no JSON"),
        (b"x" * 300_001, {}, 413, "larger than 300,000 bytes"),
        (zlib.compress(b"{}"), {"content-encoding": "deflate"}, 400, "no JSON"),
        (b"{}", {"content-type": "text/plain"}, 415, "expected content-type"),
    ],
    ids=[
        "cut",
        "deep",
        "many",
        "digits",
        "surrogate",
        "bytes",
        "list",
        "empty",
        "large",
        "packed",
        "type",
    ],
)
def test_bodies_that_are_refused(
    client: TestClient, content: bytes, headers: dict, status: int, message: str
) -> None:
    headers = {"content-type": "application/json", **headers}
    response = client.post(ROUTE, content=content, headers=headers)
    assert response.status_code == status, response.text
    assert message in response.json()["error"]["message"]
    assert client.get("/health").json()["requests"] == 0


def test_models_and_health(client: TestClient) -> None:
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["object"], model["num_bins"]) == ("tiny", "model", 20)
    assert client.get("/v1/models/tiny").json() == model
    assert client.get("/v1/models/other").status_code == 404
    assert client.get("/health").json() == {"status": "ok", "model": "tiny", "requests": 0}
    assert client.get("/elsewhere").json()["error"]["message"].startswith("Not Found")
    assert client.get(ROUTE).status_code == 405


@pytest.fixture
def held(predictor: GroundingPredictor) -> Iterator[threading.Event]:
    """The model waits in its first token until the event is set."""
    release = threading.Event()
    head = predictor.model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda *_: release.wait(60) and None)
    yield release
    release.set()
    hook.remove()


def test_one_request_more_than_the_line_holds_is_told_to_come_again(
    client: TestClient, held: threading.Event
) -> None:
    question = body(text("Hello."), max_tokens=2)
    answers: list = []
    asking = [
        threading.Thread(target=lambda: answers.append(client.post(ROUTE, json=question)))
        for _ in range(2)
    ]
    for thread in asking:
        thread.start()
    while client.get("/health").json()["requests"] < 2:
        pass
    refused = client.post(ROUTE, json=question)
    held.set()
    for thread in asking:
        thread.join()
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) > 0
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert [answer.status_code for answer in answers] == [200, 200]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_request_that_takes_too_long_is_ended(
    predictor: GroundingPredictor, held: threading.Event, stream: bool
) -> None:
    app = build_app(predictor, "tiny", Limits(seconds=1))
    with TestClient(app) as client:
        response = client.post(ROUTE, json=body(text("Hello."), stream=stream))
        held.set()
    assert response.status_code == 504
    assert response.json()["error"]["code"] == "timeout"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_leaves_stops_the_model(predictor: GroundingPredictor, stream: bool) -> None:
    tokens: list[int] = []
    left = threading.Event()

    def never_end(_: object, inputs: object, logits: torch.Tensor) -> None:
        logits[..., predictor.processor.tokenizer.eos_token_id] = -1e4
        tokens.append(1)
        if len(tokens) == 5:
            assert left.wait(60)

    async def ask_and_leave() -> None:
        app = build_app(predictor, "tiny", Limits())
        asked = json.dumps(body(text("Hello."), stream=stream, max_tokens=200)).encode()
        messages = [{"type": "http.request", "body": asked}]

        async def receive() -> dict:
            if messages:
                return messages.pop()
            while len(tokens) < 5:
                await asyncio.sleep(0.01)
            asyncio.get_running_loop().call_later(0.2, left.set)
            return {"type": "http.disconnect"}

        async def send(message: dict) -> None:
            pass

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": ROUTE, "headers": headers}
        scope |= {"query_string": b"", "http_version": "1.1", "asgi": {"spec_version": "2.3"}}
        await app(scope, receive, send)
        while not left.is_set():
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.5)

    hook = predictor.model.get_output_embeddings().register_forward_hook(never_end)
    asyncio.run(ask_and_leave())
    hook.remove()
    assert len(tokens) <= 7  # the one being made when it left, and what the loop took to hear of it


def test_a_failure_of_ours_is_a_500_that_tells_nothing(
    client: TestClient, predictor: GroundingPredictor
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("secret")

    hook = predictor.model.get_output_embeddings().register_forward_pre_hook(fail)
    response = client.post(ROUTE, json=body(text("Hello.")))
    hook.remove()
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert "secret" not in response.text
    assert client.post(ROUTE, json=body(text("Hello."))).status_code == 200


def test_limits_must_allow_something() -> None:
    with pytest.raises(ValueError, match=r"limits\.messages is 0"):
        Limits(messages=0)
