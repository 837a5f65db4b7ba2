"""Other projects' architectures through our suite: tiny checkpoints with random weights."""

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from cloc_mllm.data.parquet import write_records
from cloc_mllm.data.scenes import generate_scenes
from cloc_mllm.evaluation.config import EvalConfig
from cloc_mllm.evaluation.predictors.transformers import HfModel, check_prompt, predict_hf
from cloc_mllm.evaluation.rows.files import read_predictions
from cloc_mllm.evaluation.run import evaluate
from cloc_mllm.evaluation.tasks.rec import Rec
from tests.evaluation.helpers import query_sets, write_lines
from tests.evaluation.predictors.tiny_hf import save_paligemma, save_qwen2_5_vl

CHECKPOINTS = {"qwen2.5-vl": save_qwen2_5_vl, "paligemma": save_paligemma}
PROMPTS = {
    "qwen2.5-vl": "Locate {phrase}, output its bbox coordinates in JSON format.",
    "paligemma": "<image>detect {phrase}",
}
PICTURE = Image.effect_noise((90, 60), 80).convert("RGB")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    made = {}

    def directory(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            CHECKPOINTS[name](made[name])
        return made[name]

    return directory


@pytest.fixture(scope="module")
def load(checkpoint):
    return lambda name: HfModel.from_pretrained(str(checkpoint(name)), torch.device("cpu"))


def always(monkeypatch, model, text):
    """Make the model write `text`, its end and a token after it, whatever it is asked."""
    tokenizer = model.processor.tokenizer
    answer = tokenizer(text, add_special_tokens=False)["input_ids"]
    end = model.model.generation_config.eos_token_id
    new = torch.tensor([[*answer, end, answer[0]]])
    monkeypatch.setattr(
        model.model, "generate", lambda **inputs: torch.cat([inputs["input_ids"], new], 1)
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("qwen2.5-vl", '[{"bbox_2d": [10, 5, 40, 50], "label": "a boat"}]'),
        ("qwen2.5-vl", "<|box_start|>(200,200),(500,750)<|box_end|>"),
        ("paligemma", "<loc0205><loc0205><loc0768><loc0512> a boat"),
    ],
    ids=["json", "special tokens", "location tokens"],
)
def test_the_answer_keeps_its_box_tokens_and_loses_prompt_and_end(load, monkeypatch, name, text):
    model = load(name)
    always(monkeypatch, model, text)

    answer, seen = model.answer(PICTURE, PROMPTS[name])

    # the tiny tokenizers write a space before a word, whatever stands there
    assert answer.replace(" ", "") == text.replace(" ", "")
    # Qwen resizes 90 x 60 to multiples of 28
    assert seen == ({"resized_width": 84, "resized_height": 56} if "qwen" in name else {})


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_answer_is_greedy_and_looks_at_image_and_prompt(load, name):
    model = load(name)
    prompt = PROMPTS[name].replace("{phrase}", "a boat")

    answer = model.answer(PICTURE, prompt)

    assert answer == model.answer(PICTURE, prompt) and answer[0]
    assert answer != model.answer(Image.new("RGB", (90, 60), "teal"), prompt)
    assert answer != model.answer(PICTURE, PROMPTS[name].replace("{phrase}", "the smaller crab"))


def test_one_row_an_expression_with_the_raw_answer(load, monkeypatch):
    model = load("paligemma")
    always(monkeypatch, model, "<loc0205><loc0205><loc0768><loc0512>")
    scenes = list(generate_scenes(2, split="test", long_side=64))
    (asked,) = query_sets(Rec(), scenes)
    done = {asked.queries[0].id}

    rows = list(predict_hf(model, asked, "<image>{phrase}", "m", done))

    assert [row.id for row in rows] == [query.id for query in asked.queries[1:]]
    assert rows[0].prompt == f"<image>{asked.queries[1].text}" and rows[0].model == "m"
    assert {row.raw_text for row in rows} == {"<loc0205><loc0205><loc0768><loc0512>"}
    assert not rows[0].boxes and rows[0].settings == {"decoding": "greedy", "precision": "float32"}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_whole_job_reads_the_answers_in_the_declared_format(checkpoint, tmp_path, name):
    write_records(generate_scenes(2, split="test", long_side=64), tmp_path / "data")
    config = EvalConfig(
        mllm_hf=str(checkpoint(name)),
        prompt=PROMPTS[name],
        format=name,
        data=str(tmp_path / "data"),
        tasks=["rec", "referring"],
        output_dir=str(tmp_path / "out"),
        device="cpu",
        bootstrap_samples=10,
        num_examples=1,
    )

    evaluation = evaluate(config)

    rows = read_predictions(tmp_path / "out" / "predictions.jsonl")
    assert list(evaluation.tasks) == ["rec"]
    failures = evaluation.tasks["rec"].failures
    assert failures.n == len(rows) > 4
    # nothing an untrained model writes is a box, and every answer is counted with its reason
    assert failures.reasons == {"not_a_box": len(rows)}
    settings = json.loads((tmp_path / "out" / "predictions.settings.json").read_text())
    assert settings["prompt"] == PROMPTS[name] and settings["mllm"]["name"] == config.mllm_hf


def test_questions_in_words_need_neither_prompt_nor_format(checkpoint, tmp_path, photos):
    rows = [{"question_id": 1, "image": "a.jpg", "text": "Is there a dog?", "label": "yes"}]
    questions = write_lines(tmp_path / "random.json", rows)
    config = EvalConfig(
        mllm_hf=str(checkpoint("qwen2.5-vl")),
        tasks=[{"pope": {"questions": [str(questions)], "images": str(photos("a.jpg"))}}],
        output_dir=str(tmp_path / "out"),
        device="cpu",
        bootstrap_samples=10,
    )
    assert evaluate(config).tasks["pope"].metrics["accuracy"].n == 1
    (row,) = read_predictions(tmp_path / "out" / "predictions.jsonl")
    assert row.prompt == "Is there a dog?" and row.raw_text


def test_settings_are_refused_before_a_model_is_loaded():
    given = {"mllm_hf": "nowhere", "prompt": "{phrase}", "format": "paligemma", "limit": 1}
    cases = [
        ({"mllm": "runs/mllm"}, "give --mllm .* or --mllm_hf"),
        ({"prompt": "Where is it?"}, "must hold {phrase} once"),
        ({"format": "paligema"}, "unknown format 'paligema'.*paligemma"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            evaluate(EvalConfig(**given | change))
    with pytest.raises(ValueError, match="--prompt must hold"):
        check_prompt("{phrase} or {phrase}")


@pytest.mark.parametrize(
    ("ids", "is_encoder_decoder", "expected"),
    [
        ([2, 0, 7, 8, 2, 1, 1], True, [7, 8]),  # Florence-2: </s><s>answer</s><pad>
        ([2, 0, 2], True, []),
        ([7, 8, 2, 9], False, [7, 8]),
        ([7, 1, 9], False, [7]),
        ([2, 7], False, []),
        ([7, 8], False, [7, 8]),
    ],
)
def test_an_answer_ends_at_the_first_end_and_starts_with_a_chosen_token(
    ids, is_encoder_decoder, expected
):
    generation = SimpleNamespace(
        eos_token_id=[2], pad_token_id=1, bos_token_id=0, decoder_start_token_id=2
    )
    config = SimpleNamespace(is_encoder_decoder=is_encoder_decoder)
    model = HfModel(SimpleNamespace(generation_config=generation, config=config), None)

    assert model._between_ends(ids) == expected
