"""The best trials of a search, trained on fresh seeds: a study of their own, beside the search's.

So whatever holds for a search holds for it: a kill, a resume, MLflow, several processes. Which trials and which seeds
is kept in the search's study at the moment of the choice, so that a resume chooses the same. A search that went on to
more trials may add finalists; those there were stay, on the same seeds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from bilora_ray.checking import build
from bilora_ray.config import TEST_SETTINGS
from bilora_ray.errors import UserError
from bilora_ray.records import Status, TrialRecord
from bilora_ray.search.space import FINALISTS_OF, SEEDS, Choice, Space, StudyConfig, Value, setting_of
from bilora_ray.search.study.control.evaluations import ENDED_BY
from bilora_ray.search.study.control.verdict import Verdict, judge
from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.storage import open_storage, study_names
from bilora_ray.search.study.studies import finalists_of, has_begun, load_study, open_study
from bilora_ray.search.study.view import FINALISTS, StudyView, search_of

# What the finalists' study keeps of the test rows: run -> metrics.
TESTED = "tested"
# Of the finalists' seeds among what a study's seed decides: trials draw by their number.
STREAM = 2**32 - 1


@dataclass(frozen=True)
class Chosen:
    """What a study keeps of its choice.

    Attributes:
        trials: numbers of the search's trials, the best first.
        seeds: of the fresh runs of each.
        asked: `finalists` as the choice was made.
        ended: how many trials of the search had ended.
    """

    trials: tuple[int, ...]
    seeds: tuple[int, ...]
    asked: int
    ended: int


@dataclass(frozen=True)
class Finals:
    """What there is to say of the finalists of a search.

    Attributes:
        study: their own.
        verdict: what their runs say; None before all have ended.
        winner: the run of the winner whose adapter is taken; None before that.
        test: the metrics of that adapter on the test rows, measured once; empty before that, or without such rows.
    """

    study: StudyView
    verdict: Verdict | None
    winner: TrialRecord | None
    test: Mapping[str, float] = field(default_factory=dict)


def name_of(study: str) -> str:
    """The study of the finalists of `study`."""
    return FINALISTS_OF.format(study)


def check_finalists(space: Space, layout: Layout) -> None:
    """Refuse finalists that cannot be, before anything starts.

    Raises:
        UserError: another study has their name, or they were chosen with another number of trials or seeds.
    """
    wanted, name = space.study.finalists, space.study.name
    if not wanted and (unread := [key for key in TEST_SETTINGS if space.fixed.get(key) is not None]):
        raise UserError(f"trial.{unread[0]}: is read once a winner is found among finalists; give study.finalists")
    names = study_names(layout) if wanted else []
    chosen = chosen_of(load_study(layout, name)) if name in names and has_begun(name, layout) else None
    if wanted and chosen is None and name_of(name) in names and has_begun(name_of(name), layout):
        raise UserError(
            f"study.finalists: a study '{name_of(name)}' exists, which is none of '{name}'; rename this one"
        )
    if chosen is not None and (chosen.asked, len(chosen.seeds)) != (wanted, space.study.finalist_seeds or SEEDS):
        before = f"finalists: {chosen.asked} and finalist_seeds: {len(chosen.seeds)}"
        raise UserError(f"study '{name}': its finalists were chosen with {before}, which stay so")


def chosen_of(study: StudyView) -> Chosen | None:
    """What was chosen in `study`, if anything was."""
    known = study.study.user_attrs.get(FINALISTS)
    return None if known is None else Chosen(**{key: _tuple(value) for key, value in known.items()})


def choose(study: StudyView) -> Chosen:
    """The finalists of a search that has ended, chosen and kept, or as they were; the longer search's beside them."""
    config = study.space.study
    with study.layout.choosing(config.name):
        known, ended = chosen_of(study), sum(trial.state.is_finished() for trial in study.study.get_trials())
        if known is not None and known.ended == ended:
            return known
        before = () if known is None else known.trials
        found = [number for number in by_evidence(study)[: config.finalists] if number not in before]
        seeds = known.seeds if known is not None else _fresh_seeds(study, config.finalist_seeds or SEEDS)
        chosen = Chosen((*before, *found), seeds, config.finalists, ended)
        study.study.set_user_attr(FINALISTS, vars(chosen))
    return chosen


def by_evidence(study: StudyView) -> list[int]:
    """Trials of different settings, the best first, compared after as many training rows.

    Complete ones are in the order of their values. One that was stopped early is before those complete ones that it was
    ahead of after as many rows as it had, but behind each that was ahead of it, and behind whatever is better than
    that: a trial that came late is stopped by a rung whose best are complete by then. One that failed by its settings,
    or breaks a limit, is none of them.
    """
    measured = [trial for trial in study.study.get_trials(deepcopy=False) if trial.intermediate_values]
    trials = [trial for trial in measured if max(trial.constraints.values(), default=0.0) <= 0]
    curves = {trial.number: _curve(study, trial) for trial in trials}
    as_loss, ranks = study.objective.as_loss, {}
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE and trial.value is not None]
    complete = sorted((t for t in complete if t.value == t.value), key=lambda t: (as_loss(t.value or 0.0), t.number))
    for place, trial in enumerate(complete):
        ranks[trial.number] = (place, 1, 0, 0.0)
    for trial in trials:
        if trial.state != TrialState.PRUNED or not curves[trial.number]:
            continue
        rows, own = curves[trial.number][-1]
        others = [_reached(curves[other.number], rows) for other in complete]
        ahead = [place for place, other in enumerate(others) if other is None or other <= own]
        ranks[trial.number] = (max(ahead, default=-1) + 1, 0, -rows, own)
    order = sorted(ranks, key=lambda number: (ranks[number], number))
    settings = {trial.number: _without_seed(trial.params) for trial in trials}
    first = {settings[number]: number for number in reversed(order)}
    return [number for number in order if first[settings[number]] == number]


def space_of(study: StudyView, chosen: Chosen) -> Space:
    """The space of the finalists' study: each chosen trial's settings with each seed, and its own held-out rows."""
    space, params = study.space, [_params(study, number) for number in chosen.trials]
    splits = [space.trial_config(found).resolved_split_seed for found in params]
    # Where seeds are searched, each trial draws rows of its own; else one pins those of all.
    own = not space.names_of("split_seed")
    varied = own and len(set(splits)) > 1
    fixed = {key: value for key, value in space.fixed.items() if key not in ("seed", *TEST_SETTINGS)}
    seeds = ("seed", "split_seed") if own else ("seed",)
    given = {name: part for name, part in space.given.items() if setting_of(name) not in seeds}
    distributions = {name: part for name, part in space.distributions.items() if setting_of(name) != "seed"}
    distributions["seed"] = Choice(choice=chosen.seeds)
    if varied:
        distributions["split_seed"] = Choice(choice=tuple(dict.fromkeys(splits)))
    elif own:
        fixed["split_seed"] = splits[0]
    points: list[dict[str, Value]] = [
        {**space.sampled(found), "seed": seed, **({"split_seed": split} if varied else {})}
        for seed in chosen.seeds
        for found, split in zip(params, splits, strict=True)
    ]
    name, asked = (
        name_of(space.study.name),
        space.study.model_dump(include={"project", "seed", "max_concurrent", "max_disk_gb"}),
    )
    plain = {"name": name, "num_trials": len(points), "sampler": "random", "scheduler": "none"}
    config = build(StudyConfig, {**asked, **plain}, f"study '{name}'")
    return replace(
        space, study=config, fixed=fixed, distributions=distributions, points_to_evaluate=tuple(points), given=given
    )


def begin(study: StudyView, digests: Mapping[str, str]) -> tuple[Space, bool] | None:
    """Choose the finalists of a search that has ended, and make their study.

    Returns:
        Their space, and whether their study has begun; None where no trial of the search tells anything.
    """
    chosen = choose(study)
    if not chosen.trials:
        return None
    space = space_of(study, chosen)
    open_study(space, study.layout, digests).release()
    return space, has_begun(space.study.name, study.layout)


def finals_of(study: StudyView) -> Finals | None:
    """What is known of the finalists of `study`; None before their study has begun."""
    name, chosen = finalists_of(study.layout, study.space.study.name), chosen_of(study)
    if chosen is None or name is None:
        return None
    return told_by(study, load_study(study.layout, name), chosen)


def winner_of(finals: StudyView) -> TrialRecord | None:
    """Of the study `finals`, which trains finalists, the run whose adapter is taken; None before all have ended."""
    search = search_of(finals.study)
    searched = None if search is None else load_study(finals.layout, search)
    chosen = None if searched is None else chosen_of(searched)
    return None if searched is None or chosen is None else told_by(searched, finals, chosen).winner


def told_by(study: StudyView, finals: StudyView, chosen: Chosen) -> Finals:
    """As `finals_of`, of the study `finals` of what was `chosen` in `study`."""
    runs = {number: _runs(study, finals, number, chosen) for number in chosen.trials}
    if not finals.finished():
        return Finals(finals, None, None)
    scores = {number: [_value(run) for run in found] for number, found in runs.items()}
    verdict = judge({number: _single(study, number) for number in chosen.trials}, scores, study.objective)
    winner = None if verdict is None else runs[verdict.winner.trial][verdict.winner.median_seed]
    if winner is None:
        return Finals(finals, None, None)
    tested = finals.study.user_attrs.get(TESTED, {})
    return Finals(finals, verdict, finals.record(winner.number), tested.get(str(winner.number), {}))


def keep_test(finals: Finals, metrics: Mapping[str, float]) -> None:
    """Keep what the winner's adapter has on the test rows, so that it is not measured again."""
    assert finals.winner is not None
    name, layout = finals.study.space.study.name, finals.study.layout
    study = optuna.load_study(study_name=name, storage=open_storage(layout))
    with layout.choosing(name):
        tested = study.user_attrs.get(TESTED, {})
        study.set_user_attr(TESTED, {**tested, str(finals.winner.number): dict(metrics)})


def _runs(study: StudyView, finals: StudyView, number: int, chosen: Chosen) -> list[FrozenTrial | None]:
    """The runs of trial `number` of the search, by seed."""
    settings = _without_seed(_params(study, number))
    by_seed: dict[Any, FrozenTrial] = {}
    for run in finals.study.get_trials(deepcopy=False):
        params = {key: value for key, value in run.params.items() if key in study.space.distributions}
        if _without_seed(params) == settings:
            by_seed[run.params.get("seed")] = run
    return [by_seed.get(seed) for seed in chosen.seeds]


def _value(run: FrozenTrial | None) -> float | None:
    """What a run is worth; None where it failed or was ended early: a part of a training is no score."""
    known = run is not None and run.state == TrialState.COMPLETE and run.value is not None and run.value == run.value
    known = known and run is not None and run.user_attrs.get(ENDED_BY) is None
    return run.value if run is not None and known else None


def _single(study: StudyView, number: int) -> float | None:
    record = study.record(number)
    return record.value if record.status is Status.COMPLETE else None


def _fresh_seeds(study: StudyView, count: int) -> tuple[int, ...]:
    """Seeds that no trial of the search has."""
    used = {study.config(trial.number).seed for trial in study.study.get_trials() if trial.state.is_finished()}
    drawn = np.random.SeedSequence([study.space.study.seed, STREAM]).generate_state(count + len(used))
    return tuple(int(seed) for seed in dict.fromkeys(map(int, drawn)) if seed not in used)[:count]


def _curve(study: StudyView, trial: FrozenTrial) -> list[tuple[int, float]]:
    """After how many training rows a trial's best loss so far was what."""
    step_rows = study.space.trial_config(trial.params).step_rows(study.space.resources.workers)
    best, curve = None, []
    for step, value in sorted(trial.intermediate_values.items()):
        best = value if study.objective.is_better(value, best) else best
        if best is not None:
            curve.append((step * step_rows, study.objective.as_loss(best)))
    return curve


def _reached(curve: list[tuple[int, float]], rows: int) -> float | None:
    """The best loss after so many rows; None if it was not measured by then."""
    return next((loss for at, loss in reversed(curve) if at <= rows), None)


def _params(study: StudyView, number: int) -> dict[str, Any]:
    return dict(study.study.get_trials(deepcopy=False)[number].params)


def _without_seed(params: Mapping[str, Any]) -> str:
    return json.dumps({key: value for key, value in params.items() if key != "seed"}, sort_keys=True)


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
