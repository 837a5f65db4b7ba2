"""Texts, boxes and confidences out of generated tokens."""

from __future__ import annotations

import math

import pytest
import torch

from cloc_mllm.inference.answers import Generation, read_answer
from cloc_mllm.mllm import ClocMllmProcessor

BOX = "<loc_0><loc_5><loc_19><loc_10>"


def generation(processor: ClocMllmProcessor, text: str, **more) -> Generation:
    """The generation of `text`, each token less probable than the one before."""
    ids = [*processor.tokenize(text), processor.tokenizer.eos_token_id]
    log_probs = -0.01 * torch.arange(1, len(ids) + 1)
    given = {"head_boxes": [], "head_scores": [], "num_prompt_tokens": 7, "limit": 48}
    return Generation(ids, log_probs, **(given | more))


@pytest.mark.parametrize("before", ["", " ", "  a crab ", "é🦀 and "], ids=repr)
def test_a_boxs_score_is_that_of_its_own_tokens(predictor, before: str) -> None:
    processor = predictor.processor
    written = generation(processor, f"{before}{BOX} and {BOX}")

    answer = read_answer(processor, written, (96, 48))

    first = written.ids.index(processor.tokenize("<loc_0>")[0])
    second = written.ids.index(processor.tokenize("<loc_0>")[0], first + 1)
    # the mean over four tokens that follow the one at `place`, which counts from 0
    expected = [math.exp(-0.01 * (place + 2.5)) for place in (first, second)]
    assert answer.scores.tolist() == pytest.approx(expected, abs=1e-6)
    assert [answer.text[start:end] for start, end in answer.spans] == [BOX, BOX]
    assert answer.confidence == pytest.approx(math.exp(-0.01 * len(written.ids) / 2), abs=1e-6)
    assert answer.boxes.to_pixels().xyxy[:, 2].tolist() == [96, 96]
    assert (answer.num_prompt_tokens, answer.num_new_tokens) == (7, len(written.ids))


def test_the_heads_scores_stay_with_their_boxes(predictor) -> None:
    tokenizer = predictor.processor.tokenizer
    processor = ClocMllmProcessor(
        tokenizer, image_size=64, num_image_tokens=16, num_bins=20, box_head=True
    )
    read = {"head_boxes": [[0, 0, 1, 1], [0.5, 0, 0.5, 1], [0, 0, 0.5, 1]]}
    read["head_scores"] = [0.9, 0.8, 0.7]

    answer = read_answer(processor, generation(processor, "<box> a <box> b <box>", **read), None)

    assert answer.scores.tolist() == [0.9, 0.7]  # the second has no area
    assert list(answer.box_failures) == ["zero_area"] and answer.failure == "not_a_box"
    assert answer.boxes.xyxy.tolist() == [[0, 0, 1, 1], [0, 0, 0.5, 1]]
    assert answer.confidence == 0.7
    assert answer.boxes.image_wh is None


def test_a_stop_word_cuts_text_and_boxes(predictor) -> None:
    processor = predictor.processor
    written = generation(processor, f"{BOX} stop {BOX}", limit=3)
    answer = read_answer(processor, written, None, cut=len(BOX) + 1)
    assert (answer.text, answer.spans, answer.finish_reason) == (BOX, [(0, len(BOX))], "stop")
