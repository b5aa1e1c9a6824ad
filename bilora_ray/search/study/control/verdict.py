"""What runs on fresh seeds say of settings that a search has found: which win, and what they are worth.

The best value of a search is that of a lucky run: of many trials the one is picked whose noise was the kindest. Runs of
the same settings on seeds that had no part in that are free of it. To pick the best of them is a selection again,
so the winner's own mean is still too good; see `judge` for what is reported instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, variance

from bilora_ray.measures import range_of
from bilora_ray.records import Objective
from bilora_ray.words import interval

LEVEL = 0.95
METHOD = (
    "each seed's score is of the finalist that the other seeds pick, so that none is scored by what picked it; "
    f"{LEVEL:.0%} interval by Student's t, Bonferroni's correction at its worse end"
)
Scores = Sequence[float | None]  # by seed; None: the run has failed


@dataclass(frozen=True)
class Finalist:
    """Settings of a search, trained on fresh seeds.

    Attributes:
        trial: the search's trial with these settings.
        single: its value in the search; None if it was stopped early there, with what fewer rows gave.
        scores: the values on the fresh seeds, in their order.
        mean: of those.
        low: of the interval of the mean, for these settings alone; None with fewer than two scores.
        high: the same.
        fell: how much worse the mean is than `single`.
    """

    trial: int
    single: float | None
    scores: Scores
    mean: float
    low: float | None
    high: float | None
    fell: float | None

    @property
    def median_seed(self) -> int:
        """Which of the seeds gave the middle score, of two the worse one: what is reported is what is got."""
        known = sorted((score, index) for index, score in enumerate(self.scores) if score is not None)
        return known[len(known) // 2][1]


@dataclass(frozen=True)
class Verdict:
    """What the fresh seeds say.

    Attributes:
        finalists: the winner first.
        score: what the winner is worth, free of both selections.
        low: the interval of that: the mean of trials with the winner's settings is in it.
        high: the same.
        fell: how much worse than the winner's value in the search `score` is; None if it was stopped early there.
        seeds: how many each had.
    """

    finalists: tuple[Finalist, ...]
    score: float
    low: float | None
    high: float | None
    fell: float | None
    seeds: int

    @property
    def winner(self) -> Finalist:
        """The best of the finalists."""
        return self.finalists[0]

    def as_metrics(self, metric: str) -> dict[str, float]:
        """What a tracker is told, beside the values of single runs, of which the best is too good; a `step` with it."""
        found = {
            f"finalist_{metric}": self.score,
            f"finalist_{metric}_low": self.low,
            f"finalist_{metric}_high": self.high,
            f"single_run_{metric}": self.winner.single,
            "finalist_fell": self.fell,
            "finalist_trial": float(self.winner.trial),
        }
        told = {key: value for key, value in found.items() if value is not None}
        return {**told, "step": float(len(self.finalists) * self.seeds)}

    def in_words(self, metric: str) -> str:
        """Who wins, with what, and how that differs from the single run in the search."""
        line = f"Winner: trial {self.winner.trial}, {metric} {self.score:.6g}"
        if self.low is not None:
            line += f", {interval(self.low, self.high)} with {LEVEL:.0%} confidence"
        return line + self.beside_single()

    def beside_single(self) -> str:
        """How the score differs from the winner's single run in the search: the end of a sentence."""
        single = self.winner.single
        if single is None or self.fell is None:
            return "; the search had stopped it early"
        run = f"the {single:.6g} of its single run in the search"
        if self.fell == 0:
            return f", as {run}"
        return f"; that is {abs(self.fell):.4g} {'worse' if self.fell > 0 else 'better'} than {run}"


def judge(singles: Mapping[int, float | None], scores: Mapping[int, Scores], objective: Objective) -> Verdict | None:
    """Who wins, and what the winner is worth.

    The winner has the fewest failures and then the best lower confidence bound (of a loss: the lowest upper one). The
    noise in it is what all finalists share: with one's own noise of a few seeds, that noise would decide. The score is
    leave-one-seed-out: the mean, over the seeds, of what the finalist has on a seed that the *other* seeds pick. Its
    expectation is that of the picked one's true mean (cross-validated selection; Varma and Simon, BMC Bioinformatics
    2006), where the winner's own mean is too good by half a standard deviation of a run and more. The interval is
    Student's of the winner's scores. Towards the worse, where selection errs, it covers all finalists at once; towards
    the better it covers one, for who is picked is picked against an error of that sign.

    Args:
        singles: trial of the search -> its value there; None if it was stopped early.
        scores: the same -> the values on the fresh seeds, each list in the same order of seeds.
        objective: which value is the better one.

    Returns:
        None where no run is complete.
    """
    sign = -1.0 if objective.greater_is_better else 1.0
    losses = {trial: [None if s is None else sign * s for s in told] for trial, told in scores.items()}
    order = _ranked(losses)
    if not order:
        return None
    winner = [loss for loss in losses[order[0]] if loss is not None]
    score = _left_out(losses) if len(winner) > 1 else fmean(winner)
    worse, better = _half_width(winner, 1 - (1 - LEVEL) / 2 / len(losses)), _half_width(winner, (1 + LEVEL) / 2)
    low: float | None = None
    high: float | None = None
    if worse is not None and better is not None:
        # The score of few seeds may lie beyond, once in a hundred: an interval that is wider covers no less.
        ends = sign * min(fmean(winner) - better, score), sign * max(fmean(winner) + worse, score)
        low, high = _within(objective.metric, min(ends), max(ends))
    found = [_finalist(trial, singles[trial], scores[trial], objective) for trial in order]
    return Verdict(
        finalists=tuple(found),
        score=sign * score + 0.0,
        low=low,
        high=high,
        fell=_fallen(singles[order[0]], sign * score, objective),
        seeds=max(map(len, scores.values())),
    )


def _finalist(trial: int, single: float | None, scores: Scores, objective: Objective) -> Finalist:
    known = [score for score in scores if score is not None]
    mean, half = fmean(known), _half_width(known, (1 + LEVEL) / 2)
    low, high = (None, None) if half is None else _within(objective.metric, mean - half, mean + half)
    return Finalist(trial, single, tuple(scores), mean, low, high, _fallen(single, mean, objective))


def _within(metric: str, low: float, high: float) -> tuple[float, float]:
    """An interval less what the metric cannot be."""
    least, greatest = range_of(metric)
    return max(low, least) + 0.0, min(high, greatest) + 0.0  # no -0.0


def _fallen(single: float | None, score: float, objective: Objective) -> float | None:
    return None if single is None else objective.as_loss(score) - objective.as_loss(single)


def _ranked(losses: Mapping[int, Scores]) -> list[int]:
    """The finalists with a complete run, the best first."""
    complete = {trial: [loss for loss in told if loss is not None] for trial, told in losses.items()}
    known = {trial: told for trial, told in complete.items() if told}
    freedom = sum(len(told) - 1 for told in known.values())
    noise = 0.0
    if freedom:
        within = sum((len(told) - 1) * variance(told) for told in known.values() if len(told) > 1)
        noise = math.sqrt(within / freedom) * _quantile(LEVEL, freedom)

    def rank(trial: int) -> tuple[int, float]:
        failures = len(losses[trial]) - len(known[trial])
        return failures, fmean(known[trial]) + noise / math.sqrt(len(known[trial]))

    return sorted(known, key=rank)


def _left_out(losses: Mapping[int, Scores]) -> float:
    """The mean of what those have on each seed that the other seeds pick."""
    found = []
    for seed in range(max(map(len, losses.values()))):
        others = {trial: [*told[:seed], *told[seed + 1 :]] for trial, told in losses.items()}
        # Of who failed on this seed nothing is known: the next one stands in.
        scored = (losses[trial][seed] for trial in _ranked(others))
        found += [loss for loss in scored if loss is not None][:1]
    return fmean(found)


def _half_width(scores: Sequence[float], level: float) -> float | None:
    """Student's, of the mean of `scores`, towards one side."""
    if len(scores) < 2:
        return None
    return _quantile(level, len(scores) - 1) * math.sqrt(variance(scores) / len(scores))


def _quantile(level: float, freedom: int) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(freedom, level))
