"""One comparison, from a checked file to its last score: entries tuned, all run on fresh seeds, each run scored once.

Each stage is a study, or is kept in one, so that a resume goes on wherever the last process was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from bilora_ray.config import TEST_SETTINGS
from bilora_ray.errors import CommonCause, MachineError, UserError, first_line
from bilora_ray.records import Status, TrialRecord
from bilora_ray.runners.scoring import Scorer
from bilora_ray.search.cluster.cluster import is_own
from bilora_ray.search.cluster.gpus import decided
from bilora_ray.search.comparing.file import STEPS, Comparison, tuned_without_test
from bilora_ray.search.comparing.steps import measured_steps, with_steps
from bilora_ray.search.run import at_once, joined, search
from bilora_ray.search.session import Watch
from bilora_ray.search.space import Space, setting_of
from bilora_ray.search.study.control.comparisons import (
    COMPARISON,
    add_runs,
    begun_parts,
    best_settings,
    check_asked,
    failed_by_settings,
    keep_score,
    note_look,
    run_seeds,
    runs_space,
    scores_of,
    seeds_of,
    steps_of,
    tuning_points,
)
from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.storage import naming_the_database, running_study
from bilora_ray.search.study.studies import check_study, load_study
from bilora_ray.search.study.view import StudyView

# How long a process that is to score is waited for, where all have died: machines may come, or never.
ROOM_S = 600.0


@dataclass(frozen=True)
class Comparing:
    """A comparison that is run.

    Attributes:
        comparison: the checked file, with all that it leaves open.
        layout: where studies are.
        ray_address: Ray cluster; None: one on this machine, for the time of the comparison.
        mlflow_uri: MLflow server or database; None: a SQLite file beside the studies.
        digests: source -> digest of its content.
        watch: makes who shows a study.
        say: shows one line to a person.
        asked: what its studies keep of what was asked for: see `asked_of`.
        steps: of each entry, where that was measured.
    """

    comparison: Comparison
    layout: Layout
    ray_address: str | None
    mlflow_uri: str | None
    digests: Mapping[str, str]
    watch: Watch
    say: Callable[[str], None]
    asked: Mapping[str, Any]
    steps: Mapping[str, int] | None = None

    def search(self, space: Space, resume: bool, label: str) -> StudyView:
        """Run a study of the comparison to its end."""
        objective = space.objectives[0]
        return search(
            space,
            self.layout,
            resume=resume,
            ray_address=self.ray_address,
            mlflow_uri=self.mlflow_uri,
            digests=self.digests,
            watcher=self.watch(
                space.study.num_trials, objective, labels=(label,), has_best=space.study.name != self.comparison.runs
            ),
            part={COMPARISON: {"name": self.comparison.name, "asked": self.asked, "steps": self.steps}},
        )


def asked_of(comparison: Comparison) -> dict[str, Any]:
    """What a resume must ask for too; what each entry searches, its own study knows."""
    config = comparison.config.model_dump(include={"tune", "seeds", "budget", "sharpness_radius"})
    shared = comparison.spaces[comparison.baseline].first_config()
    # No study of trials names the test rows. Of a revision the digest of its rows tells.
    told = shared.model_dump(include={*STEPS, *TEST_SETTINGS} - {"test_revision"})
    return {**config, **told, "baseline": comparison.baseline, "methods": sorted(comparison.spaces)}


def check_begun(
    comparison: Comparison, layout: Layout, digests: Mapping[str, str], resume: bool, more: int | None
) -> StudyView | None:
    """Refuse to begin a comparison that exists, or to resume one that does not or was another.

    Args:
        comparison: the checked file.
        layout: where studies are.
        digests: source -> digest of its content, now.
        resume: whether it shall go on.
        more: with so many seeds more; None: with those that it has.

    Returns:
        The study of its runs, if they have begun.

    Raises:
        UserError: that; or a study of another origin has the name of one of its studies.
    """
    names = [*(space.study.name for space in comparison.spaces.values()), comparison.runs]
    with naming_the_database(layout, then=""):
        begun = begun_parts(layout, names, comparison.name)
        if begun and not resume:
            line = f"comparison '{comparison.name}' exists in {layout.database}"
            raise UserError(f"{line}: go on with --resume, or give this one another name")
        # Who was interrupted while steps were measured has a folder, and no study yet.
        if resume and not begun and not layout.study(names[0]).is_dir():
            raise UserError(f"comparison '{comparison.name}': nothing to resume in {layout.database}")
        for study in begun.values():
            check_asked(study, asked_of(comparison))
        steps = steps_of(begun.values())
        comparison = comparison if steps is None else with_steps(comparison, steps)
        for space in filter(lambda one: one.study.name in begun, comparison.spaces.values()):
            check_study(tuned_without_test(space), layout, resume=True, digests=digests)
        runs = begun.get(comparison.runs)
        if more is not None and runs is None:
            raise UserError(f"--extend {more}: comparison '{comparison.name}' has no run yet; go on with --resume")
        return runs


def compare(comparing: Comparing, more: int | None = None) -> StudyView:
    """Run a comparison to its end, or go on with it.

    Args:
        comparing: what, and where.
        more: so many seeds more than it has.

    Returns:
        The study of its runs. Entries of which no trial of the tuning is complete have none.

    Raises:
        UserError: as `search`; or none of the baseline's trials is complete, or of all but one entry none is; or the
            study database is gone.
        KeyboardInterrupt: as `search`.
    """
    with naming_the_database(comparing.layout), ExitStack() as stack:
        began = False

        def begin(space: Space) -> None:
            nonlocal began
            if not began:
                stack.enter_context(joined(space, comparing.layout, comparing.ray_address))
                began = True

        comparing = _of_one_precision(comparing, begin)
        if comparing.comparison.config.budget == "seconds":
            comparing = _of_equal_seconds(comparing, begin)
        tuned = {entry: _tuned(comparing, entry, space, begin) for entry, space in comparing.comparison.spaces.items()}
        runs = _run(comparing, tuned, begin, more)
        _score(comparing, runs, begin)
        return load_study(comparing.layout, comparing.comparison.runs)


def _of_one_precision(comparing: Comparing, begin: Callable[[Space], None]) -> Comparing:
    """The same with the precision that all of its trials compute in: decided once, whichever machines come later.

    What has begun has it, and what has not has that of the others: see `preflight.pinned`.
    """
    spaces = comparing.comparison.spaces
    auto = {entry: space for entry, space in spaces.items() if space.fixed.get("precision") == "auto"}
    if not auto:
        return comparing
    first = next(iter(auto.values()))
    begin(first)
    precision = decided(first, is_own(comparing.ray_address)).fixed["precision"]
    if first.resources.gpus_per_worker:
        comparing.say(f"precision: auto is {precision} on these GPUs, for all trials")
    known = {entry: replace(space, fixed={**space.fixed, "precision": precision}) for entry, space in auto.items()}
    return replace(comparing, comparison=comparing.comparison.mapped({**spaces, **known}))


def _of_equal_seconds(comparing: Comparing, begin: Callable[[Space], None]) -> Comparing:
    """The same with as many steps of each entry as take equal seconds, as measured when the comparison began."""
    comparison = comparing.comparison
    names = [space.study.name for space in comparison.spaces.values()]
    steps = steps_of(begun_parts(comparing.layout, names, comparison.name).values())
    if steps is None:
        space = comparison.spaces[comparison.baseline]
        with running_study(comparing.layout, space.study.name):
            begin(space)
            count = at_once(space, comparing.say) * space.resources.workers
            steps = measured_steps(comparison, count, comparing.say)
    return replace(comparing, comparison=with_steps(comparison, steps), steps=steps)


def _tuned(comparing: Comparing, entry: str, space: Space, begin: Callable[[Space], None]) -> StudyView:
    """The study that tunes an entry, which has ended."""
    comparison, layout = comparing.comparison, comparing.layout
    space, name = tuned_without_test(space), space.study.name
    most = max(len({*map(setting_of, one.distributions)}) for one in comparison.spaces.values())
    points = tuning_points(space, comparison.config.tune, most, comparison.searched_by_all)
    space = replace(space, points_to_evaluate=points)
    place = f"{[*comparison.spaces].index(entry) + 1} of {len(comparison.spaces)}"
    searched = ", ".join(dict.fromkeys(map(setting_of, space.distributions)))
    label = f"{entry} ({place}): {comparison.config.tune} trials over {searched}"
    while (found := _begun(comparing, name)) is None or not found.finished():
        begin(space)
        try:
            comparing.search(space, found is not None, label)
        except CommonCause:
            # What its settings do to all of its trials is what there is to know of it.
            if not failed_by_settings(load_study(layout, name)):
                raise
        except MachineError:
            raise
        except UserError as error:
            raise UserError(f"methods.{entry}: {error}") from None
    return found


def _begun(comparing: Comparing, name: str) -> StudyView | None:
    """The study `name` of the comparison, if it has begun."""
    return begun_parts(comparing.layout, [name], comparing.comparison.name).get(name)


def _run(
    comparing: Comparing, tuned: Mapping[str, StudyView], begin: Callable[[Space], None], more: int | None
) -> StudyView:
    """The study of the runs, which has ended."""
    comparison, layout = comparing.comparison, comparing.layout
    begun = _begun(comparing, comparison.runs)
    settings = {entry: best_settings(study) for entry, study in tuned.items()}
    known = {entry: found for entry, found in settings.items() if found is not None}
    _check_known(comparing, tuned, known)
    before = 0 if begun is None else seeds_of(begun)
    if more is not None and begun is not None and begun.finished():
        note_look(layout, comparison.runs, before)
    count = before + more if more is not None else max(before, comparison.config.seeds)
    space = comparison.spaces[comparison.baseline]
    used = {study.config(record.number).seed for study in tuned.values() for record in study.records()}
    seeds = run_seeds(comparison.config.seed, count, used)
    runs = runs_space(next(iter(tuned.values())).space, comparison.runs, known, seeds)
    if begun is not None and before == count and begun.finished():
        return begun
    begin(space)
    if begun is not None:
        add_runs(layout, runs)
    label = f"runs: {', '.join(known)}, each with its best settings on {count} fresh seeds"
    comparing.search(runs, begun is not None, label)
    return load_study(layout, comparison.runs)


def _check_known(comparing: Comparing, tuned: Mapping[str, StudyView], known: Mapping[str, Any]) -> None:
    """Tell of entries that have no settings to run. UserError if without them there is nothing to compare."""
    baseline = comparing.comparison.baseline
    for entry in tuned.keys() - known.keys():
        line = f"{entry}: none of its {len(tuned[entry].records())} trials is complete"
        line += f"; `bilora-ray show {tuned[entry].space.study.name}` says how each ended"
        if entry == baseline:
            raise UserError(f"{line}; the others are compared with it")
        comparing.say(f"Note: {line}; it has no runs")
    if len(known) < 2:
        raise UserError(f"comparison '{comparing.comparison.name}': {baseline} alone has a trial that is complete")


def _score(comparing: Comparing, runs: StudyView, begin: Callable[[Space], None]) -> None:
    """Score each run that is complete on the test rows, if it was not, and keep that."""
    layout, name = comparing.layout, comparing.comparison.runs
    known = scores_of(runs)
    left = [
        record
        for record in runs.records()
        if record.status is Status.COMPLETE and record.adapter is not None and record.number not in known
    ]
    if not left:
        return
    begin(runs.space)
    with running_study(layout, name):
        count = min(len(left), at_once(runs.space, comparing.say))
        comparing.say(f"scoring {len(left)} adapters on the test rows, each once")
        failed = _scored(comparing, runs, left, count)
    if failed:
        number, why = next(iter(failed.items()))
        comparing.say(f"Note: {len(failed)} runs could not be scored, such as {number} ({why}); --resume tries again")


def _scored(comparing: Comparing, runs: StudyView, left: Sequence[TrialRecord], count: int) -> dict[int, str]:
    """Have `count` processes score the runs that are `left`; those that could not be, with why."""
    resources, layout = runs.space.resources, comparing.layout
    room: dict[str, Any] = {"num_cpus": resources.cpus_per_worker, "num_gpus": resources.gpus_per_worker}
    scorer: Any = ray.remote(max_restarts=0, **room)(Scorer)

    def begun() -> Any:
        return scorer.remote(resources.cpus_per_worker, resources.gpus_per_worker)

    free = [begun() for _ in range(count)]
    test, targets = _test(comparing.comparison), _targets(comparing.comparison)
    waiting, failed, running = list(left), dict[int, str](), dict[ray.ObjectRef, tuple[Any, int]]()
    while waiting or running:
        if not (free or running):  # all have died; with a node that is lost its room is gone
            free.append(begun())
            if not ray.wait([free[0].__ray_ready__.remote()], timeout=ROOM_S)[0]:
                why = f"there was no room for a process in {ROOM_S / 60:g} minutes"
                return {**failed, **{record.number: why for record in waiting}}
        while waiting and free:
            record, process = waiting.pop(0), free.pop()
            config = runs.config(record.number)
            settings = {**config.model_dump(), **test, **(targets if config.leaves_model else {})}
            asked = process.score.remote(str(record.adapter), settings, comparing.comparison.config.sharpness_radius)
            running[asked] = process, record.number
        (done,), _ = ray.wait(list(running), num_returns=1)
        process, number = running.pop(done)
        try:
            told = ray.get(done)
        except RayError as error:
            failed[number] = first_line(getattr(error, "cause", None) or error)
            if isinstance(error, RayTaskError):  # else the process has died
                free.append(process)
            continue
        free.append(process)
        if isinstance(told, Exception):
            failed[number] = first_line(told)
        else:
            with naming_the_database(layout):
                keep_score(layout, runs.space.study.name, number, told)
    return failed


def _test(comparison: Comparison) -> dict[str, Any]:
    """The settings that name the test rows."""
    config = comparison.spaces[comparison.baseline].first_config()
    return config.model_dump(include=set(TEST_SETTINGS))


def _targets(comparison: Comparison) -> dict[str, Any]:
    """Of which weights a whole model is measured to be flat: of those that the first entry with an adapter adapts.

    What it is flat in would be more of them else, and its sharpness another measure than the others'.
    """
    configs = (space.first_config() for space in comparison.spaces.values())
    return next((one.model_dump(include={"target_modules"}) for one in configs if not one.leaves_model), {})
