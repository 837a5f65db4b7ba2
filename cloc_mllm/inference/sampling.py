"""How the tokens of an answer are chosen, and where it ends."""

from __future__ import annotations

from dataclasses import dataclass

MIN_TEMPERATURE = 1e-5  # logits divided by less are no numbers any more; vLLM's bound, too


@dataclass(frozen=True)
class Sampling:
    """The settings of an answer.

    Args:
        temperature: 0 is greedy, as is everything below `MIN_TEMPERATURE`.
        seed: None draws another answer each time.
        stop: words that end the answer and are not part of it.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    @property
    def is_greedy(self) -> bool:
        return self.temperature < MIN_TEMPERATURE
