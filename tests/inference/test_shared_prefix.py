"""Questions that share an image's prefill equal one `generate` call each."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from cloc_mllm.geometry import Boxes
from cloc_mllm.inference.grounding_predictor import GroundingPredictor, Question
from cloc_mllm.inference.known_starts import KnownStarts
from cloc_mllm.inference.shared_prefix import (
    gap_after,
    prefill_known,
    prefill_shared,
    shared_length,
)
from cloc_mllm.mllm.language_model import CACHE

BLUE, NOISE = (
    Image.new("RGB", (96, 48), "teal"),
    Image.effect_noise((40, 90), 80).convert("RGB"),
)
BOX, OTHER_BOX = Boxes.normalized([[0.1, 0.1, 0.4, 0.6]]), Boxes.normalized([[0.5, 0, 1, 1]])
SHORT = Question(BLUE, "Where is a crab?")
LONG = Question(BLUE, "Where is the second boat from the left, a red apple left of a clock?")
REGION = Question(BLUE, "What is in <region>?", BOX)
OTHER_REGION = Question(BLUE, "What is in <region>?", OTHER_BOX)
REGION_FIRST = Question(BLUE, "<region> is what?", BOX)
OTHER_IMAGE = Question(NOISE, "Where is the smaller crab?")
OTHER_IMAGE_REGION = Question(NOISE, "What is in <region>, a clock?", OTHER_BOX)


@pytest.fixture(scope="module")
def predictor(mllm_dir: Path) -> GroundingPredictor:
    return GroundingPredictor.from_pretrained(mllm_dir, device="cpu")


def tokens_and_logits(predictor, questions, *, shared):
    inputs = predictor.prepare(questions)
    prepared = prefill_shared(predictor.model, inputs) if shared else inputs
    assert (CACHE in prepared) == shared
    output = predictor.model.generate(
        **prepared, max_new_tokens=8, output_logits=True, return_dict_in_generate=True
    )
    new = output.sequences[:, inputs["input_ids"].shape[1] :]
    return [predictor.processor.decode_answer(row) for row in new], torch.stack(output.logits, 1)


@pytest.mark.parametrize(
    "questions",
    [
        [SHORT, SHORT],
        [SHORT, LONG],
        [LONG, SHORT, REGION],
        [REGION, OTHER_REGION],
        [REGION_FIRST, OTHER_REGION, SHORT],
        [SHORT, OTHER_IMAGE, LONG, OTHER_IMAGE_REGION, REGION],
    ],
    ids=["equal", "lengths", "region and none", "regions", "region first", "two images"],
)
def test_shared_prefill_equals_one_call_each(predictor, questions):
    actual, logits = tokens_and_logits(predictor, questions, shared=True)

    for row, question in enumerate(questions):
        expected, alone = tokens_and_logits(predictor, [question], shared=False)
        assert actual[row] == expected[0]
        # rows that end early go on beside the others; the first token is always comparable.
        # float32 sums in another order: 2e-6 measured, the wrong region costs 0.3
        torch.testing.assert_close(logits[row, 0], alone[0, 0], atol=1e-4, rtol=1e-4)


def test_rows_of_two_images_share_them_both(predictor):
    texts = ["<image><image> Which has a crab?", "<image><image> Where is it in <region>?"]
    pictures = [[BLUE, NOISE], [BLUE, NOISE], [NOISE, BLUE], [NOISE, BLUE]]
    regions = [[[], []], [[], OTHER_BOX], [[], []], [OTHER_BOX, []]]
    inputs = predictor.processor(pictures, texts * 2, regions)
    prepared = prefill_shared(predictor.model, inputs)

    actual = predictor.model.generate(**prepared, max_new_tokens=6)

    assert CACHE in prepared
    expected = predictor.model.generate(**inputs, max_new_tokens=6)
    assert torch.equal(actual[:, -6:], expected[:, -6:])


def test_an_image_is_read_once_and_only_questions_are_left(predictor):
    read = []
    hook = predictor.model.language_model.base_model.register_forward_pre_hook(
        lambda _, __, kwargs: read.append(kwargs["inputs_embeds"].shape[:2]), with_kwargs=True
    )

    predictor.answer([SHORT, LONG, REGION], max_new_tokens=1)

    hook.remove()

    (images, prefix), (rows, rest) = read
    total = predictor.prepare([SHORT, LONG, REGION])["input_ids"].shape[1]
    assert (images, rows) == (1, 3)
    assert prefix >= predictor.processor.num_image_tokens and prefix + rest == total


@pytest.mark.parametrize(
    "questions", [[SHORT], [SHORT, OTHER_IMAGE]], ids=["one question", "one question an image"]
)
def test_where_nothing_is_shared_the_inputs_stay(predictor, questions):
    inputs = predictor.prepare(questions)

    assert prefill_shared(predictor.model, inputs) is inputs


@pytest.mark.parametrize("question", [SHORT, LONG, REGION], ids=["short", "long", "region"])
def test_the_second_question_about_an_encoded_image_reads_the_rest_alone(predictor, question):
    picture, lengths = predictor.encode(BLUE), []
    (expected,) = predictor.answer([question])
    predictor.ground(picture, "a boat")
    hook = predictor.model.language_model.base_model.register_forward_pre_hook(
        lambda _, __, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )

    (actual,) = predictor.answer([replace(question, image=picture)])

    hook.remove()
    assert actual.text == expected.text
    # float32 sums in another order
    torch.testing.assert_close(actual.confidence, expected.confidence, atol=1e-5, rtol=1e-5)
    total = predictor.prepare([question])["input_ids"].shape[1]
    assert max(lengths) <= total - predictor.processor.num_image_tokens


def test_an_image_behind_a_region_is_read_each_time(predictor):
    inputs = predictor.prepare([replace(REGION, image=predictor.encode(BLUE))])
    region_first = inputs["input_ids"].flip(1)
    inputs = {**inputs, "input_ids": region_first}

    assert prefill_known(predictor.model, inputs, predictor.encode(BLUE), KnownStarts(9)) is inputs


def test_texts_that_differ_before_the_image_are_not_shared(predictor):
    texts = ["a crab <image> Where?", "a clock <image> Where?"]
    inputs = predictor.processor([BLUE, BLUE], texts)

    assert prefill_shared(predictor.model, inputs) is inputs


def test_a_model_that_keeps_a_state_is_not_given_gaps(predictor, monkeypatch):
    monkeypatch.setattr(type(predictor.model.language_model), "_is_stateful", True)
    inputs = predictor.prepare([SHORT, LONG])

    assert prefill_shared(predictor.model, inputs) is inputs


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[1, 2, 3, 4], [1, 2, 5]], 2),
        ([[1, 2, 3], [1, 2, 3]], 2),
        ([[1, 2, 3, 4, 5], [1, 2, 3]], 2),
        ([[1, 9, 3, 4], [1, 9, 3, 5]], 1),
        ([[7, 2, 3], [8, 2, 3]], 0),
        ([[1, 2, 3, 4], [1, 5, 3, 4]], 1),
    ],
    ids=["common", "equal rows", "one is the other's start", "region", "nothing", "meets again"],
)
def test_the_shared_start_is_common_ends_before_a_region_and_leaves_a_token(rows, expected):
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])

    assert shared_length(ids, mask, region_token_id=9) == expected


def test_padding_moves_behind_the_shared_start():
    ids = torch.tensor([[1, 2, 3, 4, 5], [0, 0, 1, 2, 6]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])

    actual = gap_after(2, ids, mask)

    assert actual[0].tolist() == [[1, 2, 3, 4, 5], [1, 2, 0, 0, 6]]
    assert actual[1].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 1]]
