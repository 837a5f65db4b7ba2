"""Words of an answer."""

from __future__ import annotations

import re


def english_words(text: str) -> list[str]:
    """English words in lower case, `n't` as `not`."""
    return re.findall(r"[a-z]+", re.sub(r"n['’]t\b", " not", text.lower()))
