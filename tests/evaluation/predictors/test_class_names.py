import open_clip
import pytest
import torch
import torch.nn.functional as F

from cloc_mllm.evaluation.predictors.class_names import class_embeddings, templates_of


def test_sets_of_templates():
    texts = {
        name: [template("cat") for template in templates_of(name)]
        for name in ("none", "photo", "small", "clip80")
    }
    assert texts["none"] == ["cat"]
    assert texts["photo"] == ["a photo of a cat."]
    assert {name: len(set(found)) for name, found in texts.items()} == {
        "none": 1,
        "photo": 1,
        "small": 7,
        "clip80": 80,
    }
    assert texts["clip80"] == [template("cat") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    with pytest.raises(ValueError, match=r"unknown templates 'x'; expected one of \['none', "):
        templates_of("x")


@torch.no_grad()
@pytest.mark.parametrize("templates", ["none", "small", "clip80"])
def test_a_class_is_the_mean_direction_of_its_texts(tiny_cloc, character_tokenizer, templates):
    names = [f"{letter}{letter}" for letter in "abcdefghijk"]
    actual = class_embeddings(tiny_cloc, character_tokenizer, names, templates)
    for name, row in zip(names, actual, strict=True):
        total = torch.zeros(16)
        for template in templates_of(templates):
            text = tiny_cloc.encode_text(character_tokenizer([template(name)]))[0]
            total += text / text.norm()
        torch.testing.assert_close(row, F.normalize(total, dim=0))


def test_no_class_is_no_embedding(tiny_cloc, character_tokenizer):
    assert len(class_embeddings(tiny_cloc, character_tokenizer, [], "none")) == 0
