"""The small language model: its tokenizer loses nothing, its start already matches words."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from cloc_mllm.config import TinyLlmConfig
from cloc_mllm.data.scenes import CONCEPTS
from cloc_mllm.data.wordings import IMAGE_TOKEN, REGION_TOKEN
from cloc_mllm.mllm.coordinates import BoxFormat
from cloc_mllm.mllm.tiny_llm import build_language_model, build_tokenizer

BOX_FORMAT = BoxFormat("location_tokens", 20)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer(BOX_FORMAT)


@pytest.mark.parametrize(
    "text",
    ["the smaller crab", "Zebra №7?!", "naïve café", "番茄 🍅", "a\tb\nc", "<image", "  "],
)
def test_any_text_survives(tokenizer, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids).removeprefix(" ") == text.removeprefix(" ")


def test_a_word_of_a_name_is_one_token(tokenizer) -> None:
    for name in CONCEPTS:
        if "-" not in name:
            assert len(tokenizer.tokenize(name)) == len(name.split()), name


def test_placeholders_and_locations_are_single_tokens(tokenizer) -> None:
    text = f"{IMAGE_TOKEN}{REGION_TOKEN}{''.join(BOX_FORMAT.tokens())}"
    assert tokenizer.tokenize(text) == [IMAGE_TOKEN, REGION_TOKEN, *BOX_FORMAT.tokens()]
    kept = tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True)
    assert kept.replace(" ", "") == "".join(BOX_FORMAT.tokens())


def test_chat_template_only_appends(tokenizer) -> None:
    chat = [
        {"role": "user", "content": "Where is it?"},
        {"role": "assistant", "content": "here"},
        {"role": "user", "content": "And now?"},
    ]
    texts = [tokenizer.apply_chat_template(chat[:n], tokenize=False) for n in (1, 2, 3)]
    assert texts[1] == "<|user|>Where is it?<|assistant|>here</s>"
    assert texts[2].startswith(texts[1]) and texts[1].startswith(texts[0])


def test_saved_and_loaded_it_is_the_same(tokenizer, tmp_path) -> None:
    torch.manual_seed(0)
    config = TinyLlmConfig(width=32, layers=1, heads=2, mlp_width=32)
    model = build_language_model(config, tokenizer, BOX_FORMAT).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    ids = torch.tensor([reloaded("Where is the crab?")["input_ids"]])
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert reloaded.chat_template == tokenizer.chat_template
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight


def test_equal_words_attend_to_each_other_from_the_start(tokenizer) -> None:
    torch.manual_seed(0)
    config = TinyLlmConfig(width=64, layers=1, heads=2)
    model = build_language_model(config, tokenizer, BOX_FORMAT)
    model.set_attn_implementation("eager")
    ids = tokenizer("crab clock apple tree boat crab", add_special_tokens=False)["input_ids"]
    attention = model(torch.tensor([ids]), output_attentions=True).attentions[0][0].mean(0)[-1]
    assert attention[0] > 2 * attention[1:-1].max()
