"""How a text is drawn, where the likeliest one is not wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor
from transformers import LogitsProcessor, TemperatureLogitsWarper, TopPLogitsWarper


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn, in the words of transformers.

    A row's text depends on the seed and on the number of the row: not on the rows beside it, nor on how many are
    written at once.

    Attributes:
        temperature: above 0; logits are divided by it.
        top_p: the likeliest tokens that have so much of the probability together are drawn from, and no others.
        seed: of all that is drawn.
        steps: tokens of a text at the most.
    """

    temperature: float
    top_p: float
    seed: int
    steps: int

    def of(self, rows: Sequence[int]) -> LogitsProcessor:
        """What draws the texts of `rows`, by their numbers."""
        chances = [numpy.random.default_rng([self.seed, row]).random(self.steps) for row in rows]
        return _Drawn(torch.from_numpy(numpy.stack(chances)), self)


class _Drawn(LogitsProcessor):
    """Leaves of each row's next tokens one, by a number of its own between 0 and 1 in their cumulated probability."""

    def __init__(self, chances: Tensor, sampling: Sampling) -> None:
        self.chances = chances
        self.step = 0
        self.warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(float(sampling.temperature))]
        if sampling.top_p < 1:
            self.warpers.append(TopPLogitsWarper(float(sampling.top_p)))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(rows, vocabulary): 0 at the token that is drawn, and no other can be written."""
        kept = scores.float()
        for warper in self.warpers:
            kept = warper(input_ids, kept)
        reached = kept.double().softmax(-1).cumsum(-1)
        chance = self.chances[:, self.step, None].to(reached.device) * reached[:, -1:]
        self.step += 1
        # A token without a probability is never reached first.
        drawn = torch.searchsorted(reached, chance, right=True).clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)
