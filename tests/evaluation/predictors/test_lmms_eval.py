"""Our model behind lmms-eval's interface: the part of lmms-eval 0.7.2 that it meets, in small.

A run in the real harness is in docs/how-to/other_models.md.
"""

import importlib.util
import sys
import types
from collections import namedtuple

import pytest
import torch
from datasets import load_dataset
from PIL import Image

from cloc_mllm.data.records import Region
from cloc_mllm.data.scenes import generate_scenes
from cloc_mllm.geometry import Boxes
from cloc_mllm.inference.results import Answer
from tests.evaluation.predictors.lmms_eval_rows import main, write_rec_task
from tests.tiny_mllm import cloc_dir, llm_dir, mllm_dir

__all__ = ["cloc_dir", "llm_dir", "mllm_dir"]

REC = (
    "Bounding box coordinates are specified in the format (top-left x, top-left y, bottom-right x, "
    "bottom-right y). All values are floating point numbers bounded between 0 and 1. Please "
    "provide the bounding box coordinate of the region this sentence describes: "
)
Request = namedtuple("Request", "args")


class Lmms:
    """`lmms_eval.api.model.lmms`, as far as a simple model needs it."""

    def __init__(self):
        self.task_dict = {}
        self.cache_hook = types.SimpleNamespace(add_partial=lambda *args: self.cached.append(args))
        self.cached = []


@pytest.fixture
def plugin(monkeypatch):
    """Our module, imported beside a small harness."""
    manifest = namedtuple("ModelManifest", "model_id simple_class_path")
    contents = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.model": {"lmms": Lmms},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": manifest},
    }
    for name, members in contents.items():
        module = types.ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)
    name = "cloc_mllm.evaluation.predictors.lmms_eval"
    yield importlib.import_module(name)
    del sys.modules[name]


@pytest.fixture
def model(plugin, mllm_dir):
    model = plugin.ClocMllm(pretrained=str(mllm_dir), device="cpu", batch_size="3")
    picture = Image.new("RGB", (96, 48), "teal")
    model.task_dict = {"rec": {"val": [{"image": picture}, {"image": picture.copy()}]}}
    return model


def request(context, doc=0, options=None, visual=lambda doc: [doc["image"]]):
    return Request((context, options or {}, visual, doc, "rec", "val"))


def test_answers_are_the_predictors_in_the_order_of_the_requests(model):
    requests = [request(REC + "a crab"), request("What?"), request(REC + "a boat", 1)] * 2

    actual = model.generate_until(requests)

    picture = model.task_dict["rec"]["val"][0]["image"]
    asked = ["Where is a crab?", "What?", "Where is a boat?"] * 2
    assert actual == [model.predictor.ask(picture, question).text for question in asked]
    assert [entry[2] for entry in model.cached] == actual


def test_equal_images_of_a_batch_are_read_once(model, monkeypatch):
    seen = []
    vision = model.predictor.model.vision
    encode = vision.encode_image
    monkeypatch.setattr(vision, "encode_image", lambda x: (seen.append(len(x)), encode(x))[1])

    model.generate_until([request(REC + "a crab"), request(REC + "a boat", doc=1)])

    assert seen == [1]


def test_length_and_stop_strings_are_obeyed(model, plugin, monkeypatch):
    limits = []
    answer = Answer("a red apple", Boxes.normalized([]), torch.zeros(0), [], 1.0, "not_a_box")
    monkeypatch.setattr(
        model.predictor,
        "answer",
        lambda asked, max_new_tokens: (limits.append(max_new_tokens), [answer] * len(asked))[1],
    )

    assert model.generate_until([request("What?", options={"max_new_tokens": 7})]) == [answer.text]
    assert model.generate_until([request("What?", options={"until": ["app", "zebra"]})]) == [
        "a red "
    ]
    assert model.generate_until([request("What?", options={"until": "red"})]) == ["a "]
    assert limits == [7, 48, 48]


def test_documents_of_any_number_of_images_are_answered_in_one_batch(model, plugin):
    visuals = {
        "none": lambda doc: None,
        "empty": lambda doc: [],
        "two": lambda doc: [doc["image"], Image.new("RGB", (40, 80), "red")],
        "one": lambda doc: [doc["image"]],
    }
    contexts = ["Say hello.", "Say <image> hello.", "Compare <image> with <image>.", "What?"]
    options = [{"max_new_tokens": limit} for limit in (3, 5, 7, 9)]
    requests = [
        request(context, 0, option, visual)
        for context, option, visual in zip(contexts, options, visuals.values(), strict=True)
    ]
    together = model.generate_until(requests)  # 3 at a time
    model.batch_size = 1
    assert together == model.generate_until(requests)
    picture = model.task_dict["rec"]["val"][0]["image"]
    (expected,) = model.predictor.answer([plugin.Question(picture, "What?")], max_new_tokens=9)
    assert together[3] == plugin.answer_text(expected)


def test_each_request_has_its_own_limit(model):
    requests = [request("What is there?", options={"max_new_tokens": n}) for n in (2, 40)]
    alone = [model.generate_until([one])[0] for one in requests]
    assert model.generate_until(requests) == alone
    assert alone[0] != alone[1] and alone[1].startswith(alone[0])


def test_images_stand_at_their_marks_or_before_the_words(plugin):
    image, says = {"type": "image"}, lambda text: {"type": "text", "text": text}
    assert plugin.content_of("Hi", 0) == [says("Hi")]
    assert plugin.content_of("a <image> b", 0) == [says("a b")]
    assert plugin.content_of("a <image> b", 1) == [says("a "), image, says(" b")]
    assert plugin.content_of("a <image> b", 2) == [image, image, says("a b")]
    assert plugin.content_of("a", 2) == [image, image, says("a")]


def test_a_box_is_written_as_the_task_asks(plugin):
    box = Boxes.normalized(torch.tensor([[0.0, 0.25, 0.5, 1.0]]))
    answer = Answer("<loc_0>", box, torch.ones(1), [(0, 7)], 1.0, None)
    assert plugin.answer_text(answer) == "[0.0000, 0.2500, 0.5000, 1.0000]"


def test_wrong_arguments_and_documents_are_refused(plugin, model):
    with pytest.raises(ValueError, match=r"unknown model_args \['max_pixels'\]; expected pre"):
        plugin.ClocMllm(max_pixels=3)
    with pytest.raises(ValueError, match=r"document 1 of task rec \(val\) has a str among"):
        model.generate_until([request("What?", 1, visual=lambda doc: ["a.mp4"])])
    with pytest.raises(NotImplementedError, match="generate_until tasks only"):
        model.loglikelihood([])


def test_the_entry_point_names_the_class(plugin, project_root):
    name, path = plugin.manifest()
    module, _, class_name = path.rpartition(".")
    assert name == "cloc_mllm" and getattr(sys.modules[module], class_name) is plugin.ClocMllm
    assert f'cloc_mllm = "{module}:manifest"' in (project_root / "pyproject.toml").read_text()


def test_rows_hold_what_the_task_reads(tmp_path):
    first, second = generate_scenes(2, split="test", long_side=64)
    second.regions = [Region((0.1, 0.1, 0.4, 0.5), "crabs"), Region((0.5, 0.5, 0.9, 0.9), "crabs")]
    second.source = "photos"

    written, left_out = write_rec_task([first, second], tmp_path, tmp_path / "template")

    rows = load_dataset(str(tmp_path / "rows"), split="test", cache_dir=str(tmp_path / "cache"))
    assert (len(rows), left_out) == (written, 1)
    things = {
        text: (box[0] * first.width, box[1] * first.height)
        for region in first.regions
        for text, box in ((text.lower(), region.box) for text in region.expressions)
    }
    for row in rows:
        assert row["image"].size == (first.width, first.height) and row["image"].format == "PNG"
        assert row["bbox"][:2] == pytest.approx(things[row["answer"][0]])
    assert f"include: {tmp_path / 'template'}" in (tmp_path / "cloc_rec_local.yaml").read_text()


def test_without_the_harness_the_command_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="lmms_eval is not installed here"):
        main(["--out", str(tmp_path)])
