"""What earlier versions wrote, in today's terms. Every loader asks here, nothing else knows."""

from __future__ import annotations

import re
from typing import TypeVar

T = TypeVar("T")

# Names of weights by prefix: of a CLOC and an MLLM, and of the file that `cloc-mllm export` writes.
RENAMED_WEIGHTS = {
    "vision.prompter.": "vision.region_encoder.prompter.",
    "vision.box_head.": "vision.region_encoder.box_head.",
    "vision.roi_align.": "vision.region_encoder.",
    "region.roi_align.": "region.",
}


def current_name(name: str) -> str:
    """The name that a weight has today, also where it follows another (`exp_avg.NAME`)."""
    for old, new in RENAMED_WEIGHTS.items():
        name = re.sub(rf"(^|\.){re.escape(old)}", rf"\g<1>{new}", name)
    return name


def by_current_name(state: dict[str, T]) -> dict[str, T]:
    """A state dict, or an optimizer's moments by parameter name, under today's names."""
    return {current_name(name): value for name, value in state.items()}
