"""Whether a trial's perturbation is adversarial: what `method.adversary` measures, of the trial's own batches."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from bilora_ray.config import TrialConfig
from bilora_ray.errors import OutOfMemory
from bilora_ray.method import MethodAdamW
from bilora_ray.method.adversary import Batches, Perturb, adversity, of_auxiliary, of_factors
from bilora_ray.method.bilora import BiLoraAdamW
from bilora_ray.method.layers import PRIMARY
from bilora_ray.method.lora_sam import LoraSamAdamW
from bilora_ray.method.spaces import FullSpace
from bilora_ray.training.compute.memory import release
from bilora_ray.training.distributed.workers import drawing_again, random_states
from bilora_ray.training.probe.sharpness import Rows
from bilora_ray.training.tasks.base import Example

# Where `adversary_steps` is absent: the steps from one look to the next, and the most weights that are adapted. Of more
# it is not looked unasked: two gradients of theirs, 2 GiB in fp32, are in main memory meanwhile.
EVERY, MOST_WEIGHTS = 1000, 2**28


def is_due(config: TrialConfig, step: int, before: int) -> bool:
    """Whether the evaluation at `step` is the first one after another `adversary_steps`.

    Args:
        config: the settings.
        step: of the evaluation.
        before: of the one before it; 0 if there was none.
    """
    every = EVERY if config.adversary_steps is None else config.adversary_steps
    return every > 0 and step // every > before // every


def look(
    rows: Rows, optimizer: MethodAdamW, previous: Sequence[Example], following: Sequence[Example], count: int
) -> dict[str, float]:
    """The metrics of a look, at the weights as they are. It draws nothing, and changes nothing.

    Nothing is told of a method without such a perturbation, of a model that has other than linear layers adapted, of a
    batch with nothing to predict, and where there is no memory.

    Args:
        rows: the validation rows, with the loss that is trained.
        optimizer: of the method.
        previous: the rows of the last step.
        following: those of the next one.
        count: so many of the validation rows are the held-out batch, the same ones each time.
    """
    batches = [[example for example in batch if rows.task.target_count([example])] for batch in (previous, following)]
    batches.append(spread(rows.examples, count))
    try:
        space = FullSpace(rows.model)
    except ValueError:
        return {}
    perturb = _perturb(rows.config, optimizer, space)
    if perturb is None or not all(batches) or not _has_room(rows.config, space):
        return {}
    try:
        with drawing_again(random_states()):
            return rows.measured_of(batches, lambda cuts: adversity(space, Batches(*cuts), perturb))
    except OutOfMemory:
        release()
        return {}


def spread(examples: Sequence[Example], count: int) -> list[Example]:
    """So many of `examples`, or all, evenly spaced: they may be in the order of their labels."""
    count = min(count, len(examples))
    return [examples[place * len(examples) // count] for place in range(count)]


def _perturb(config: TrialConfig, optimizer: MethodAdamW, space: FullSpace) -> Perturb | None:
    """What the method perturbs with; None if that is nothing, or no function of the gradient."""
    if isinstance(optimizer, BiLoraAdamW):
        is_of_all = config.clip == "global" and config.norm == "effective"
        return of_auxiliary(space, config.rho if is_of_all else None)
    if isinstance(optimizer, LoraSamAdamW) and not any(PRIMARY in layer.lora_variant for layer in space.layers):
        return of_factors(space, *optimizer.next_perturbed())
    return None


def _has_room(config: TrialConfig, space: FullSpace) -> bool:
    return config.adversary_steps is not None or sum(map(prod, space.shapes())) <= MOST_WEIGHTS
