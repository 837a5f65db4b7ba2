"""Chats that are answered together have the answers that they have alone."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from cloc_mllm.geometry import Boxes
from cloc_mllm.inference.chat import Chat, answer_chat, prepare_chat
from cloc_mllm.inference.chat_batch import ChatBatch, Row
from cloc_mllm.inference.grounding_predictor import GroundingPredictor
from cloc_mllm.inference.results import Answer
from cloc_mllm.inference.sampling import Sampling

NOTHING = Boxes.normalized([])
IMAGE = {"type": "image"}


def chat(text: str, *images: object, regions: Boxes = NOTHING) -> Chat:
    content = [IMAGE] * len(images) + [{"type": "text", "text": text}]
    rows = [regions] + [NOTHING] * (len(images) - 1) if images else []
    return Chat([{"role": "user", "content": content}], images, rows)


@pytest.fixture(scope="module")
def chats(predictor: GroundingPredictor) -> list[Chat]:
    teal = predictor.encode(Image.new("RGB", (96, 48), "teal"))
    red = predictor.encode(Image.new("RGB", (40, 80), "red"))
    return [
        chat("Where is the crab?", teal),
        chat("Where is the smaller crab left of the second boat?", teal),
        chat("What is in <region>?", teal, regions=Boxes.normalized([[0, 0, 0.5, 1]])),
        chat("What is in <region>?", red, regions=Boxes.normalized([[0.2, 0, 0.5, 1]])),
        chat("Where is the boat in these?", teal, red),
        chat("Hello."),
        chat("Describe the image.", red),
    ]


def alone(predictor: GroundingPredictor, one: Chat, sampling: Sampling) -> tuple[Answer, str]:
    pieces: list[str] = []
    return answer_chat(predictor, one, sampling, pieces.append), "".join(pieces)


def together(
    predictor: GroundingPredictor,
    chats: list[Chat],
    samplings: list[Sampling],
    at_once: int,
    known_bytes: int = 0,
) -> list[tuple[Answer, str]]:
    """Lets `at_once` chats join between two tokens, in their order."""
    batch, rows, pieces = ChatBatch(predictor, known_bytes), [], []
    for one, sampling in zip(chats, samplings, strict=True):
        pieces.append([])
        rows.append(prepare_chat(predictor, one, sampling, pieces[-1].append))
    waiting = list(rows)
    while waiting or batch.rows:
        if waiting:
            batch.join(waiting[:at_once])
            waiting = waiting[at_once:]
        if batch.rows:
            batch.step()
    return [(row.answer(predictor), "".join(p)) for row, p in zip(rows, pieces, strict=True)]


def check_same(actual: Answer, expected: Answer) -> None:
    names = ("text", "spans", "failure", "finish_reason", "num_prompt_tokens", "num_new_tokens")
    assert [getattr(actual, n) for n in names] == [getattr(expected, n) for n in names]
    torch.testing.assert_close(actual.boxes.xyxy, expected.boxes.xyxy)
    torch.testing.assert_close(actual.scores, expected.scores, atol=1e-4, rtol=0)


@pytest.mark.parametrize("known_bytes", [0, 10**6], ids=["nothing known", "starts known"])
@pytest.mark.parametrize("at_once", [7, 2, 1], ids=["at once", "two by two", "one by one"])
def test_greedy_answers_are_those_of_each_alone(
    predictor: GroundingPredictor, chats: list[Chat], at_once: int, known_bytes: int
) -> None:
    # different lengths, so that rows leave at different times
    samplings = [Sampling(max_new_tokens=4 + 5 * (place % 3)) for place in range(len(chats))]
    found = together(predictor, chats, samplings, at_once, known_bytes)
    for one, sampling, (answer, text) in zip(chats, samplings, found, strict=True):
        expected, streamed = alone(predictor, one, sampling)
        check_same(answer, expected)
        assert text == streamed == answer.text


@pytest.mark.parametrize(
    ("at_once", "known_bytes", "expected"),
    [(3, 0, [1]), (1, 0, [1, 1, 1]), (1, 10**6, [1])],
    ids=["together", "one after another", "one after another, known"],
)
def test_equal_images_are_read_once(
    predictor: GroundingPredictor,
    chats: list[Chat],
    at_once: int,
    known_bytes: int,
    expected: list[int],
) -> None:
    actual: list[int] = []
    hook = predictor.model.projector.register_forward_pre_hook(
        lambda _, inputs: actual.append(len(inputs[0][0]))
    )
    together(predictor, chats[:3], [Sampling(max_new_tokens=2)] * 3, at_once, known_bytes)
    hook.remove()
    assert actual == expected


def test_chats_behind_known_starts_of_several_lengths(
    predictor: GroundingPredictor, chats: list[Chat]
) -> None:
    both = [chats[4], chats[0]]  # two images and one
    samplings = [Sampling(max_new_tokens=6)] * 4
    found = together(predictor, both * 2, samplings, 4)
    for one, (answer, _) in zip(both * 2, found, strict=True):
        check_same(answer, alone(predictor, one, samplings[0])[0])


def test_a_region_before_the_last_image_is_read_with_its_chat(
    predictor: GroundingPredictor, chats: list[Chat]
) -> None:
    (teal,), (red,) = chats[0].images, chats[6].images
    box = Boxes.normalized([[0, 0, 0.5, 1]])
    content = [IMAGE, {"type": "text", "text": "<region>"}, IMAGE]
    one = Chat([{"role": "user", "content": content}], [teal, red], [box, NOTHING])
    sampling = Sampling(max_new_tokens=5)
    for answer, _ in together(predictor, [one, one, chats[0]], [sampling] * 3, 2, 10**6)[:2]:
        check_same(answer, alone(predictor, one, sampling)[0])


def test_sampled_answers_follow_their_own_seeds(
    predictor: GroundingPredictor, chats: list[Chat]
) -> None:
    samplings = [Sampling(8, temperature=1.5, top_p=0.9, seed=seed) for seed in range(len(chats))]
    for one, sampling, (answer, _) in zip(
        chats, samplings, together(predictor, chats, samplings, 3), strict=True
    ):
        assert answer.text == alone(predictor, one, sampling)[0].text


def test_a_listener_that_fails_ends_its_own_answer_alone(
    predictor: GroundingPredictor, chats: list[Chat]
) -> None:
    def fail(piece: str) -> None:
        raise KeyError("gone")

    sampling = Sampling(max_new_tokens=6)
    batch = ChatBatch(predictor)
    failing = prepare_chat(predictor, chats[0], sampling, fail)
    other = prepare_chat(predictor, chats[3], sampling, lambda piece: None)
    assert failing in batch.join([other, failing])
    while batch.rows:
        batch.step()
    with pytest.raises(KeyError, match="gone"):
        failing.answer(predictor)
    check_same(other.answer(predictor), alone(predictor, chats[3], sampling)[0])


def test_long_chats_do_not_join(predictor: GroundingPredictor, chats: list[Chat]) -> None:
    def row(limit: int) -> Row:
        made = prepare_chat(predictor, chats[5], Sampling(2), lambda piece: None)
        made.limit = limit
        return made

    batch = ChatBatch(predictor)
    assert batch.has_room(row(100_000))
    assert batch.has_room(row(1000), [row(1000)])
    assert not batch.has_room(row(10), [row(100_000)])
