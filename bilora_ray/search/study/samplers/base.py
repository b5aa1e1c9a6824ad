"""What a sampler is: it is made anew for each trial, and the trial's number decides what it draws."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial

from bilora_ray.search.space import Space, Value, setting_of

# The study, its space and the trial's number -> what proposes that trial's settings.
Sampler = Callable[[optuna.Study, Space, int], BaseSampler]
# The space -> why a sampler cannot search it, and what to write instead; None where it can.
Limit = Callable[[Space], str | None]


def seed_of(space: Space, number: int, setting: str | None = None) -> int:
    """What trial `number` draws by, so that an interrupted one gets what it would have got, and no two the same.

    Args:
        space: of the study.
        number: of the trial.
        setting: if one is drawn by itself: what it gets then depends on no draw before it, which a process that died
            may have made already.
    """
    own = [] if setting is None else [zlib.crc32(setting.encode())]
    return int(np.random.SeedSequence([space.study.seed, number, *own]).generate_state(1)[0])


def startup_trials(space: Space) -> int:
    """How many trials end before what is known of them is modelled; Optuna's ten would be most of a small study."""
    return min(10, max(4, space.study.num_trials // 4))


class ForOneTrial(BaseSampler):
    """One of Optuna's samplers, for one trial: whoever asks for a setting, and in what order, it gets the same value.

    Args:
        space: of the study.
        number: of the trial.
        make: a seed -> the sampler.
    """

    def __init__(self, space: Space, number: int, make: Callable[[int], BaseSampler]) -> None:
        self._space = space
        self._number = number
        self._make = make
        self._together = make(seed_of(space, number))

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The settings that are drawn together."""
        return self._together.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Value]:
        """Values of those."""
        return self._together.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Value:
        """The value of a setting that is drawn by itself."""
        one: Value = self._make(seed_of(self._space, self._number, param_name)).sample_independent(
            study, trial, param_name, param_distribution
        )
        return one


class Planned(BaseSampler):
    """A sampler whose proposal gives way to settings that are known before any of them is asked for.

    Args:
        values: setting -> its value.
        rest: proposes the settings that `values` lacks.
    """

    def __init__(self, values: Mapping[str, Value], rest: BaseSampler) -> None:
        self._values = values
        self._rest = rest

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The settings that `rest` draws together."""
        return self._rest.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Value]:
        """Values of those."""
        proposed = self._rest.sample_relative(study, trial, search_space)
        return {key: self._values.get(key, value) for key, value in proposed.items()}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Value:
        """The value of one setting."""
        if param_name in self._values:
            return self._values[param_name]
        value: Value = self._rest.sample_independent(study, trial, param_name, param_distribution)
        return value


def given(trial: FrozenTrial) -> Mapping[str, Value]:
    """The settings that nobody proposed for `trial`: a point to evaluate has them from its beginning."""
    values: Mapping[str, Value] = trial.system_attrs.get("fixed_params", {})
    return values


def conditional(space: Space) -> tuple[str, ...]:
    """The settings that some trials have and others have not, or have another distribution of."""
    cases = list(space.each_case())
    names = (name for name in space.distributions if not all(space.asked(name, sampled) for sampled in cases))
    return tuple(dict.fromkeys(map(setting_of, names)))
