import pytest
import torch
from PIL import Image

from cloc_mllm.data.scenes import generate_scenes
from cloc_mllm.geometry import Boxes
from cloc_mllm.inference.grounding_predictor import Question
from cloc_mllm.inference.results import Answer
from generation import (
    NEW_TOKENS,
    check_equal,
    ideal_speedup,
    random_predictor,
    scene_questions,
    together_and_apart,
)


def test_the_two_sides_answer_alike_and_the_ideal_counts_tokens():
    predictor = random_predictor(1)
    image = Image.new("RGB", (64, 48), "teal")
    asked = [Question(image, f"Where is a {name}?") for name in ("crab", "boat", "crab")]

    together, apart = together_and_apart(predictor, asked)
    check_equal(together(), apart())

    inputs = predictor.prepare(asked)
    rows = [
        ids[mask == 1].tolist()
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ]
    assert rows[0].count(predictor.model.config.image_token_id) == 196
    common = next(i for i, ids in enumerate(zip(*rows, strict=False)) if len(set(ids)) > 1)
    own = sum(map(len, rows)) / 3 - common + NEW_TOKENS
    expected = 3 * (common + own) / (common + 3 * own)
    assert ideal_speedup(predictor, asked) == pytest.approx(expected)


def test_different_answers_stop_the_bench():
    nothing = Boxes.normalized([]), torch.zeros(0), []
    one, other = (Answer(text, *nothing, 1.0, "not_a_box") for text in "ab")
    with pytest.raises(AssertionError, match="question 1"):
        check_equal([one, one], [one, other])


def test_questions_about_one_scene_share_its_image():
    questions = scene_questions(list(generate_scenes(2, split="test", long_side=64)))
    assert len({id(question.image) for question in questions}) == 2
    assert all(question.text.startswith("Where is ") for question in questions)
