from __future__ import annotations

import pytest
import torch

from cloc_mllm.devices import choose_device, resolve_frozen_dtype, resolve_precision


def test_explicit_precision_is_taken_as_given() -> None:
    assert resolve_precision("bf16") == "bf16"
    assert resolve_precision("fp32") == "fp32"
    assert resolve_precision("auto") in ("bf16", "fp32")


@pytest.mark.parametrize("unnamed", [None, "", "auto"])
def test_without_a_name_the_gpu_is_taken_if_there_is_one(unnamed: str | None) -> None:
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert choose_device(unnamed) == torch.device(expected)


def test_a_named_device_is_taken_as_given() -> None:
    assert choose_device("cpu") == choose_device(torch.device("cpu")) == torch.device("cpu")
    assert choose_device("cuda:1") == torch.device("cuda", 1)


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown device 'gpu0'; expected auto, cpu, cuda"):
        choose_device("gpu0")


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU auto is bfloat16")
def test_frozen_weights_stay_float32_on_a_cpu_unless_bfloat16_is_named() -> None:
    assert resolve_frozen_dtype("auto", "bf16") == "float32"
    assert resolve_frozen_dtype("bfloat16", "bf16") == "bfloat16"
    with pytest.raises(ValueError, match="is fp32; set"):
        resolve_frozen_dtype("bfloat16", "fp32")
