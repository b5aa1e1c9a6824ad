"""What a trial takes: measured of every method, over whole cycles of those whose steps are not all alike."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle

import pytest
from tiny_trials import Tiny

from bilora_ray.facts import METHOD_NAMES, MethodName
from bilora_ray.training.probe import cost as probe
from bilora_ray.training.probe.cost import cost


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_a_step_of_every_method_has_a_time(method: MethodName, tiny: Tiny) -> None:
    found = cost(tiny.config("causal-lm", method=method))
    assert found.step > 0
    assert found.passes == ()


def test_a_costly_step_among_cheap_ones_has_its_share(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = cycle([10.0, 1.0, 1.0, 1.0])

    def timed(work: Callable[[], object]) -> float:
        work()
        return next(clock)

    monkeypatch.setattr(probe, "_timed", timed)
    assert cost(tiny.config("causal-lm", method="looksam", looksam_every=4)).step == 13 / 4
