"""Boxes in the answers of any model: declared formats, a strict and a lenient reading.

`mllm.coordinates` writes and reads our own model's boxes; this reads everybody's, without torch.
"""

from cloc_mllm.evaluation.answers.formats import FORMATS, AnswerFormat, answer_format
from cloc_mllm.evaluation.answers.reading import Reading, read_lenient, read_strict

__all__ = ["FORMATS", "AnswerFormat", "Reading", "answer_format", "read_lenient", "read_strict"]
