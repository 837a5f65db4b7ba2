"""The sources of a `<region>` token: Prompter, RoI-Align, or its box alone; points and masks."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from cloc_mllm.config import ConversationConfig, PrompterConfig
from cloc_mllm.geometry import Boxes, CanvasTransform
from cloc_mllm.mllm import build_mllm
from cloc_mllm.mllm.collate import ConversationCollator
from cloc_mllm.mllm.regions import read_regions, regions_on_canvas
from cloc_mllm.mllm.views import image_views
from cloc_mllm.mllm.vision_inputs import VisionInputs
from cloc_mllm.models.position import mask_boxes, token_cells
from cloc_mllm.models.region_like import as_mask
from tests.tiny_mllm import one_step_and_back, save_tiny_cloc

BOX = [0.25, 0.25, 0.75, 0.5]
KINDS = ("prompter", "roi", "coordinates")


@pytest.fixture
def build(mllm_config):
    def build_kind(kind: str):
        torch.manual_seed(0)
        return build_mllm(dataclasses.replace(mllm_config, region_features=kind))

    return build_kind


def noise(seed: int = 0) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(
        torch.randint(0, 256, (48, 96, 3), generator=generator, dtype=torch.uint8).numpy()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_each_takes_one_step_and_comes_back_with_the_same_logits(
    build, tiny_scenes, tmp_path, kind
):
    model, processor = build(kind)
    config = ConversationConfig(questions_per_image=2, ground=0, caption=0)  # `refer` alone
    batch = ConversationCollator(processor, config)(list(enumerate(tiny_scenes[:2])))

    loaded = one_step_and_back(model, processor, batch.inputs, model.region_projector, tmp_path)

    assert loaded.config.region_features == kind


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_region_token_sees_of_the_picture(build, kind):
    model, processor = build(kind)
    one, other = (
        model.encode_vision(vision_of(processor, noise(seed), [BOX]))[1] for seed in (0, 1)
    )
    moved = model.encode_vision(vision_of(processor, noise(0), [[0.3, 0.25, 0.75, 0.5]]))[1]

    assert torch.equal(one, other) == (kind == "coordinates")
    assert not torch.allclose(one, moved)


@torch.no_grad()
def test_roi_of_tokens_that_tell_their_place_is_the_centre_of_the_box(build):
    model, _ = build("roi")
    image = model.vision.encode_image(torch.randn(2, 3, 64, 64))
    cells = token_cells(image.grid_hw, torch.device("cpu"))
    image.tokens[1, :, :2] = (cells[:, :2] + cells[:, 2:]) / 2
    boxes = torch.tensor([[0.25, 0.375, 0.5, 0.875]])

    (actual,) = read_regions("roi", model.vision, image, inputs_of(boxes, None))

    torch.testing.assert_close(actual[0, :2], torch.tensor([0.375, 0.625]))


def test_an_unknown_kind_is_refused(build):
    with pytest.raises(ValueError, match=r"region_features must be one of .* got 'pixels'"):
        build("pixels")


SIZES = pytest.mark.parametrize("size", [(64, 64), (300, 40), (41, 333)], ids=str)


@SIZES
@pytest.mark.parametrize("shape", ["ellipse", "rectangle"])
def test_a_painted_shape_is_found_under_its_mask(size, shape):
    width, height = size
    transform = CanvasTransform(width, height, 64)
    drawn = Image.new("1", size)
    getattr(ImageDraw.Draw(drawn), shape)(
        (width // 5, height // 3, width // 2, height - height // 8), fill=1
    )

    boxes, (mask,), (view,) = regions_on_canvas([np.array(drawn)], image_views(size, 64, 4))

    canvas = transform.apply(drawn.convert("RGB"), (0, 0, 0))
    white = torch.from_numpy(np.array(canvas)[..., 0] > 127)
    near = F.max_pool2d(white[None].float(), 3, 1, 1)[0] > 0
    assert white.sum() > 20
    assert (mask > 0)[white].all() and near[mask > 0].all()
    assert view == 0  # whole, whatever tiles there are
    edges = mask_boxes(white[None])
    torch.testing.assert_close(boxes, edges, atol=1 / 64, rtol=0)


@SIZES
def test_a_point_is_found_where_it_was_painted(size):
    width, height = size
    transform = CanvasTransform(width, height, 64)
    column, row = width - 2, height // 3
    picture = Image.new("L", size)
    picture.putpixel((column, row), 255)

    at = [(column + 0.5) / width, (row + 0.5) / height]
    boxes, (mask,), _ = regions_on_canvas([at], image_views(size, 64, 4))

    canvas = np.array(transform.apply(picture.convert("RGB"), (0, 0, 0)))[..., 0]
    assert mask.flatten()[canvas.argmax()] == 1 and mask.sum() <= 4
    expected = Boxes.pixels([[column, row, column + 1, row + 1]], width, height)
    torch.testing.assert_close(boxes, transform.to_canvas(expected).xyxy.float())


@pytest.mark.parametrize("width", [1, 3, 49, 147, 6000])
def test_a_pixels_number_over_their_number_is_that_pixel(width):
    for column in range(0, width, max(1, width // 50)):
        assert as_mask([column / width, 1.0], (width, 2))[1].nonzero().item() == column


@pytest.mark.parametrize(
    ("region", "message"),
    [
        (torch.ones(96, 48), r"expected a mask\[48, 96\] .* got \[96, 48\]"),
        (torch.zeros(48, 96), "the mask is empty"),
        ([0.5, 1.5], r"expected a point x, y in 0..1 of the image, got \[0.5, 1.5\]"),
        ([float("nan"), 0.5], "expected a point x, y in 0..1"),
        ([0.1, 0.2, 0.3], r"a region is a box .* got shape \[3\]"),
    ],
)
def test_wrong_regions_name_the_sample(build, region, message):
    _, processor = build("roi")
    text = "<image><region>"
    with pytest.raises(ValueError, match=f"sample 1: {message}"):
        processor([noise(), noise()], [text, text], [[BOX], [region]])


@pytest.fixture
def free_form(mllm_config, tmp_path):
    """An MLLM whose Prompter knows masks, and its processor."""
    cloc = save_tiny_cloc(tmp_path, PrompterConfig(free_form=True))
    return build_mllm(dataclasses.replace(mllm_config, cloc=str(cloc)))


def left_half() -> torch.Tensor:
    return (torch.arange(96) < 48).expand(48, 96)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["prompter", "roi"])
def test_boxes_points_and_masks_of_one_image_keep_their_places(build, free_form, kind):
    model, processor = free_form if kind == "prompter" else build("roi")
    regions = [BOX, left_half(), [0.9, 0.1]]

    together = model.encode_vision(vision_of(processor, noise(), regions))[1]

    alone = [model.encode_vision(vision_of(processor, noise(), [r]))[1] for r in regions]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-4)
    assert torch.cdist(together, together).fill_diagonal_(1).min() > 1e-3
    turned = model.encode_vision(vision_of(processor, noise(), regions[::-1]))[1]
    torch.testing.assert_close(turned, together.flip(0), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_prompter_reads_a_mask_as_stage_1_does(free_form):
    model, processor = free_form
    inputs = vision_of(processor, noise(), [left_half()])
    image = model.vision.encode_image(inputs.pixel_values)

    (actual,) = read_regions("prompter", model.vision, image, inputs)

    canvas = CanvasTransform(96, 48, 64).mask_to_canvas(left_half())
    expected = model.vision.embed_masks(image, canvas[None], torch.tensor([0]))
    torch.testing.assert_close(actual, expected)


@torch.no_grad()
def test_roi_of_a_mask_is_the_mean_of_the_tokens_it_covers(build):
    model, _ = build("roi")
    image = model.vision.encode_image(torch.randn(2, 3, 64, 64))
    mask = torch.zeros(1, 64, 64)
    mask[0, :16, :16], mask[0, 16:24, :16] = 1, 1  # cell 0 whole and cell 4 by half

    (actual,) = read_regions("roi", model.vision, image, inputs_of(torch.zeros(1, 4), mask))

    expected = (image.tokens[1, 0] + image.tokens[1, 4] / 2) / 1.5
    torch.testing.assert_close(actual, expected[None])


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "why"),
    [("prompter", "learnt no points and masks"), ("coordinates", "hold a box alone")],
)
def test_who_knows_boxes_alone_refuses_masks(build, kind, why):
    model, processor = build(kind)
    with pytest.raises(ValueError, match=f"this model takes boxes, not points and masks: .*{why}"):
        model.encode_vision(vision_of(processor, noise(), [BOX, left_half()]))


@torch.no_grad()
def test_beams_and_rows_of_several_images_take_their_masks_along(build):
    model, processor = build("roi")
    model.eval()
    texts = ["<image><region>?", "<image> or <image><region><region>?"]
    images = [noise(0), [noise(1), noise(0)]]
    inputs = processor(images, texts, [[left_half()], [[[0.1, 0.8]], [BOX]]])
    assert inputs["region_masks"].flatten(1).any(1).tolist() == [True, True, False]
    logits = model(**inputs).logits
    alone = model(**processor(images[1:], texts[1:], [[[[0.1, 0.8]], [BOX]]])).logits[0]
    torch.testing.assert_close(logits[1, -len(alone) :], alone, atol=1e-5, rtol=1e-4)

    repeated, kwargs = model._expand_inputs_for_generation(expand_size=2, **inputs)

    actual = model(input_ids=repeated, **kwargs).logits
    torch.testing.assert_close(actual, logits.repeat_interleave(2, 0), atol=1e-5, rtol=1e-4)


def inputs_of(boxes, masks):
    """Regions on the second of two images."""
    whole, index = torch.tensor([[0.0, 0.0, 1.0, 1.0]] * 2), torch.arange(2)
    last = torch.ones(len(boxes), dtype=torch.long)
    return VisionInputs(torch.empty(2, 3, 64, 64), whole, index, boxes, last, masks)


def vision_of(processor, picture, regions):
    return VisionInputs(**processor.vision_inputs([picture], [regions]))
