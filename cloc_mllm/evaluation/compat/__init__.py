"""Other projects' RefCOCO scorers, written anew from what they do, quirks included.

Each reads answers in its own way, and that, not the model, decides many published numbers: the same
answers give from 0 to 100 %. Here they explain such differences; `answers` is our own
reading. Read in lmms-eval 75571cfe, VLMEvalKit e8e78f05, InternVL 2410d1db, ml-ferret 3c9e5c93.
"""

from cloc_mllm.evaluation.compat.common import BoxAnswers, CompatScores
from cloc_mllm.evaluation.compat.scorers import COMPATS, compat_scores

__all__ = ["COMPATS", "BoxAnswers", "CompatScores", "compat_scores"]
