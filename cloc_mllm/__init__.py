"""cloc-mllm: grounding in multimodal LLMs, built on CLOC (arXiv 2410.02746)."""

__version__ = "0.1.0"
