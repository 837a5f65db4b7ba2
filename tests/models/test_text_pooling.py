"""Any tokenizer on any text tower: pooled at its end token, and padding changes no feature."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from cloc_mllm.config import ModelConfig
from cloc_mllm.data.tokenizer import (
    HuggingFaceTokenizer,
    end_token_id,
    load_text_tokenizer,
)
from cloc_mllm.models.build import build_cloc, load_cloc, load_tokenizer, save_cloc
from tests.models.tiny import built, tiny_config

TEXTS = ["a red crab", "the boat to the left of two large red crabs", "crab"]


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Unigram tokenizer as T5's: pad 0, end 1, unknown 2, sentinels above all."""
    from tokenizers import SentencePieceUnigramTokenizer
    from transformers import T5TokenizerFast

    unigram = SentencePieceUnigramTokenizer()
    unigram.train_from_iterator(
        TEXTS * 20,
        vocab_size=60,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    directory = tmp_path_factory.mktemp("t5")
    entries = json.loads(unigram.to_str())["model"]["vocab"]
    tokenizer = T5TokenizerFast(vocab=[tuple(entry) for entry in entries], extra_ids=10)
    tokenizer.save_pretrained(directory)
    return str(directory)


def config_with(tokenizer: str, **text: Any) -> ModelConfig:
    config = tiny_config(kind="none")
    text_cfg = config.clip_config["text_cfg"] | text
    clip_config = config.clip_config | {"text_cfg": text_cfg}
    return dataclasses.replace(config, clip_config=clip_config, tokenizer=tokenizer)


def assert_padding_changes_nothing(config: ModelConfig) -> None:
    torch.manual_seed(0)
    cloc, tokenizer = build_cloc(config).eval(), load_tokenizer(config)
    with torch.no_grad():
        together = cloc.encode_text(tokenizer(TEXTS))
        for row, text in zip(together, TEXTS, strict=True):
            # the sums of another length come in another order
            torch.testing.assert_close(cloc.encode_text(tokenizer([text]))[0], row)
        assert not torch.allclose(together[0], together[2], atol=1e-3)


def test_t5_on_the_native_tower_is_pooled_at_its_end(t5: str, tmp_path: Path) -> None:
    config = config_with(t5)
    tokenizer = load_tokenizer(config)
    ids = tokenizer(TEXTS)
    assert (tokenizer.pad_id, int(ids[0][ids[0] != 0][-1])) == (0, 1)
    assert_padding_changes_nothing(config)
    cloc = build_cloc(config).eval()
    assert (cloc.text.text.pool_type, cloc.text.text.eos_id) == ("eos", 1)
    save_cloc(cloc, tmp_path, config, tokenizer)
    loaded, again, _ = load_cloc(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded.encode_text(again(TEXTS)), cloc.encode_text(ids))


@pytest.mark.parametrize(
    "text",
    [
        {"pool_type": "last", "no_causal_mask": True},
        {"no_causal_mask": True, "pool_type": "first"},
    ],
    ids=["siglip", "bidirectional"],
)
def test_towers_that_read_padding_get_all_of_it(t5: str, text: dict[str, Any]) -> None:
    config = config_with(t5, **text)
    assert load_tokenizer(config)(["a"]).shape == (1, 24)
    assert_padding_changes_nothing(config)


def test_clips_tokenizer_keeps_clips_pooling() -> None:
    config = config_with("open_clip:ViT-B-16")
    assert build_cloc(config).text.text.pool_type == "argmax"
    assert_padding_changes_nothing(config)


def test_a_masked_tower_of_transformers_ignores_padding(t5: str, tmp_path: Path) -> None:
    from transformers import MT5Config

    MT5Config(
        vocab_size=100, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2
    ).save_pretrained(tmp_path)
    text = {"hf_model_name": str(tmp_path), "hf_model_pretrained": False, "hf_proj_type": "mlp"}
    config = config_with(t5)
    config.clip_config["text_cfg"] = text
    assert_padding_changes_nothing(config)


def test_a_wrong_place_to_pool_is_refused(t5: str) -> None:
    with pytest.raises(ValueError, match=r"argmax, which pools at the highest id.*token is 1 of"):
        build_cloc(config_with(t5, pool_type="argmax"))
    with pytest.raises(ValueError, match="eos_id is 2, but the tokenizer ends texts with 1"):
        build_cloc(config_with(t5, pool_type="eos", eos_id=2))
    with pytest.raises(ValueError, match="is a CoCa"):
        built(config_with(t5, embed_cls=True))
    endless = AutoTokenizer.from_pretrained(t5)
    endless.backend_tokenizer.post_processor = type(endless.backend_tokenizer.post_processor)(
        single="$A", pair="$A $B", special_tokens=[]
    )
    with pytest.raises(ValueError, match="puts no end token after a text"):
        end_token_id(HuggingFaceTokenizer(endless, 24))


def test_a_tokenizer_that_does_not_pad_as_the_tower_needs_is_refused(t5: str) -> None:
    config = config_with(t5, pool_type="last", no_causal_mask=True)
    with pytest.raises(ValueError, match="does not pad to 24 tokens; load it with load_tokenizer"):
        build_cloc(config, load_text_tokenizer(t5, 24))
