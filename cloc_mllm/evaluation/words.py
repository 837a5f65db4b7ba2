"""Texts made comparable: of queries and of answers."""

from __future__ import annotations

import re


def clean_text(text: str) -> str:
    """Lower case, single spaces: texts that agree in this are one text."""
    return " ".join(text.lower().split())


def english_words(text: str) -> list[str]:
    """English words in lower case, `n't` as `not`."""
    return re.findall(r"[a-z]+", re.sub(r"n['’]t\b", " not", text.lower()))
