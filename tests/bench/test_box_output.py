from dataclasses import replace

import pytest

from box_output import FORMATS, check_boxes, ground, predictors, write


def test_each_way_answers_every_question_in_its_own_number_of_tokens():
    made = predictors(num_layers=1)
    assert made.keys() == FORMATS.keys()
    written = {}
    for name, predictor in made.items():
        answers, after_reading = ground(predictor, 2)(), write(predictor, 2)
        check_boxes(answers)
        for _ in range(2):  # a reading is not used up
            assert [a.text for a in after_reading()] == [a.text for a in answers]
        written[name] = [len(predictor.processor.tokenize(a.text)) for a in answers]
    assert written["box head"] == [1, 1] and written["location tokens"] == [4, 4]
    assert min(written["integers as text"]) > 8
    with pytest.raises(AssertionError, match="not_a_box"):
        check_boxes([replace(answers[0], failure="not_a_box")])
