"""The list of phrases that regions are named with."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from cloc_mllm.data.records import Record, Region
from cloc_mllm.data.tokenizer import load_text_tokenizer
from cloc_mllm.geometry import Boxes
from cloc_mllm.inference.cloc_predictor import ClocPredictor
from cloc_mllm.models.phrases import Phrases, frequent_phrases
from tests.models.tiny import tiny_cloc

BOX = (0.1, 0.1, 0.6, 0.6)


def record(*texts: str) -> Record:
    first, *others = texts
    return Record("r", b"", 10, 10, [], [Region(BOX, first, expressions=others)], "test")


def test_frequent_phrases_are_clean_and_each_once() -> None:
    records = [
        *[record("A dog .") for _ in range(3)],
        record("the dog", "dog", "a cat"),
        record("cat", "a cat", "him", "red", "the red", "", "a " + "very " * 10 + "cat"),
    ]
    actual = frequent_phrases(records, 10)
    assert list(actual.items()) == [("a dog", 5), ("a cat", 3)]
    assert list(frequent_phrases(records, 1)) == ["a dog"]


def test_a_list_comes_back_from_its_file(tmp_path: Path) -> None:
    assert Phrases.load(tmp_path) is None
    expected = Phrases(["a dog", "ein Käfig"], F.normalize(torch.randn(2, 24), dim=-1), 8.5)
    expected.save(tmp_path)
    actual = Phrases.load(tmp_path)
    assert actual is not None and actual.texts == expected.texts
    # half precision keeps 11 bits of each value
    torch.testing.assert_close(actual.embeddings, expected.embeddings, atol=1e-3, rtol=0)
    assert actual.counts is None and actual.scale == 8.5
    counts = torch.tensor([7, 2])
    dataclasses.replace(expected, counts=counts, prior=0.75).save(tmp_path)
    counted = Phrases.load(tmp_path)
    assert counted is not None and counted.counts is not None
    assert torch.equal(counted.counts, counts) and counted.prior == 0.75
    nothing = {"embeddings": torch.zeros(3, 2), "scale": torch.tensor(1.0)}
    save_file(nothing, tmp_path / "phrases.safetensors", {"texts": "[]"})
    with pytest.raises(ValueError, match="0 phrases and 3 embeddings; expected one embedding per"):
        Phrases.load(tmp_path)


def test_the_closest_phrases_of_regions() -> None:
    predictor = ClocPredictor(tiny_cloc(), load_text_tokenizer("builtin", 24))
    names = ["a crab", "a clock", "a key"]
    picture, boxes = Image.new("RGB", (90, 60), "teal"), Boxes.normalized([BOX, (0, 0, 1, 1)])
    with pytest.raises(ValueError, match="nothing to choose from; give at least one name"):
        predictor.closest(picture, boxes)
    expected = predictor.embed_regions(picture, boxes) @ predictor.embed_text(names).T
    result = predictor.closest(picture, boxes, names, count=2)
    assert result.query_index.tolist() == [0, 0, 1, 1] and len(result) == 2
    torch.testing.assert_close(result.scores.reshape(2, 2), expected.topk(2).values)
    for region, order in zip(result, expected.argsort(1, descending=True).tolist(), strict=True):
        assert list(region.labels) == [names[i] for i in order[:2]]
    predictor.phrases = Phrases(names, predictor.embed_text(names), 1.0)
    own = predictor.closest(picture, boxes, count=9)
    assert len(own.labels) == 2 * 3 and list(own.labels[:2]) == list(result.labels[:2])


def test_a_usual_phrase_is_a_likelier_name_than_a_rare_one() -> None:
    predictor = ClocPredictor(tiny_cloc(), load_text_tokenizer("builtin", 24))
    names, picture = ["a crab", "a clock", "a key"], Image.new("RGB", (90, 60), "teal")
    counts = torch.tensor([1, 10**9, 40])
    predictor.phrases = Phrases(names, predictor.embed_text(names), 20.0, counts)
    own = predictor.closest(picture, [BOX])
    plain = predictor.closest(picture, [BOX], names)
    assert own.labels[0] == "a clock" and sorted(own.labels) == sorted(plain.labels)
    # what is reported stays the cosine
    expected = dict(zip(plain.labels, plain.scores.tolist(), strict=True))
    assert dict(zip(own.labels, own.scores.tolist(), strict=True)) == pytest.approx(expected)
    # p(text | region) is the softmax of the logits times p(text), up to its sum
    similarity = torch.tensor([[0.3, 0.1, 0.2]])
    likely = predictor.phrases.log_odds(similarity).softmax(-1)
    weighted = (20.0 * similarity).softmax(-1) * counts
    torch.testing.assert_close(likely, weighted / weighted.sum())
    # similarities that learnt the prior are not given it again
    knows = dataclasses.replace(predictor.phrases, prior=1.0)
    torch.testing.assert_close(knows.log_odds(similarity), 20.0 * similarity)
