"""The settings of `cloc-mllm ablate`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class AblationArm:
    """One row of an ablation table.

    Args:
        name: name of the row.
        settings: settings of stage 1 that it changes, by dotted key:
            `{"data.regions_per_image": 2}`; `{seed}` in a text is the cell's seed.
        against: name of the row that it is compared with; "" for the reference row itself.
        paper_row: the row of the paper's table 2 that does the same; "" if there is none.
        paper: difference between that row and the paper's reference row, in points, by task.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    against: str = ""
    paper_row: str = ""
    paper: dict[str, float] = field(default_factory=dict)


@dataclass
class AblationConfig:
    """Trains and evaluates each arm with each seed: `cloc-mllm ablate --config ablation`.

    Args:
        base: stage-1 YAML, or the name of a shipped one, that every arm starts from.
        settings: settings that all arms change, by dotted key.
        train: training records; "" makes 10,000 built-in scenes in `output_dir`.
        test: records to score on; "" makes 500 built-in test scenes.
        output_dir: gets `cells/ARM-seedN/`, `ablation.md`, `ablation.json` and `ablation.png`.
        only: names of the arms to run; empty is all. The table shows every cell that is done.
        jobs: cells trained at a time, each on its share of the cores.
    """

    base: str = "stage1_openmoji"
    settings: dict[str, Any] = field(default_factory=dict)
    arms: list[AblationArm] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    train: str = ""
    test: str = ""
    output_dir: str = "runs/ablation"
    only: list[str] = field(default_factory=list)
    jobs: int = 1
