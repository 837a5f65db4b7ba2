import io

import pytest
import torch
from PIL import Image

from cloc_mllm.data.images import ImageError
from cloc_mllm.geometry import Boxes
from cloc_mllm.inference import ChatRequest, GroundingPredictor
from tests.photos import encoded

PICTURE = Image.new("RGB", (96, 48), "teal")


def test_a_box_answer_is_parsed_into_the_pictures_frame(predictor, always):
    always("<loc_0><loc_5><loc_19><loc_10>")

    (answer,) = predictor.ground(PICTURE, ["the crab"])

    assert answer.raw_text == "<loc_0><loc_5><loc_19><loc_10>"
    assert answer.failure is None
    torch.testing.assert_close(
        answer.boxes.to_pixels(96, 48).xyxy[0].tolist(), [0.0, 48 * 5 / 19, 96.0, 48 * 10 / 19]
    )
    assert answer.confidence == pytest.approx(0.9, abs=1e-4)


def test_what_is_no_box_is_a_failure_and_not_an_empty_answer(predictor, always):
    always("a crab", "")

    questions = ["Where is the crab?", "Where is the clock?"]
    answers = predictor.answer([ChatRequest(PICTURE, question) for question in questions])

    assert [answer.failure for answer in answers] == ["not_a_box", "empty"]
    assert [len(answer.boxes) for answer in answers] == [0, 0]
    assert answers[0].raw_text == "a crab"
    assert answers[1].confidence is None


@pytest.mark.parametrize("wanted", ["<loc_9><loc_5><loc_3><loc_10>", "<loc_9><loc_5>", "<loc_19>"])
def test_a_box_begun_in_a_free_answer_becomes_one(predictor, always, wanted: str) -> None:
    always(wanted)
    asked = ChatRequest(PICTURE, "Where is the boat?")
    (answer,) = predictor.answer([asked], max_new_tokens=4)
    begun = wanted != "<loc_19>"  # nothing lies right of it, so no box begins there
    assert answer.failure == (None if begun else "empty")


def test_ground_writes_a_box_whatever_the_model_wants(predictor, always):
    always("a crab", "<loc_9><loc_5><loc_3><loc_10>", "")

    answers = predictor.ground(PICTURE, ["the crab", "the boat", "the clock"])

    assert [answer.failure for answer in answers] == [None, None, None]
    assert [len(answer.boxes) for answer in answers] == [1, 1, 1]


def test_an_answer_to_where_is_no_longer_than_a_box(predictor, monkeypatch):
    asked = []
    generate = predictor.model.generate
    monkeypatch.setattr(
        predictor.model, "generate", lambda **kw: (asked.append(kw), generate(**kw))[1]
    )

    predictor.ground(PICTURE, ["the crab"])

    assert asked[0]["max_new_tokens"] == 4 + 1


def test_many_questions_equal_one_at_a_time(predictor, monkeypatch):
    import cloc_mllm.inference.grounding_predictor as module

    phrases = ["the crab", "the second boat from the left", "a clock"]
    boxes = Boxes.pixels([[4, 4, 40, 30], [50, 10, 90, 44]], 96, 48)
    together = predictor.ground(PICTURE, phrases), predictor.refer(PICTURE, boxes)
    monkeypatch.setattr(module, "_BATCH_SIZE", 1)
    apart = predictor.ground(PICTURE, phrases), predictor.refer(PICTURE, boxes)

    assert [a.raw_text for a in together[0]] == [a.raw_text for a in apart[0]]
    assert together[1] == apart[1]
    for one, other in zip(together[0], apart[0], strict=True):
        assert one.confidence == pytest.approx(other.confidence, abs=1e-4)


def test_one_picture_is_encoded_once_for_all_its_questions(predictor, monkeypatch):
    seen = []
    encode = predictor.model.vision.encode_image
    monkeypatch.setattr(
        predictor.model.vision, "encode_image", lambda x: (seen.append(len(x)), encode(x))[1]
    )

    predictor.ground(PICTURE, ["a crab", "a boat", "a clock"])

    assert seen == [1]


def test_files_captions_and_free_questions(predictor, tmp_path):
    PICTURE.save(tmp_path / "picture.png")

    assert predictor.caption(tmp_path / "picture.png") == predictor.caption(PICTURE)
    assert isinstance(predictor.ask(str(tmp_path / "picture.png"), "How many?").raw_text, str)
    assert predictor.answer([]) == []


def test_a_streamed_answer_is_the_answer_in_pieces(predictor, always):
    always("a red apple left of a clock")
    pieces = list(predictor.stream(PICTURE, "What is there?"))
    assert len(pieces) > 2

    always("a red apple left of a clock")
    assert "".join(pieces).strip() == predictor.ask(PICTURE, "What is there?").raw_text


def test_a_stream_that_fails_raises_and_does_not_hang(predictor, monkeypatch):
    def fail(**_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(predictor.model, "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(predictor.stream(PICTURE, "What is there?"))


def test_boxes_are_clipped_and_unusable_ones_refused(predictor):
    whole = predictor.refer(PICTURE, Boxes.normalized([[0, 0, 1, 1]]))

    assert predictor.refer(PICTURE, Boxes.pixels([[-9, -9, 200, 200]], 96, 48)) == whole
    with pytest.raises(ValueError, match=r"\[96\.0, 0\.0, 48\.0, 48\.0\] px .* inverted"):
        predictor.refer(PICTURE, Boxes.normalized([[1, 0, 0.5, 1]]))
    with pytest.raises(ValueError, match="outside"):
        predictor.refer(PICTURE, Boxes.normalized([[2, 2, 3, 3]]))


def test_a_photo_with_an_exif_orientation_is_asked_about_upright(predictor):
    upright = Image.effect_noise((96, 48), 60).convert("RGB")
    upright.paste("red", (8, 4, 40, 30))
    photo = Image.open(io.BytesIO(encoded(upright, orientation=6)))
    assert photo.size == (48, 96)
    box = Boxes.pixels([[-9, 4, 40, 60]], 96, 48)  # reaches out of the upright picture

    expected = predictor.prepare([predictor.refer_request(upright, [0.1, 0.1, 0.4, 0.6])])
    actual = predictor.prepare([predictor.refer_request(photo, [0.1, 0.1, 0.4, 0.6])])

    assert all(torch.equal(actual[key], expected[key]) for key in expected)
    assert predictor.refer(photo, box) == predictor.refer(upright, box)
    answers = [predictor.ground(image, ["the crab"])[0] for image in (photo, upright)]
    assert answers[0].raw_text == answers[1].raw_text
    with pytest.raises(ValueError, match=r"pixels of a 48 x 96 picture, but the upright one is 96"):
        predictor.refer(photo, Boxes.pixels([[1, 1, 40, 90]], *photo.size))


def test_other_unusable_input_is_refused(predictor, tmp_path):
    (tmp_path / "page.jpg").write_text("<html>")
    with pytest.raises(ImageError, match="not_an_image"):
        predictor.caption(tmp_path / "page.jpg")
    with pytest.raises(ValueError, match="phrase 1 is blank"):
        predictor.ground(PICTURE, ["crab", "  "])
    with pytest.raises(ValueError, match="2 <image> placeholders"):
        predictor.ground(PICTURE, ["an <image>"])
    with pytest.raises(ValueError, match="1 <region> placeholders but 0 region boxes"):
        predictor.answer([ChatRequest(PICTURE, "What is in <region>?")])


def test_a_directory_without_a_model_says_what_was_expected(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no MLLM directory"):
        GroundingPredictor.from_pretrained(tmp_path)
    monkeypatch.setattr("cloc_mllm.shipped.ASSETS", tmp_path)
    with pytest.raises(FileNotFoundError, match="no shipped mllm model"):
        GroundingPredictor.from_pretrained()


def test_a_processor_of_another_model_is_refused_by_name(predictor):
    model = predictor.model
    config = model.config
    try:
        config.fingerprint = {**config.fingerprint, "image_size": 448}
        with pytest.raises(ValueError, match="image_size: the model has 448, now 64"):
            GroundingPredictor(model, predictor.processor)
    finally:
        config.fingerprint = predictor.processor.fingerprint


def test_points_and_masks_are_asked_with_the_box_around_them(roi_mllm_dir):
    predictor = GroundingPredictor.from_pretrained(roi_mllm_dir, device="cpu")
    mask = torch.zeros(48, 96, dtype=torch.bool)
    mask[12:36, 24:72] = True
    box = [0.25, 0.25, 0.75, 0.75]

    requests = [predictor.refer_request(PICTURE, region) for region in (box, mask, [0.5, 0.5])]

    assert requests[0].question == requests[1].question != requests[2].question
    regions = [box, mask, [0.5, 0.5]]
    together = predictor.refer(PICTURE, regions)  # one picture: read once for all
    assert together == [predictor.refer(PICTURE.copy(), [region])[0] for region in regions]
    assert predictor.refer(PICTURE, Boxes.normalized([box])) == together[:1]


def test_a_model_of_boxes_refuses_points_and_masks(predictor):
    with pytest.raises(ValueError, match="takes boxes, not points and masks: its encoder learnt"):
        predictor.refer(PICTURE, [[0.5, 0.5]])
