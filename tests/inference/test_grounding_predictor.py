import io
import itertools

import pytest
import torch
from PIL import Image

from cloc_mllm.config import ConversationConfig
from cloc_mllm.data.images import ImageError
from cloc_mllm.data.wordings import NOT_THERE
from cloc_mllm.geometry import Boxes
from cloc_mllm.inference.grounding_predictor import (
    GroundingPredictor,
    Question,
)
from cloc_mllm.inference.inputs import check_regions
from cloc_mllm.mllm import build_mllm
from tests.photos import encoded

PICTURE = Image.new("RGB", (96, 48), "teal")


def test_a_box_answer_is_parsed_into_the_pictures_frame(predictor, always):
    always("<loc_0><loc_5><loc_19><loc_10>")

    result = predictor.ground(PICTURE, "the crab")

    assert (result.labels, result.failures) == (["the crab"], [None])
    assert result.text == ["<loc_0><loc_5><loc_19><loc_10>"]
    assert result.image is PICTURE
    torch.testing.assert_close(
        result.boxes.to_pixels().xyxy[0].tolist(), [0.0, 48 * 5 / 19, 96.0, 48 * 10 / 19]
    )
    assert result.scores.tolist() == pytest.approx([0.9], abs=1e-4)


def test_a_phrase_that_is_not_there_has_no_box(mllm_config):
    torch.manual_seed(0)
    model, processor = build_mllm(mllm_config)
    model.config.says_not_there = True
    predictor = GroundingPredictor(model, processor)
    absent = [*processor.tokenize(NOT_THERE), processor.tokenizer.eos_token_id]
    box = [*processor.tokenize("<loc_0><loc_5><loc_19><loc_10>"), processor.tokenizer.eos_token_id]
    steps = itertools.count()

    def write(module, inputs, logits):
        step = next(steps)
        for row, ids in enumerate((absent, box)):
            logits[row, -1, ids[min(step, len(ids) - 1)]] += 1e4

    hook = model.get_output_embeddings().register_forward_hook(write)
    result = predictor.ground(PICTURE, ["the zeppelin", "the crab"])
    hook.remove()

    assert len(result) == 2 and len(result.boxes) == len(result.scores) == 1
    assert (result.labels, result.query_index.tolist()) == (["the crab"], [1])
    assert result.failures == ["not_there", None]
    assert result.text[0] == NOT_THERE
    lost, found = result
    assert len(lost.boxes) == 0 and lost.failures == ["not_there"]
    assert torch.equal(found.boxes.xyxy, result.boxes.xyxy) and found.labels == ["the crab"]


def test_a_model_that_was_taught_several_boxes_answers_all_of_them(mllm_config):
    torch.manual_seed(0)
    model, processor = build_mllm(
        mllm_config, ConversationConfig(several=1, point=1, absent=1, wordings="pools")
    )
    predictor = GroundingPredictor(model, processor)
    first, second = "<loc_1><loc_5><loc_9><loc_10>", "<loc_2><loc_2><loc_9><loc_10>"
    texts = [first + second, first]
    rows = [[*processor.tokenize(t), processor.tokenizer.eos_token_id] for t in texts]
    steps = itertools.count()

    def write(module, inputs, logits):
        step = next(steps)
        for row, ids in zip(logits, rows, strict=True):
            row[-1, ids[min(step, len(ids) - 1)]] += 1e4

    hook = model.get_output_embeddings().register_forward_hook(write)
    result = predictor.ground(PICTURE, ["the two crabs", "the clock"])
    hook.remove()

    assert result.failures == [None, None] and result.text == texts
    assert result.query_index.tolist() == [0, 0, 1]
    assert result.labels == ["the two crabs", "the two crabs", "the clock"]
    assert len(result[0].boxes) == len(result[0].scores) == 2
    assert (result.scores > 0.9).all()
    assert predictor.ground_questions(PICTURE, ["it"])[0].text == "Find it."
    assert predictor.ground_questions(PICTURE, ["it"], ["Box {phrase}!"])[0].text == "Box it!"


def test_pointing_is_for_models_that_were_taught_to(predictor, always):
    with pytest.raises(ValueError, match="not taught to point"):
        predictor.point(PICTURE, "the crab")
    predictor.processor.taught, predictor.grammar.points = ["point"], True
    try:
        always("<loc_19><loc_0>")
        assert predictor.point(PICTURE, "the crab") == (1.0, 0.0)
        always("a crab")
        assert predictor.point(PICTURE, "the crab") is None
    finally:
        predictor.processor.taught, predictor.grammar.points = [], False


def test_no_phrase_and_no_region_have_no_boxes(predictor):
    for result in (predictor.ground(PICTURE, []), predictor.refer(PICTURE, [])):
        assert len(result) == 0
        assert result.boxes.to_pixels().xyxy.shape == (0, 4) and result.scores.shape == (0,)


def test_what_is_no_box_is_a_failure_and_not_an_empty_answer(predictor, always):
    always("a crab", "")

    questions = ["Where is the crab?", "Where is the clock?"]
    answers = predictor.answer([Question(PICTURE, question) for question in questions])

    assert [answer.failure for answer in answers] == ["not_a_box", "empty"]
    assert [len(answer.boxes) for answer in answers] == [0, 0]
    assert answers[0].text == "a crab"
    assert answers[1].confidence is None


def test_boxes_between_words_are_found_with_their_own_scores(predictor, always):
    words = " a crab <loc_0><loc_5><loc_19><loc_10> and more"
    always(words, "<loc_0><loc_5><loc_19><loc_10>")

    between, alone = predictor.answer([Question(PICTURE, "What is there?")] * 2)

    assert (between.failure, alone.failure) == ("not_a_box", None)
    for answer in (between, alone):
        ((start, end),) = answer.spans
        assert answer.text[start:end] == "<loc_0><loc_5><loc_19><loc_10>"
        assert answer.boxes.to_pixels().xyxy[0, 2] == 96
        assert answer.scores.tolist() == pytest.approx([0.9], abs=1e-4)
    assert between.num_new_tokens == len(predictor.processor.tokenize(words)) + 1
    assert between.finish_reason == "stop"
    always(words, words)
    cut, _ = predictor.answer([Question(PICTURE, "What is there?")] * 2, max_new_tokens=2)
    assert (cut.finish_reason, cut.num_new_tokens) == ("length", 2)


def test_an_adapter_is_no_whole_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is an adapter.*cloc-mllm export --mllm .* --merge"):
        GroundingPredictor.from_pretrained(tmp_path)


def test_an_encoded_image_is_not_encoded_again(predictor, monkeypatch):
    box = Boxes.normalized([[0.1, 0.1, 0.4, 0.6]])
    expected = predictor.ground(PICTURE, ["a crab"]), predictor.refer(PICTURE, box)
    caption = predictor.caption(PICTURE)
    encoded = predictor.encode(PICTURE)
    assert encoded.image is PICTURE and predictor.encode(encoded) is encoded
    with monkeypatch.context() as patch:
        patch.setattr(predictor.model.vision.encoder, "forward", None)
        patch.setattr(predictor.processor.image_processor, "prepare", None)
        actual = predictor.ground(encoded, ["a crab"]), predictor.refer(encoded, box)
        assert predictor.caption(encoded).text == caption.text
        assert "".join(predictor.stream(encoded, "Describe the image.")).strip() == caption.text
    for one, other in zip(actual, expected, strict=True):
        assert (one.text, one.labels) == (other.text, other.labels)
        assert torch.equal(one.scores, other.scores)


def test_encoded_and_other_images_share_a_batch(predictor):
    other = Image.effect_noise((40, 90), 80).convert("RGB")
    images = [predictor.encode(PICTURE), other, PICTURE]
    questions = [Question(image, "Where is the crab?") for image in images]
    expected = [predictor.answer([Question(i, "Where is the crab?")])[0] for i in (PICTURE, other)]

    actual = predictor.answer(questions)

    assert len(predictor.prepare(questions)["pixel_values"]) == 2  # PICTURE counts once
    assert [answer.text for answer in actual] == [expected[i].text for i in (0, 1, 0)]


def test_an_image_that_another_model_encoded_is_refused(predictor, mllm_dir):
    other = GroundingPredictor.from_pretrained(mllm_dir, device="cpu")
    with pytest.raises(ValueError, match="encoded by another model"):
        predictor.ground(other.encode(PICTURE), ["a crab"])


@pytest.mark.parametrize("wanted", ["<loc_9><loc_5><loc_3><loc_10>", "<loc_9><loc_5>", "<loc_19>"])
def test_a_box_begun_in_a_free_answer_becomes_one(predictor, always, wanted: str) -> None:
    always(wanted)
    asked = Question(PICTURE, "Where is the boat?")
    (answer,) = predictor.answer([asked], max_new_tokens=4)
    begun = wanted != "<loc_19>"  # nothing lies right of it, so no box begins there
    assert answer.failure == (None if begun else "empty")


def test_ground_writes_a_box_whatever_the_model_wants(predictor, always):
    always("a crab", "<loc_9><loc_5><loc_3><loc_10>", "")

    result = predictor.ground(PICTURE, ["the crab", "the boat", "the clock"])

    assert result.failures == [None, None, None]
    assert result.query_index.tolist() == [0, 1, 2]


def test_an_answer_to_where_is_no_longer_than_a_box(predictor, monkeypatch):
    asked = []
    generate = predictor.model.generate
    monkeypatch.setattr(
        predictor.model, "generate", lambda **kw: (asked.append(kw), generate(**kw))[1]
    )

    predictor.ground(PICTURE, ["the crab"])

    assert asked[0]["max_new_tokens"] == 4 + 1


def test_many_questions_equal_one_at_a_time(predictor):
    phrases = ["the crab", "the second boat from the left", "a clock"]
    boxes = Boxes.pixels([[4, 4, 40, 30], [50, 10, 90, 44]], 96, 48)
    questions = predictor.ground_questions(PICTURE, phrases) + predictor.refer_questions(
        PICTURE, boxes
    )

    together = predictor.answer(questions)
    apart = predictor.answer(questions, batch_size=1)

    for one, other in zip(together, apart, strict=True):
        assert one.text == other.text
        assert one.confidence == pytest.approx(other.confidence, abs=1e-4)
        assert one.num_prompt_tokens == other.num_prompt_tokens
    assert predictor.refer(PICTURE, boxes).labels == [answer.text for answer in together[3:]]
    found = predictor.ground(PICTURE, phrases)
    answers = predictor.answer(predictor.ground_questions(PICTURE, phrases), boxes_only=True)
    assert torch.equal(found.boxes.xyxy, torch.cat([answer.boxes.xyxy for answer in answers]))
    assert found.labels == phrases


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

    assert predictor.caption(tmp_path / "picture.png").text == predictor.caption(PICTURE).text
    assert isinstance(predictor.ask(str(tmp_path / "picture.png"), "How many?").text, str)
    assert predictor.answer([]) == []


def test_a_streamed_answer_is_the_answer_in_pieces(predictor, always):
    always("a red apple left of a clock")
    pieces = list(predictor.stream(PICTURE, "What is there?"))
    assert len(pieces) > 2

    always("a red apple left of a clock")
    assert "".join(pieces).strip() == predictor.ask(PICTURE, "What is there?").text


def test_a_stream_that_fails_raises_and_does_not_hang(predictor, monkeypatch):
    def fail(**_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(predictor.model, "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(predictor.stream(PICTURE, "What is there?"))


@pytest.mark.parametrize(
    ("regions", "message"),
    [
        (
            [[0, 0, 30, 20]],
            r"in 0..1 of the picture, got \[0, 0, 30, 20\]; .*Boxes.pixels\(.*, 64, 48",
        ),
        ([0.1, 0.2, 0.5, 0.6], "regions are given as a list"),
    ],
)
def test_plain_numbers_are_no_pixels(regions, message):
    """Cut at the edge, the first would be the whole picture."""
    with pytest.raises(ValueError, match=message):
        check_regions(regions, (64, 48))


def test_boxes_are_clipped_and_unusable_ones_refused(predictor):
    whole = predictor.refer(PICTURE, Boxes.normalized([[0, 0, 1, 1]]))

    clipped = predictor.refer(PICTURE, Boxes.pixels([[-9, -9, 200, 200]], 96, 48))
    assert clipped.labels == whole.labels and clipped.text == clipped.labels
    assert clipped.boxes.to_pixels().xyxy.tolist() == [[0, 0, 96, 48]]
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

    expected = predictor.prepare(predictor.refer_questions(upright, [[0.1, 0.1, 0.4, 0.6]]))
    actual = predictor.prepare(predictor.refer_questions(photo, [[0.1, 0.1, 0.4, 0.6]]))

    assert all(torch.equal(actual[key], expected[key]) for key in expected)
    assert predictor.refer(photo, box).labels == predictor.refer(upright, box).labels
    results = [predictor.ground(image, ["the crab"]) for image in (photo, upright)]
    assert results[0].text == results[1].text
    assert results[0].boxes.image_wh == (96, 48)
    with pytest.raises(ValueError, match=r"pixels of a 48 x 96 picture, but the upright one is 96"):
        predictor.refer(photo, Boxes.pixels([[1, 1, 40, 90]], *photo.size))


def test_other_unusable_input_is_refused(predictor, tmp_path):
    (tmp_path / "page.jpg").write_text("<html>")
    with pytest.raises(ImageError, match="not_an_image"):
        predictor.caption(tmp_path / "page.jpg")
    with pytest.raises(ValueError, match="phrase 1 is blank"):
        predictor.ground(PICTURE, ["crab", "  "])
    with pytest.raises(ValueError, match="holds <image>, which stands for the picture"):
        predictor.ground(PICTURE, ["an <image>"])
    with pytest.raises(ValueError, match="1 <region> placeholders but 0 region boxes"):
        predictor.ask(PICTURE, "What is in <region>?")
    with pytest.raises(ValueError, match=r"one question as a text, got \['What\?', 'Where\?'\]"):
        predictor.ask(PICTURE, ["What?", "Where?"])
    with pytest.raises(ValueError, match="the question is blank"):
        predictor.ask(PICTURE, " ")
    with pytest.raises(ValueError, match="expected texts, got None among 2"):
        predictor.ground(PICTURE, ["a crab", None])
    with pytest.raises(ValueError, match=r"a box \(4 numbers\), a point \(2\) or a mask"):
        predictor.refer(PICTURE, [0.1, 0.1, 0.4, 0.6])  # one box, not a list of boxes


def test_a_directory_without_a_model_says_what_was_expected(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no MLLM directory"):
        GroundingPredictor.from_pretrained(tmp_path)
    monkeypatch.setattr("cloc_mllm.shipped.ASSETS", tmp_path)
    with pytest.raises(FileNotFoundError, match="no mllm ships by the name scenes"):
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

    regions = [box, mask, [0.5, 0.5]]
    questions = predictor.refer_questions(PICTURE, regions)

    assert questions[0].text == questions[1].text != questions[2].text
    together = predictor.refer(PICTURE, regions)  # one picture: read once for all
    assert together.labels == [
        predictor.refer(PICTURE.copy(), [region]).labels[0] for region in regions
    ]
    expected = [[24.0, 12, 72, 36]] * 2 + [[48.0, 24, 49, 25]]
    torch.testing.assert_close(together.boxes.to_pixels().xyxy.float(), torch.tensor(expected))
    assert predictor.refer(PICTURE, Boxes.normalized([box])).labels == together.labels[:1]
    asked = predictor.ask(PICTURE, "What is in <region> and <region>?", [box, mask])
    assert asked.num_prompt_tokens > 16


def test_a_model_of_boxes_refuses_points_and_masks(predictor):
    with pytest.raises(ValueError, match="takes boxes, not points and masks: its encoder learnt"):
        predictor.refer(PICTURE, [[0.5, 0.5]])


def test_an_answer_is_heard_token_by_token(predictor: GroundingPredictor) -> None:
    questions = predictor.ground_questions(Image.new("RGB", (60, 40)), ["the crab"])
    heard: list[str] = []
    (actual,) = predictor.write(predictor.read(questions), boxes_only=True, on_text=heard.append)
    (expected,) = predictor.answer(questions, boxes_only=True)
    assert actual.text == expected.text == heard[-1]
    assert len(heard) == expected.num_new_tokens
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(heard))
