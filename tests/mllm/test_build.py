import json
import math

import pytest
import torch
from PIL import Image

from cloc_mllm.config import LoraConfig
from cloc_mllm.mllm import ClocMllmForConditionalGeneration, build_mllm, merge_and_save
from cloc_mllm.mllm.build import attention_for_training
from cloc_mllm.models.build import load_cloc


def inputs_for(processor):
    return processor(
        Image.new("RGB", (40, 20), "teal"), "<image>in <region>?", [[[0.1, 0.1, 0.5, 0.5]]]
    )


@torch.no_grad()
def disturb(model):
    """Give every trainable parameter another value, as training would."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def test_the_vision_encoder_is_stage_1s(mllm_config):
    model, _ = build_mllm(mllm_config)

    expected = load_cloc(mllm_config.cloc)[0].vision.state_dict()

    actual = model.vision.state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_the_language_model_keeps_its_weights_and_answers(mllm_config):
    from transformers import AutoModelForCausalLM

    original = AutoModelForCausalLM.from_pretrained(
        mllm_config.language_model, attn_implementation=attention_for_training()
    )
    model, processor = build_mllm(mllm_config)
    ids = torch.tensor([processor.tokenize("Where is the crab?")])

    with torch.no_grad():
        actual = model(ids).logits[..., : original.config.vocab_size]
        assert torch.equal(actual, original(ids).logits)


def test_location_tokens_start_as_a_smooth_curve_at_the_scale_of_words(mllm_config):
    model, processor = build_mllm(mllm_config)
    table = model.get_input_embeddings().weight.detach()
    start = model.config.location_token_start
    rows = table[start : start + 20]

    similarity = torch.corrcoef(rows)

    assert len(table) == len(processor.tokenizer)
    assert rows.std() == pytest.approx(float(table[:start].std()), rel=0.2)
    assert similarity.diagonal(1).mean() > similarity.diagonal(5).mean()


def test_location_tokens_that_the_language_model_knows_keep_their_embeddings(
    mllm_config, mllm_dir, tmp_path
):
    from transformers import AutoTokenizer

    first, processor = build_mllm(mllm_config)
    disturb(first)
    first.language_model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(mllm_dir).save_pretrained(tmp_path)
    mllm_config.language_model = str(tmp_path)

    second, again = build_mllm(mllm_config)

    assert torch.equal(second.get_input_embeddings().weight, first.get_input_embeddings().weight)
    assert len(again.tokenizer) == len(processor.tokenizer)
    assert again.render([{"role": "user", "content": "a"}]) == "a\n"  # the template still works


def test_what_is_trainable_whole_model(mllm_config):
    model, _ = build_mllm(mllm_config)

    frozen = {name.split(".")[0] for name, p in model.named_parameters() if not p.requires_grad}

    assert frozen == {"vision"}
    mllm_config.freeze_vision_encoder = False
    assert all(p.requires_grad for p in build_mllm(mllm_config)[0].parameters())


def test_what_is_trainable_with_lora(mllm_config):
    mllm_config.lora = LoraConfig(rank=2)
    model, _ = build_mllm(mllm_config)

    trainable = {name for name, p in model.named_parameters() if p.requires_grad}

    kinds = {
        n for n in ("lora_", "trainable_tokens", "projector.") if any(n in t for t in trainable)
    }
    assert kinds == {"lora_", "trainable_tokens", "projector."}
    assert all(any(kind in name for kind in kinds) for name in trainable)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_merged_lora_gives_the_same_answers_and_leaves_the_model_alone(
    mllm_config, tmp_path, tied, llm_dir
):
    if not tied:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        untied = AutoModelForCausalLM.from_pretrained(llm_dir, tie_word_embeddings=False)
        untied.lm_head.weight = torch.nn.Parameter(torch.randn_like(untied.lm_head.weight))
        untied.save_pretrained(tmp_path / "llm")
        AutoTokenizer.from_pretrained(llm_dir).save_pretrained(tmp_path / "llm")
        mllm_config.language_model = str(tmp_path / "llm")
    mllm_config.lora = LoraConfig(rank=2)
    model, processor = build_mllm(mllm_config)
    disturb(model)
    model.eval()
    inputs = inputs_for(processor)
    with torch.no_grad():
        expected = model(**inputs).logits
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    merge_and_save(model, processor, tmp_path / "merged")

    loaded = ClocMllmForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        # W + BA in float32 against (W)x + B(Ax): rounding only
        torch.testing.assert_close(loaded(**inputs).logits, expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(model(**inputs).logits, expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not hasattr(loaded.language_model, "peft_config")
    assert (loaded.config.tie_word_embeddings, loaded.config.text_config.tie_word_embeddings) == (
        tied,
        tied,
    )


def test_the_saved_directory_names_no_path_of_this_machine(mllm_config, tmp_path):
    merge_and_save(*build_mllm(mllm_config), tmp_path / "merged", dtype=torch.float16)

    for path in (tmp_path / "merged").glob("*.json*"):
        assert mllm_config.language_model not in path.read_text()
        assert mllm_config.cloc not in path.read_text()
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "float16"


def test_generation_is_greedy_and_ends_where_the_tokenizer_says(mllm_config):
    model, processor = build_mllm(mllm_config)

    assert model.generation_config.do_sample is False
    assert processor.tokenizer.eos_token_id in model.generation_config.eos_token_id


def test_integers_add_two_tokens_only(mllm_config):
    mllm_config.box_format = "integers"
    model, processor = build_mllm(mllm_config)

    assert model.config.location_token_start is None
    assert processor.tokenizer.convert_ids_to_tokens(len(processor.tokenizer) - 1) == "<region>"
    assert processor.coordinates.encode((0, 0, 0.5, 1)) == "[0, 0, 500, 999]"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"load_in_4bit": True}, "lora.rank"),
        ({"box_format": "integers", "coordinate_smoothing": 1.0}, "set it to 0"),
        ({"box_format": "polygons"}, "box format must be one of"),
        ({"vision_features": "pixels"}, "vision_features must be"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(mllm_config, changes, message):
    for name, value in changes.items():
        setattr(mllm_config, name, value)
    with pytest.raises(ValueError, match=message):
        build_mllm(mllm_config)


def test_a_missing_stage_1_directory_says_what_was_expected(mllm_config, tmp_path):
    mllm_config.cloc = str(tmp_path)
    with pytest.raises(FileNotFoundError, match="no CLOC model directory"):
        build_mllm(mllm_config)


@pytest.mark.slow
def test_a_4_bit_language_model_learns_and_merges_into_the_full_one(mllm_config, tmp_path):
    pytest.importorskip("bitsandbytes")
    mllm_config.lora, mllm_config.load_in_4bit = LoraConfig(rank=2), True
    model, processor = build_mllm(mllm_config)
    inputs = inputs_for(processor)
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    with torch.no_grad():
        before = model.eval()(**inputs, labels=labels).loss
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(10):
        model.train()(**inputs, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    merge_and_save(model, processor, tmp_path / "merged")
    loaded = ClocMllmForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()

    with torch.no_grad():
        after = model.eval()(**inputs, labels=labels).loss
        merged = loaded(**inputs, labels=labels).loss
    assert math.isfinite(before) and after < 0.5 * before
    # the merged model has the unquantised weights, so it differs by the quantisation error only
    assert merged < 0.7 * before
    assert not any("absmax" in name for name in loaded.state_dict())
