"""How many steps each entry of a comparison gets, where seconds of training are equal.

Each entry's time of a step is measured as a trial would take it, all entries in turn and in several rounds, so that
what else the machine does is shared. What came out is kept with the comparison's studies: a resume measures nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from statistics import median

from bilora_ray.errors import TrialFailure, UserError
from bilora_ray.search.comparing.file import STEPS, Comparison
from bilora_ray.search.space import Space

# So often each entry is measured.
ROUNDS = 3


def with_steps(comparison: Comparison, steps: Mapping[str, int]) -> Comparison:
    """The comparison with so many `steps` of each entry."""

    def of(entry: str, space: Space) -> Space:
        fixed = {key: value for key, value in space.fixed.items() if key not in STEPS}
        return replace(space, fixed={**fixed, "max_steps": steps[entry]})

    return comparison.mapped({entry: of(entry, space) for entry, space in comparison.spaces.items()})


def measured_steps(comparison: Comparison, at_once: int, say: Callable[[str], None]) -> dict[str, int]:
    """Entry -> the steps that take it as many seconds as the baseline's take that; Ray is connected.

    Where settings are searched that a step's time depends on, it is that of the first of them.

    Args:
        comparison: the checked file.
        at_once: trials that run at one time.
        say: shows one line to a person.

    Raises:
        UserError: a trial of an entry cannot be measured, or would have no step that trains.
    """
    from bilora_ray.quiet import quiet

    quiet()
    from bilora_ray.runners.measuring import measured
    from bilora_ray.training.loop import share_of

    entries = list(comparison.spaces)
    base = comparison.spaces[comparison.baseline]
    say(f"measuring the time of a step of {', '.join(entries)}")
    settings = [space.first_config().model_dump() for space in comparison.spaces.values()]
    found = measured(settings * ROUNDS, base.resources.model_dump(), at_once)
    seconds: dict[str, list[float]] = {entry: [] for entry in entries}
    config, steps = base.first_config(), 0
    for index, told in enumerate(found):
        entry = entries[index % len(entries)]
        if isinstance(told, TrialFailure):
            raise UserError(f"methods.{entry}: the time of its steps could not be measured ({told})")
        cost = told[1]
        seconds[entry].append(cost.step)
        if entry == comparison.baseline:
            steps = config.max_steps or share_of(config.num_train_epochs, math.ceil(cost.train_rows / cost.step_rows))
    own = seconds[comparison.baseline]
    ratios = {entry: median(one / other for one, other in zip(seconds[entry], own, strict=True)) for entry in entries}
    told_steps = {entry: max(1, round(steps / ratio)) for entry, ratio in ratios.items()}
    words = ", ".join(f"{entry} {told_steps[entry]} ({ratio:.2f} x)" for entry, ratio in ratios.items())
    say(f"steps of equal seconds: {words}")
    for entry, count in told_steps.items():
        if count <= share_of(comparison.spaces[entry].first_config().warmup_ratio, count):
            left = f"the seconds of {steps} steps of {comparison.baseline} leave it {count}, all of them warm-up"
            raise UserError(f"methods.{entry}: {left}; give more max_steps or num_train_epochs")
    return told_steps
