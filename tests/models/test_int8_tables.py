"""Large embedding tables in int8: what they lose, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cloc_mllm.models import int8_tables
from cloc_mllm.models.build import build_cloc, load_cloc, load_tokenizer, save_cloc
from cloc_mllm.models.int8_tables import large_tables, pack, unpack
from tests.models.tiny import tiny_config


def test_a_value_is_off_by_at_most_half_a_step() -> None:
    torch.manual_seed(0)
    table = torch.randn(300, 64) * torch.logspace(-4, 3, 300)[:, None]
    table[7] = 0
    packed = pack({"words": table, "other": table[:2]}, ["words"])
    assert packed.keys() == {"words.int8", "words.scale", "other"}
    assert packed["words.int8"].dtype == torch.int8 and packed["words.scale"].shape == (300,)
    actual = unpack(packed, "a test")
    assert actual.keys() == {"words", "other"} and torch.equal(actual["other"], table[:2])
    # half a step, and what half precision takes from the scale: 2^-11 of it, or 2^-25 below 6e-5
    largest = table.abs().amax(1, keepdim=True)
    allowed = largest * (0.5 / 127 + 2**-11) + 127 * 2**-25
    assert ((actual["words"] - table).abs() <= allowed).all()
    assert torch.equal(actual["words"][7], table[7])


def test_only_large_embeddings_are_packed() -> None:
    model = nn.ModuleDict(
        {"words": nn.Embedding(2000, 512), "few": nn.Embedding(9, 9), "map": nn.Linear(2000, 512)}
    )
    assert large_tables(model) == ["words.weight"]


@pytest.mark.parametrize(
    ("scale", "said"),
    [(None, "words.scale is missing"), (torch.ones(3), r"words.scale has the shape \[3\]")],
    ids=["missing", "too short"],
)
def test_a_wrong_pair_is_refused(scale: torch.Tensor | None, said: str) -> None:
    state = {"words.int8": torch.zeros(4, 2, dtype=torch.int8)}
    state |= {} if scale is None else {"words.scale": scale}
    with pytest.raises(ValueError, match=f"model.safetensors: words.int8 has 4 rows, but {said}"):
        unpack(state, "model.safetensors")


def test_a_saved_model_keeps_its_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_tables, "_MIN_VALUES", 1000)
    config = tiny_config()
    tokenizer = load_tokenizer(config)
    model = build_cloc(config, tokenizer)
    save_cloc(model, tmp_path, config, tokenizer, pack_tables=True)
    assert any(name.endswith(".int8") for name in load_file(tmp_path / "model.safetensors"))
    loaded, _, _ = load_cloc(tmp_path)
    texts = tokenizer(["a crab", "two boats left of the clock"])
    with torch.no_grad():
        expected, actual = model.eval().encode_text(texts), loaded.encode_text(texts)
    assert torch.cosine_similarity(actual, expected).min() > 0.999

    state = load_file(tmp_path / "model.safetensors")
    del state[next(name for name in state if name.endswith(".scale"))]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.safetensors: .* is missing; expected one"):
        load_cloc(tmp_path)
