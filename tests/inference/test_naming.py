"""Names of regions, weighed by CLOC's list of phrases."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from cloc_mllm.config import MllmConfig
from cloc_mllm.inference.grounding_predictor import GroundingPredictor, Question
from cloc_mllm.inference.naming import NamingLogitsProcessor, PhraseTree
from cloc_mllm.mllm import ClocMllmProcessor, build_mllm
from cloc_mllm.models.phrases import Phrases

PICTURE = Image.new("RGB", (96, 48), "teal")
BOX, OTHER = (0.1, 0.2, 0.6, 0.9), (0.5, 0.0, 1.0, 0.5)
TEXTS = ["a crab", "a clock", "two clocks"]


@pytest.fixture
def naming(mllm_config: MllmConfig) -> Iterator[GroundingPredictor]:
    """A language model without a will of its own, whose encoder sees a clock everywhere."""
    torch.manual_seed(0)
    model, processor = build_mllm(mllm_config)
    embeddings = torch.zeros(3, model.vision.embed_dim)
    plain = GroundingPredictor(model, processor)
    with torch.inference_mode():
        image = plain.encode(PICTURE)
        boxes = torch.tensor([BOX])
        z = model.vision.embed_boxes(image.features, boxes, torch.zeros(1, dtype=torch.long))
    embeddings[0], embeddings[1], embeddings[2] = -z[0], z[0], 0.5 * z[0] + z[0].roll(1)
    processor.phrases = Phrases(TEXTS, F.normalize(embeddings, dim=-1), 20.0)
    head = model.get_output_embeddings()
    hook = head.register_forward_hook(lambda module, inputs, logits: torch.zeros_like(logits))
    yield GroundingPredictor(model, processor)
    hook.remove()


def test_shares_add_up_along_the_tree(naming: GroundingPredictor) -> None:
    phrases = naming.processor.phrases
    assert phrases is not None
    tree = PhraseTree(phrases, naming.processor.tokenizer)
    regions = F.normalize(torch.randn(4, phrases.embeddings.shape[1]), dim=-1)
    shares = tree.log_shares(regions).exp()
    assert (shares[:, 0] == 1).all()
    for node, following in enumerate(tree.children):
        if following and node:
            torch.testing.assert_close(shares[:, [*following.values()]].sum(1), shares[:, node])
    ids = naming.processor.tokenize(TEXTS[2])
    likely = phrases.log_odds(regions @ phrases.embeddings.T).softmax(-1)
    node = tree.node_of(ids)
    assert node is not None and tree.node_of([*ids, ids[0]]) is None
    torch.testing.assert_close(shares[:, node].float(), likely[:, 2])


def test_cloc_decides_where_the_language_model_does_not(naming: GroundingPredictor) -> None:
    result = naming.refer(PICTURE, [BOX, OTHER])
    assert result.labels[0].strip().lower() == "a clock"
    # one question alone, and of an image that is encoded already, reads the same
    assert naming.refer(naming.encode(PICTURE), [BOX]).labels[0] == result.labels[0]
    (plain,) = naming.answer(naming.refer_questions(PICTURE, [BOX], names=False))
    assert plain.text != result.labels[0]
    asked = Question(PICTURE, "What is it?", None)
    mixed = naming.answer([asked, *naming.refer_questions(PICTURE, [BOX])])
    assert mixed[1].text == result.labels[0] and mixed[0].text == plain.text


def test_a_model_in_half_precision_names_alike(naming: GroundingPredictor, tmp_path: Path) -> None:
    naming.model.save_pretrained(tmp_path)
    naming.processor.save_pretrained(tmp_path)
    half = GroundingPredictor.from_pretrained(tmp_path, device="cpu", dtype="bfloat16")
    reading = half.read(half.refer_questions(PICTURE, [BOX]))
    z, expected = reading.named[0], naming.read(naming.refer_questions(PICTURE, [BOX])).named[0]
    assert z.dtype == torch.float32
    torch.testing.assert_close(z, expected, atol=0.05, rtol=0)


def test_a_word_beside_the_list_can_be_said(naming: GroundingPredictor) -> None:
    assert naming.processor.phrases is not None
    tree = PhraseTree(naming.processor.phrases, naming.processor.tokenizer)
    region = naming.processor.phrases.embeddings[1]
    weigh = NamingLogitsProcessor(tree, {1: region}, 2)
    a, word = naming.processor.tokenize("a")[0], naming.processor.tokenize("red")[0]
    scores = torch.zeros(2, len(naming.processor.tokenizer))
    start = torch.tensor([[5, 5], [5, 5]])
    first = weigh(start, scores)
    assert torch.equal(first[0], scores[0])  # it names no region
    assert 0 >= first[1, a] > first[1, word] == pytest.approx(-1.386, abs=1e-3)
    behind = weigh(torch.tensor([[5, 5, word], [5, 5, word]]), scores)
    assert torch.equal(behind, scores)


def test_the_list_goes_where_the_model_goes(naming: GroundingPredictor, tmp_path: Path) -> None:
    naming.processor.save_pretrained(tmp_path)
    loaded = ClocMllmProcessor.from_pretrained(tmp_path)
    assert loaded.phrases is not None and loaded.phrases.texts == TEXTS
    assert loaded.phrases.scale == 20.0
    (tmp_path / "phrases.safetensors").unlink()
    assert ClocMllmProcessor.from_pretrained(tmp_path).phrases is None
