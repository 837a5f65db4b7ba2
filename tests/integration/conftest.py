from tests.tiny_mllm import cloc_dir, llm_dir, mllm_config, mllm_dir

__all__ = ["cloc_dir", "llm_dir", "mllm_config", "mllm_dir"]
