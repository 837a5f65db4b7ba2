"""Tells a spoiled step from a sound one: not finite, or far above the last ones."""

from __future__ import annotations

import math
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from cloc_mllm.train.checkpoint import list_checkpoints

MAX_SKIPPED, SKIPPED_OF = 10, 50  # so many skipped steps of the last ones end a run

_WINDOW = 200  # steps that the bounds are drawn from
_LEAST = 50  # with fewer steps there are no bounds
_TO_DEVIATION = 1.4826  # from the median absolute deviation to the standard one, of normal values
# The least deviations: losses are in nats and fall close to 0 where a small set is learnt by heart,
# and norms have long tails.
_LEAST_NATS = 0.05
_LEAST_OF_NORM = 2.0  # medians

_RAN_AWAY = 10.0  # of the logarithm of an inverse temperature, which the losses cut at ln 100 = 4.6


class DivergedError(ValueError):
    """Raised when too many of the last steps were skipped."""


class Health:
    """The losses and gradient norms of the last steps, the same on all ranks.

    Args:
        spike_bound: see `OptimConfig`.
        grad_clip: no norm below it is a spike.
        saved: `state()` of the run that is resumed.
    """

    def __init__(
        self, spike_bound: float, grad_clip: float, saved: dict[str, list[float]] | None = None
    ) -> None:
        saved = saved or {}
        self.spike_bound, self.grad_clip = spike_bound, grad_clip
        self._losses = deque(saved.get("losses", ()), _WINDOW)
        self._norms = deque(saved.get("grad_norms", ()), _WINDOW)
        self._skipped: deque[bool] = deque(map(bool, saved.get("skipped", ())), SKIPPED_OF)

    def state(self) -> dict[str, list[float]]:
        """What a checkpoint keeps, so that a resumed run decides as the unbroken one."""
        skipped = [float(skipped) for skipped in self._skipped]
        return {"losses": [*self._losses], "grad_norms": [*self._norms], "skipped": skipped}

    def fault(self, loss: float, grad_norm: float) -> str:
        """Says what is wrong with a step, "" if nothing is."""
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            return "loss or gradient is not finite"
        if self.spike_bound <= 0 or len(self._losses) < _LEAST:
            return ""
        most = self._bound(self._losses, lambda median: _LEAST_NATS * max(1.0, median))
        if loss > most:
            return f"loss {loss:.4g} is above its bound of {most:.4g}"
        most = self._bound(self._norms, lambda median: _LEAST_OF_NORM * median)
        if grad_norm > max(most, self.grad_clip):
            return f"gradient norm {grad_norm:.4g} is above its bound of {most:.4g}"
        return ""

    def note(self, loss: float, grad_norm: float, *, skipped: bool) -> None:
        """Takes in a step. A spike enters, too: where losses stay high, they become the rule."""
        self._skipped.append(skipped)
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self._losses.append(loss)
            self._norms.append(grad_norm)

    def check(self, done: int, checkpoints: Path) -> None:
        """Looks at the share of skipped steps.

        Raises:
            DivergedError: it is too large.
        """
        num_skipped = sum(self._skipped)
        if num_skipped < MAX_SKIPPED:
            return
        raise DivergedError(
            f"{num_skipped} of the last {len(self._skipped)} steps were skipped, up to step {done};"
            f" newest checkpoint: {newest(checkpoints)}. Lower optim.lr, or look at the samples "
            "named in the log; if spikes are as they should be, raise optim.spike_bound"
        )

    def _bound(self, values: deque[float], least_deviation: Any) -> float:
        middle = float(np.median(values))
        deviation = _TO_DEVIATION * float(np.median(np.abs(np.array(values) - middle)))
        return middle + self.spike_bound * max(deviation, least_deviation(middle))


def newest(checkpoints: Path) -> str:
    """Names the newest checkpoint for a message."""
    saved = list_checkpoints(checkpoints)
    return str(saved[-1]) if saved else "none was written yet"


def runaway_scales(model: nn.Module) -> str:
    """Names the temperatures that get no gradient any more, "" if there is none."""
    scales = {
        name: parameter.item()
        for name, parameter in model.named_parameters()
        if name.endswith("logit_scale") and parameter.numel() == 1  # ZeRO-3 may hold it elsewhere
    }
    gone = [f"{name} is {value:.4g}" for name, value in scales.items() if abs(value) > _RAN_AWAY]
    if not gone:
        return ""
    return (
        f"{', '.join(gone)}: the loss cuts e to this power at 100, so it has no gradient and stays "
        "there; go back to an older checkpoint, with a lower rate (optim.layer_lr)"
    )
