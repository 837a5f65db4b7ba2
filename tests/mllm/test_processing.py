import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from cloc_mllm.data import wordings
from cloc_mllm.geometry import CANVAS, Boxes, CanvasTransform
from cloc_mllm.inference.grounding_predictor import GroundingPredictor
from cloc_mllm.mllm import ClocMllmProcessor
from cloc_mllm.mllm.losses import IGNORE_INDEX
from cloc_mllm.mllm.projector import to_original_frame
from cloc_mllm.train.checkpoint import check_same_run

SIZES = pytest.mark.parametrize(
    "size", [(64, 64), (300, 40), (41, 333), (1000, 3)], ids=["square", "wide", "tall", "sliver"]
)


@pytest.fixture(scope="module")
def processor(mllm_dir: Path) -> ClocMllmProcessor:
    return ClocMllmProcessor.from_pretrained(mllm_dir)


@SIZES
def test_canvas_boxes_come_back_to_the_original_frame(processor, size):
    expected = torch.tensor([[0.1, 0.2, 0.5, 0.9], [0.0, 0.0, 1.0, 1.0]])

    inputs = processor(
        Image.new("RGB", size), "<image><region><region>", [Boxes.normalized(expected)]
    )
    actual = to_original_frame(inputs["region_boxes"], inputs["image_frame"][0])

    torch.testing.assert_close(actual, expected)
    transform = CanvasTransform(*size, processor.image_size)
    torch.testing.assert_close(
        transform.to_original(Boxes(inputs["region_boxes"], CANVAS)).xyxy, expected
    )


@SIZES
def test_a_painted_rectangle_is_found_where_the_region_box_says(processor, size):
    width, height = size
    box_px = (width // 4, 0, width // 4 + width // 2, height)
    image = Image.new("RGB", size, "black")
    image.paste("white", box_px)

    inputs = processor(image, "<image><region>", [Boxes.pixels([box_px], width, height)])

    x1, y1, x2, y2 = (inputs["region_boxes"][0] * processor.image_size).tolist()
    centre = inputs["pixel_values"][0, 0, int((y1 + y2) / 2), int((x1 + x2) / 2)]
    assert centre == inputs["pixel_values"][0, 0].max()


def test_rows_that_share_an_image_prepare_it_once(processor):
    one, other = Image.new("RGB", (8, 8)), Image.new("RGB", (8, 4))

    inputs = processor([one, other, one], ["<image><region>"] * 3, [[[0, 0, 1, 1]]] * 3)

    assert inputs["pixel_values"].shape[0] == inputs["image_frame"].shape[0] == 2
    assert inputs["image_index"].tolist() == [0, 1, 0]
    assert inputs["region_boxes"][:, 1].tolist() == [0, 0.25, 0]


def test_regions_are_packed_with_the_row_they_belong_to(processor):
    image = Image.new("RGB", (80, 40))
    box = [0.1, 0.1, 0.4, 0.6]

    inputs = processor(
        [image] * 3,
        ["<image>a<region>b<region>", "<image>c", "<image><region>"],
        [[box, box], None, Boxes.normalized([box])],
    )

    assert inputs["region_image_index"].tolist() == [0, 0, 2]
    assert inputs["region_boxes"].shape == (3, 4)
    assert inputs["input_ids"].eq(processor.image_token_id).sum(1).tolist() == [16, 16, 16]


@pytest.mark.parametrize(
    ("text", "regions", "message"),
    [
        ("no placeholder", None, "sample 0 has 0 <image> placeholders but 1 images"),
        ("<image><image>", None, "sample 0 has 2 <image> placeholders but 1 images"),
        ("<image><region>", None, "sample 0 has 1 <region> placeholders but 0 region boxes"),
        ("<image>", [[[0, 0, 1, 1]]], "sample 0 has 0 <region> placeholders but 1 region boxes"),
    ],
)
def test_wrong_placeholders_name_the_sample(processor, text, regions, message):
    with pytest.raises(ValueError, match=message):
        processor(Image.new("RGB", (8, 8)), text, regions)


def test_other_wrong_inputs_are_refused(processor):
    image = Image.new("RGB", (8, 8))
    with pytest.raises(ValueError, match="2 texts but 1 images"):
        processor(image, ["<image>", "<image>"])
    with pytest.raises(ValueError, match="regions for 2 samples"):
        processor([image], ["<image>"], [None, None])
    with pytest.raises(ValueError, match="sample 0 has 1 <image> placeholders but 2 images"):
        processor([[image, image]], ["<image>"])
    with pytest.raises(ValueError, match="regions for 1 images in a row of 2"):
        processor([[image, image]], ["<image><image><region>"], [[[[0, 0, 1, 1]]]])
    with pytest.raises(ValueError, match=r"sample 1 needs images .*, got int"):
        processor([image, 3], ["<image>", "<image>"])
    with pytest.raises(ValueError, match="pass `text`"):
        processor(image)


def test_labels_decode_to_exactly_the_answers(processor):
    box = processor.coordinates.encode((0.1, 0.2, 0.5, 0.9))
    answers = [box, "the smaller crab", "A crab left of a clock."]
    messages = []
    for question, answer in zip(["<image>Where?", "What?", "Describe."], answers, strict=True):
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]

    ids, labels = processor.encode_conversation(messages)

    assert len(ids) == len(labels)
    assert all(label in (token, IGNORE_INDEX) for token, label in zip(ids, labels, strict=True))
    learnt = [label for label in labels if label != IGNORE_INDEX]
    eos = processor.tokenizer.eos_token
    assert (
        processor.tokenizer.decode(learnt)
        == eos.join([f" {a}" if a != box else a for a in answers]) + eos
    )
    assert ids.count(processor.image_token_id) == processor.num_image_tokens


def test_training_prompts_are_token_for_token_what_generation_sees(processor):
    question = {"role": "user", "content": "<image>Where is the smaller crab?"}
    ids, labels = processor.encode_conversation(
        [question, {"role": "assistant", "content": "a crab"}]
    )

    prompt = processor.apply_chat_template(
        [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": Image.new("RGB", (8, 8))},
                    {"type": "text", "text": "Where is the smaller crab?"},
                ],
            }
        ],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
    )["input_ids"][0].tolist()

    assert ids[: len(prompt)] == prompt
    assert labels[: len(prompt)] == [IGNORE_INDEX] * len(prompt)
    assert IGNORE_INDEX not in labels[len(prompt) :]


def test_what_a_template_writes_after_the_end_of_an_answer_is_not_learnt(mllm_dir):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(mllm_dir)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    processor = ClocMllmProcessor(tokenizer, image_size=64, num_image_tokens=16, num_bins=20)

    ids, labels = processor.encode_conversation(
        [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "here"}]
    )

    learnt = [label for label in labels if label != IGNORE_INDEX]
    assert processor.decode_answer(learnt) == "here"
    assert learnt[-1] == tokenizer.eos_token_id
    assert labels[-1] == IGNORE_INDEX and ids[-1] != tokenizer.eos_token_id


def test_padding_of_labels(processor):
    batch = processor.pad([[5, 6, 7], [8]], labels=[[-100, 6, 7], [8]])

    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    left = processor.pad([[5, 6, 7], [8]], side="left")
    assert left["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


def test_answers_keep_location_tokens_and_stop_at_the_end(processor):
    text = processor.coordinates.encode((0.1, 0.2, 0.5, 0.9))
    eos = processor.tokenizer.eos_token_id
    ids = processor.tokenize(text)

    assert len(ids) == 4
    assert processor.decode_answer([*ids, eos, *ids]) == text
    assert processor.decode_answer(torch.tensor([eos, 5])) == ""


BOX = "<loc_0><loc_5><loc_19><loc_10>"


@pytest.mark.parametrize("kind", ["ids", "prompt and ids", "lists", "texts"])
def test_boxes_of_generated_answers_in_pixels(processor, kind):
    texts = [BOX, f"a crab {BOX} and {BOX}", "a crab", ""]
    rows = [[*processor.tokenize(text), processor.tokenizer.eos_token_id] for text in texts]
    ids = processor.pad(rows)["input_ids"]
    prompt = torch.tensor([processor.tokenize("Where?")] * 4)
    outputs = {
        "ids": ids,
        "prompt and ids": torch.cat([prompt, ids], 1),
        "lists": rows,
        "texts": texts,
    }
    sizes = [(48, 96), (100, 10), (1, 1), (1, 1)]  # height, width
    cut = prompt.shape[1] if kind == "prompt and ids" else 0

    results = processor.post_process_grounding(outputs[kind], sizes, num_prompt_tokens=cut)

    expected = torch.tensor([[0.0, 48 * 5 / 19, 96.0, 48 * 10 / 19]])
    torch.testing.assert_close(results[0]["boxes"], expected)
    assert results[1]["boxes"].shape == (2, 4) and results[1]["boxes"][1, 2] == 10
    assert [len(result["boxes"]) for result in results] == [1, 2, 0, 0]
    assert [result["failure"] for result in results] == [None, "not_a_box", "not_a_box", "empty"]
    assert [result["text"] for result in results] == texts


def test_boxes_of_generated_answers_without_or_with_wrong_sizes(processor):
    (result,) = processor.post_process_grounding([BOX])
    torch.testing.assert_close(result["boxes"], torch.tensor([[0, 5 / 19, 1, 10 / 19]]))
    (result,) = processor.post_process_grounding([BOX], torch.tensor([[48, 96]]))
    assert result["boxes"][0, 2] == 96
    with pytest.raises(ValueError, match="1 answers but 2 target_sizes"):
        processor.post_process_grounding([BOX], [(1, 1), (1, 1)])
    with_head = ClocMllmProcessor(
        processor.tokenizer, image_size=64, num_image_tokens=16, num_bins=20, box_head=True
    )
    with pytest.raises(ValueError, match="not in the text; ask with"):
        with_head.post_process_grounding(["<box>"])


def test_save_and_load_keeps_everything(processor, tmp_path):
    processor.save_pretrained(tmp_path)

    loaded = ClocMllmProcessor.from_pretrained(tmp_path)

    assert loaded.fingerprint == processor.fingerprint
    assert loaded.chat_template == processor.chat_template
    assert loaded.tokenize("<image>a crab<loc_3>") == processor.tokenize("<image>a crab<loc_3>")


def test_another_preprocessing_is_refused_by_name(processor, mllm_dir):
    from transformers import AutoTokenizer

    with pytest.raises(ValueError, match=r"image_size: the saved processor has 64, now 32"):
        ClocMllmProcessor(
            processor.tokenizer,
            image_size=32,
            num_image_tokens=16,
            num_bins=20,
            fingerprint=processor.fingerprint,
        )
    tokenizer = AutoTokenizer.from_pretrained(mllm_dir)
    tokenizer.add_tokens(["quahog"])
    with pytest.raises(ValueError, match=r"tokenizer: the saved processor has"):
        ClocMllmProcessor(
            tokenizer,
            image_size=64,
            num_image_tokens=16,
            num_bins=20,
            chat_template=processor.chat_template,
            fingerprint=processor.fingerprint,
        )


@pytest.mark.parametrize("changed", ["ground", "refer", "not there"])
def test_a_model_is_asked_only_as_it_was_taught(
    processor, mllm_dir, tmp_path, monkeypatch, changed
):
    """Models that were saved before the wordings were part of the fingerprint have no key for them:
    they were taught the first wordings."""
    assert "prompts" not in json.loads((mllm_dir / "processor_config.json").read_text())
    GroundingPredictor.from_pretrained(mllm_dir)

    if changed == "not there":
        monkeypatch.setattr(wordings, "NOT_THERE", "nowhere")
    else:
        other = ("Point at {phrase} {box} <region>",)
        monkeypatch.setitem(wordings.SINGLE.trained, changed, other)

    refused = r"prompts: the saved processor has None, now '[0-9a-f]{16}'"
    with pytest.raises(ValueError, match=refused):
        ClocMllmProcessor.from_pretrained(mllm_dir)
    taught_anew = ClocMllmProcessor(processor.tokenizer, image_size=64, num_image_tokens=16)
    taught_anew.save_pretrained(tmp_path)
    assert ClocMllmProcessor.from_pretrained(tmp_path).fingerprint == taught_anew.fingerprint
    checkpoint = {"config": {}, "fingerprint": processor.fingerprint, "num_samples": 1}
    with pytest.raises(ValueError, match=r"fingerprint prompts: '\(absent\)' != '[0-9a-f]{16}'"):
        check_same_run(checkpoint, {}, taught_anew.fingerprint, num_samples=1)

    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"prompts: the saved processor has '[0-9a-f]{16}'"):
        ClocMllmProcessor.from_pretrained(tmp_path)


def test_a_processor_keeps_the_wordings_and_tasks_that_its_model_was_taught(
    processor, mllm_dir, tmp_path
) -> None:
    pools = wordings.load_wordings("pools")
    taught = ClocMllmProcessor.from_pretrained(mllm_dir)
    taught.teach(pools, ["several", "grounded_caption", "all"])
    taught.save_pretrained(tmp_path)

    again = ClocMllmProcessor.from_pretrained(tmp_path)

    assert again.asked_in == pools
    assert again.taught == ["all", "grounded_caption", "several"]
    assert again.fingerprint == taught.fingerprint
    assert again.fingerprint["prompts"] == pools.digest()
    assert again.fingerprint["links"] == "<p>phrase</p>BOXES"
    new = {"prompts", "taught", "links"}
    assert again.fingerprint.keys() - processor.fingerprint.keys() == new
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    saved["wordings"]["ground"]["trained"][0] = "Point at {phrase}"
    (tmp_path / "processor_config.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="prompts: the saved processor has"):
        ClocMllmProcessor.from_pretrained(tmp_path)
