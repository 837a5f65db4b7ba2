"""Projectors of image tokens: how many tokens, of what, and that each learns and comes back."""

import dataclasses

import pytest
import torch
from PIL import Image

from cloc_mllm.config import ConversationConfig
from cloc_mllm.mllm import (
    ClocMllmForConditionalGeneration,
    ClocMllmProcessor,
    build_mllm,
)
from cloc_mllm.mllm.collate import ConversationCollator
from cloc_mllm.mllm.projector import (
    Projector,
    Resampler,
    merge_neighbours,
    num_image_tokens,
)
from cloc_mllm.models.position import token_cells
from tests.tiny_mllm import one_step_and_back

KINDS = {"linear": 16, "mlp": 16, "pixel_shuffle": 4, "resampler": 3}  # tokens of a 4 x 4 grid
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
FEATURES = pytest.mark.parametrize("vision_features", ["encoder", "encoder+prompter"])


@pytest.fixture
def build(mllm_config):
    def build_kind(kind: str, vision_features: str = "encoder+prompter"):
        torch.manual_seed(0)
        return build_mllm(
            dataclasses.replace(
                mllm_config, projector=kind, num_queries=3, vision_features=vision_features
            )
        )

    return build_kind


@EVERY_KIND
@FEATURES
def test_each_takes_one_step_and_comes_back_with_the_same_logits(
    build, tiny_scenes, tmp_path, kind, vision_features
):
    model, processor = build(kind, vision_features)
    items = list(enumerate(tiny_scenes[:2]))
    batch = ConversationCollator(processor, ConversationConfig(questions_per_image=2))(items)

    loaded = one_step_and_back(model, processor, batch.inputs, model.projector, tmp_path)

    again = ClocMllmProcessor.from_pretrained(tmp_path)
    assert again.fingerprint == loaded.config.fingerprint == processor.fingerprint


@EVERY_KIND
def test_the_processor_writes_as_many_tokens_as_the_projector_gives(build, kind):
    model, processor = build(kind)
    inputs = processor(Image.new("RGB", (40, 20)), "<image>")

    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == KINDS[kind]
    assert processor.fingerprint["num_image_tokens"] == model.num_image_tokens == KINDS[kind]


def test_old_checkpoints_are_mlp(build):
    model, _ = build("mlp")
    saved = model.config.to_dict()
    del saved["projector"], saved["num_queries"]

    loaded = ClocMllmForConditionalGeneration(type(model.config)(**saved))

    loaded.load_state_dict(model.state_dict())
    assert isinstance(loaded.projector, Projector)


def test_merged_neighbours_equal_a_loop_over_the_grid():
    height, width = 4, 6
    tokens = torch.randn(2, height * width, 3)
    expected = [
        torch.stack([tokens[:, (y + dy) * width + x + dx] for dy in (0, 1) for dx in (0, 1)], 1)
        for y in range(0, height, 2)
        for x in range(0, width, 2)
    ]

    actual = merge_neighbours(tokens, (height, width))

    assert torch.equal(actual, torch.stack(expected, 1))


def test_a_merged_token_is_told_the_merged_cell_and_each_box_of_its_four(build):
    projector = build("pixel_shuffle")[0].projector
    grid_hw = projector.grid_hw
    cells = token_cells(grid_hw, torch.device("cpu"))[None]
    owners = torch.rand(1, 16, 4)
    seen = []
    projector.merged.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs))

    projector([torch.rand(1, 16, 32), torch.rand(1, 16, 24)], [cells, owners])

    boxes = seen[1]
    torch.testing.assert_close(boxes[0], token_cells((2, 2), torch.device("cpu"))[None])
    expected = torch.stack([owners[0, [0, 1, 4, 5]], owners[0, [2, 3, 6, 7]]])
    assert torch.equal(torch.stack(boxes[1:], 2)[0, :2], expected)


def test_a_resampler_reads_a_set_of_tokens_with_their_places():
    torch.manual_seed(0)
    resampler = Resampler([8], 12, 5, 1.0, 1, 0)
    tokens, cells = torch.randn(2, 16, 8), token_cells((4, 4), torch.device("cpu")).expand(2, -1, 4)
    out = resampler([tokens], [cells])
    order = torch.randperm(16)

    assert out.shape == (2, 5, 12)
    torch.testing.assert_close(resampler([tokens[:, order]], [cells[:, order]]), out)
    assert not torch.allclose(resampler([tokens[:, order]], [cells]), out)


def test_a_resampler_equals_attention_query_by_query():
    torch.manual_seed(0)
    resampler = Resampler([8], 12, 2, 1.0, 1, 128).double()
    tokens = torch.randn(1, 9, 8, dtype=torch.double, requires_grad=True)
    cells = token_cells((3, 3), torch.device("cpu"))[None].double()
    seen = {}
    for name in ("query", "key", "value"):
        getattr(resampler, name).register_forward_hook(
            lambda _, __, output, name=name: seen.__setitem__(name, output)
        )
    actual = resampler([tokens], [cells])

    rows = []
    for query, start in zip(seen["query"], resampler.queries, strict=True):
        heads = []
        for head in range(2):  # of 64 each
            part = slice(64 * head, 64 * head + 64)
            weights = (seen["key"][0, :, part] @ query[part] / 8).softmax(0)
            heads.append(weights @ seen["value"][0, :, part])
        hidden = resampler.hidden(resampler.norm(start + torch.cat(heads)))
        rows.append(resampler.output(torch.nn.functional.gelu(hidden)))
    expected = torch.stack(rows)[None]

    torch.testing.assert_close(actual, expected)
    gradients = [
        torch.autograd.grad(out.square().sum(), tokens, retain_graph=True)[0]
        for out in (actual, expected)
    ]
    torch.testing.assert_close(*gradients)


@EVERY_KIND
def test_outputs_have_the_asked_scale(build, kind):
    projector = build(kind)[0].projector
    torch.manual_seed(0)
    features = [torch.randn(50, 16, 32), torch.randn(50, 16, 24)]

    projector.reset(0.5)

    out = projector(features, [torch.rand(50, 16, 4), torch.rand(50, 16, 4)])
    assert float(out.detach().square().mean().sqrt()) == pytest.approx(0.5, rel=0.3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"projector": "qformer"}, "projector must be one of 'linear', .* got 'qformer'"),
        ({"projector": "resampler", "num_queries": 0}, "num_queries must be at least 1, got 0"),
    ],
)
def test_unknown_settings_are_refused(mllm_config, changes, message):
    with pytest.raises(ValueError, match=message):
        build_mllm(dataclasses.replace(mllm_config, **changes))


def test_an_odd_grid_cannot_be_merged():
    with pytest.raises(ValueError, match=r"has 7 x 7; set model.projector to mlp or resampler"):
        num_image_tokens("pixel_shuffle", (7, 7), 64)
