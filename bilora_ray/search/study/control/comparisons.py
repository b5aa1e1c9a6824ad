"""What the studies of a comparison keep of it: whose they are, the runs of all entries, and how each was scored.

The entries' tunings are a study each, their runs with the best settings one together: seeds first and entries then, so
that whatever the machine does meanwhile is shared. So whatever holds for a search holds for them: a kill, a resume,
MLflow.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import optuna
from optuna.trial import TrialState

from bilora_ray.checking import build
from bilora_ray.errors import UserError
from bilora_ray.records import TrialRecord
from bilora_ray.search.space import Choice, Given, Range, Space, StudyConfig, Value, named, setting_of
from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.samplers.qmc import point
from bilora_ray.search.study.storage import open_storage, read_storage
from bilora_ray.search.study.studies import begun_studies, steered_study
from bilora_ray.search.study.view import COMPARISON, ENDED, ERROR, StudyView, comparison_of
from bilora_ray.settings import FACTS, applies, non_default

# Of the runs' study, how each run was scored: the attribute of its number.
SCORED = "scored_{}"
# The numbers of seeds at which somebody had seen the outcome before more were asked for.
LOOKED_AT = "looked_at"
# Of the runs' seeds among what a comparison's seed decides.
STREAM = 2**32 - 2
LARGEST_SEED = 2**32 - 1
VARIANT, SEED = "variant", "seed"


def parts_of(layout: Layout, name: str) -> list[str]:
    """The names of the studies of comparison `name`, its runs first; none where a study is called so itself."""
    storage = read_storage(layout)
    studies = [] if storage is None else storage.get_all_studies()
    told = {one.study_name: one.user_attrs.get(COMPARISON, {}).get("name") for one in studies}
    return [] if name in told else sorted(part for part, whole in told.items() if whole == name)


def begun_parts(layout: Layout, names: Iterable[str], comparison: str) -> dict[str, StudyView]:
    """Those of the studies `names` that have begun, which are parts of `comparison`.

    Raises:
        UserError: a study of such a name is no part of it.
    """
    found = begun_studies(layout, list(names))
    for name, study in found.items():
        if comparison_of(study.study) != comparison:
            raise UserError(f"comparison '{comparison}': a study '{name}' exists, which is none of it; rename this one")
    return found


def steps_of(parts: Iterable[StudyView]) -> dict[str, int] | None:
    """How many steps each entry of a comparison has, of which `parts` have begun; None where that was not measured."""
    known = (part.study.user_attrs[COMPARISON].get("steps") for part in parts)
    return next((dict(steps) for steps in known if steps is not None), None)


def check_asked(study: StudyView, asked: Mapping[str, Any]) -> None:
    """Refuse to go on with a comparison that began with something else. UserError says what has changed."""
    told = study.study.user_attrs[COMPARISON]
    for key, before in told["asked"].items():
        if asked.get(key) != before:
            line = f"{key} was {_in_words(before)}, is {_in_words(asked.get(key))}"
            more = "; --extend adds seeds" if key == "seeds" else ""
            raise UserError(f"comparison '{told['name']}' began with another file: {line}{more}")


def tuning_points(space: Space, count: int, dimensions: int, shared: Sequence[str]) -> tuple[dict[str, Value], ...]:
    """What the trials of an entry try: the points of a sequence that all entries share.

    So all of them try the same values of what they share.

    Args:
        space: of the entry.
        count: of trials.
        dimensions: of the sequence: as many as the entry has settings that searches the most.
        shared: the settings that all entries search, which have the first coordinates, in this order.
    """
    order = [*shared, *(key for key in map(setting_of, space.distributions) if key not in shared)]
    places = {key: place for place, key in enumerate(dict.fromkeys(order))}
    found = []
    for index in range(count):
        values, sampled = point(space, index, dimensions, places), dict[str, Value]()
        for name in space.distributions:  # in their own order: what comes first decides what is asked then
            if space.asked(name, sampled):
                sampled[name] = values[name]
        found.append(space.sampled(sampled))
    return tuple(found)


def run_seeds(seed: int, count: int, used: Iterable[int]) -> tuple[int, ...]:
    """The first `count` of the seeds that a comparison's `seed` draws, less those `used`; more of them begin alike."""
    taken = set(used)
    drawn = map(int, np.random.SeedSequence([seed, STREAM]).generate_state(2 * count + len(taken) + 8))
    return tuple(found for found in dict.fromkeys(drawn) if found not in taken)[:count]


def best_settings(tuned: StudyView) -> dict[str, Any] | None:
    """The settings of the best trial of an entry's tuning, with the rows that it held out; None if none is complete."""
    best = tuned.best()
    if best is None:
        return None
    config = tuned.config(best.number)
    return {**config.model_dump(exclude={VARIANT, SEED}), "split_seed": config.resolved_split_seed}


def runs_space(tuned: Space, name: str, settings: Mapping[str, Mapping[str, Any]], seeds: Sequence[int]) -> Space:
    """The space of the runs: each entry's settings with each seed.

    An entry is the value of `variant`; whatever entries differ in has a value for each, under that condition. The seed
    is any that there is, so that more seeds later are of the same space.

    Args:
        tuned: the space of an entry's tuning.
        name: of the runs' study.
        settings: entry -> its settings.
        seeds: of the runs.
    """
    entries = tuple(settings)
    alike = {key for key in FACTS if len({repr(settings[entry].get(key)) for entry in entries}) == 1}
    first = settings[entries[0]]
    fixed = non_default({key: first[key] for key in first if key in alike})
    # Its method is known before what only that reads.
    keys = sorted((key for key in first if key not in alike), key=lambda key: key != "method")
    given = {}
    for key in keys:
        for entry in entries:
            if applies(key, str(settings[entry]["method"])):
                part = Given(value=settings[entry][key], when={VARIANT: (entry,)})
                given[named(key, part, alone=False)] = part
    points: tuple[dict[str, Value], ...] = tuple({VARIANT: entry, SEED: seed} for seed in seeds for entry in entries)
    kept = tuned.study.model_dump(include={"project", "seed", "max_concurrent"})
    plain = {"name": name, "num_trials": len(points), "sampler": "random", "scheduler": "none"}
    return replace(
        tuned,
        study=build(StudyConfig, {**kept, **plain}, f"study '{name}'"),
        fixed=fixed,
        distributions={VARIANT: Choice(choice=entries), SEED: Range(low=0, high=LARGEST_SEED, step=None)},
        given=given,
        points_to_evaluate=points,
    )


def entries_of(runs: StudyView) -> tuple[str, ...]:
    """The entries that the study `runs` trains."""
    (name,) = runs.space.names_of(VARIANT)
    return tuple(map(str, runs.space.spread(name, 0)))


def seeds_of(runs: StudyView) -> int:
    """On how many seeds the study `runs` trains each entry."""
    return runs.space.study.num_trials // len(entries_of(runs))


def add_runs(layout: Layout, space: Space) -> None:
    """Have the study of `space`, which has begun, train those of its points that it does not know yet."""
    study = steered_study(layout, space.study.name).study
    with layout.choosing(space.study.name):
        for values in space.points_to_evaluate:
            study.enqueue_trial(space.parameters(values), skip_if_exists=True)


def note_look(layout: Layout, name: str, seeds: int) -> None:
    """Keep that the outcome was known at so many seeds when more were asked for: no p-value knows it."""
    study = optuna.load_study(study_name=name, storage=open_storage(layout))
    study.set_user_attr(LOOKED_AT, sorted({*study.user_attrs.get(LOOKED_AT, ()), seeds}))


def looks_at(runs: StudyView) -> tuple[int, ...]:
    """The numbers of seeds at which the outcome was known before more were asked for."""
    return tuple(runs.study.user_attrs.get(LOOKED_AT, ()))


def keep_score(layout: Layout, name: str, number: int, score: Mapping[str, Any]) -> None:
    """Keep how run `number` was scored, unless that is known: it is scored once."""
    study = optuna.load_study(study_name=name, storage=open_storage(layout))
    with layout.choosing(name):
        if SCORED.format(number) not in study.user_attrs:
            study.set_user_attr(SCORED.format(number), dict(score))


def scores_of(runs: StudyView) -> dict[int, dict[str, Any]]:
    """Run -> how it was scored, of those that were."""
    known = runs.study.user_attrs
    numbers = (trial.number for trial in runs.study.get_trials(deepcopy=False))
    return {number: known[SCORED.format(number)] for number in numbers if SCORED.format(number) in known}


def runs_by_seed(runs: StudyView) -> dict[tuple[str, int], TrialRecord]:
    """Entry and seed -> its run."""
    return {(str(record.sampled[VARIANT]), int(record.sampled[SEED])): record for record in runs.records()}


def failed_by_settings(study: StudyView) -> bool:
    """Whether each trial that has ended failed, and by its own settings."""
    ended = study.trials(*ENDED)
    return all(trial.state == TrialState.PRUNED and ERROR in trial.constraints for trial in ended)


def _in_words(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else repr(value)
