"""A search, checked and then run: `bilora-ray tune` and `bilora_ray.tune` are this."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from bilora_ray.errors import UserError
from bilora_ray.library.asked import Asked
from bilora_ray.library.spaces import SpaceLike, space_to_search
from bilora_ray.paths import have_home
from bilora_ray.search.space import Space
from bilora_ray.search.study.layout import Layout
from bilora_ray.settings import FACTS

if TYPE_CHECKING:
    from bilora_ray.search.preflight import Checked
    from bilora_ray.search.session import Watch
    from bilora_ray.search.study.study import SearchStudy
    from bilora_ray.training.rehearsal import Rehearsal


@dataclass(frozen=True)
class Search:
    """A search that is checked, and has not begun.

    Attributes:
        space: the study's, with all that its file leaves open.
        asked: how it is to be run.
        checked: what its data say.
    """

    space: Space
    asked: Asked
    checked: Checked


def is_counted(overrides: Sequence[str], asked: Asked) -> bool:
    """Whether the number of trials was given beside the space."""
    return asked.num_trials is not None or any(text.startswith("study.num_trials=") for text in overrides)


def space_of(given: SpaceLike, overrides: Sequence[str], asked: Asked) -> Space:
    """The space of a search, checked in a moment.

    Args:
        given: the space.
        overrides: `key=value` texts on top of it.
        asked: how to search.

    Raises:
        UserError: it is wrong, it leaves nothing to search, or another machine would be used without a secret.
    """
    asked.check()
    if asked.warm_start:
        overrides = (*overrides, f"study.warm_start={json.dumps(list(asked.warm_start))}")
    space = space_to_search(given, overrides, asked.num_trials, asked.max_concurrent)
    have_home()
    return space


def check_search(space: Space, asked: Asked, counted: bool) -> Search:
    """Check the data and the model of a search, before anything starts.

    Args:
        space: what `space_of` has read.
        asked: how to search.
        counted: whether its number of trials was given beside its file.

    Raises:
        UserError: one line that says what is wrong, where, and what is allowed.
    """
    space, asked = _going_on(space, asked, counted)

    from bilora_ray.search.preflight import check_kernels, pinned, preflight

    space = pinned(space, asked.layout if asked.resume else None)
    checked = preflight(space, asked.dry_run)
    # Ray is imported once the data is right.
    from bilora_ray.search.cluster.cluster import is_own

    if is_own(asked.ray_address):
        check_kernels(space, apart=True)
    return Search(space, asked, checked)


def run_search(search: Search, watch: Watch) -> SearchStudy:
    """Run a search that is checked, and the training of its finalists.

    Raises:
        UserError: see `search.run.search`.
        KeyboardInterrupt: of Ctrl-C, or of `bilora-ray stop`, once the trials are stopped and MLflow knows it.
    """
    from bilora_ray.search.cluster.inputs import keep_inputs
    from bilora_ray.search.preflight import chat_notes
    from bilora_ray.search.run import search as run
    from bilora_ray.search.run import search_finalists

    asked, checked = search.asked, search.checked
    notes = (*checked.notes, *chat_notes(checked))
    space, digests = keep_inputs(search.space, checked.digests, asked.layout.storage_path)
    objective = space.first_config().objective
    common: dict[str, Any] = {"ray_address": asked.ray_address, "mlflow_uri": asked.mlflow_uri, "digests": digests}
    watcher = watch(space.study.num_trials, objective, notes, checked.labels)
    study = run(space, asked.layout, resume=asked.resume, watcher=watcher, **common)
    if space.study.finalists:
        note = f"these are the best {space.study.finalists} settings of '{space.study.name}', on fresh seeds"
        search_finalists(study, watcher_of=lambda finals: watch(finals.study.num_trials, objective, (note,)), **common)
    return study


def rehearse(search: Search) -> Rehearsal:
    """Whatever can be tried of a search before it begins, but for a cluster that is elsewhere."""
    from bilora_ray.quiet import quiet
    from bilora_ray.search.cluster.cluster import capacity, check_address, is_own, this_machine
    from bilora_ray.search.cluster.inputs import keep_inputs
    from bilora_ray.search.study.control.finalists import check_finalists
    from bilora_ray.search.study.storage import naming_the_database
    from bilora_ray.search.study.studies import check_study

    space, asked = search.space, search.asked
    kept, digests = keep_inputs(space, search.checked.digests, asked.layout.storage_path, copied=False)
    with naming_the_database(asked.layout, then=""):
        check_study(kept, asked.layout, asked.resume, digests)
        check_finalists(kept, asked.layout)
    check_address(asked.ray_address)
    here = is_own(asked.ray_address)
    if here:
        capacity(space.resources, [this_machine()])
    quiet()
    from bilora_ray.training.rehearsal import rehearse

    configs = [space.first_config()]
    for key in sorted(key for key in space.varied if FACTS[key].rehearsed):
        found = {getattr(config, key): config for config in map(space.trial_config, space.each_value(key))}
        configs += [config for value, config in found.items() if value != getattr(configs[0], key)]
    first, *_ = [rehearse(config, here) for config in configs]
    return first


def _going_on(space: Space, asked: Asked, counted: bool) -> tuple[Space, Asked]:
    """Of a study that goes on, the space as it has it: its trials, and the earlier studies that it began with."""
    if asked.extend is not None:
        if counted:
            raise UserError("--extend: says how many trials more; a number of all of them cannot be given beside it")
        asked = replace(asked, resume=True)
    if asked.resume and not counted:
        space = not_shrunk(space, asked.layout, asked.extend)
    if asked.resume and not space.study.warm_start:
        space = _as_begun(space, asked.layout)
    return space, asked


def _as_begun(space: Space, layout: Layout) -> Space:
    """`space` with the earlier studies that its study began with, which decide nothing any more."""
    from bilora_ray.search.study.studies import warm_start_before

    began = warm_start_before(layout, space.study.name)
    return replace(space, study=space.study.model_copy(update={"warm_start": began}))


def not_shrunk(space: Space, layout: Layout, more: int | None) -> Space:
    """`space` with as many trials as the study was asked for before, if that is more than its file says.

    With `more`, it is so many more than the study was asked for, whatever its file says. UserError if none could begin.
    """
    from bilora_ray.search.study.studies import end_before, num_trials_before

    if more is not None and (end := end_before(space, layout)) is not None:
        key = end.partition(":")[0]
        raise UserError(f"--extend {more}: study '{space.study.name}' ended by {end}; give it another {key}")
    before = num_trials_before(layout, space.study.name)
    num_trials = max(space.study.num_trials, before) if more is None or not before else before + more
    return replace(space, study=space.study.model_copy(update={"num_trials": num_trials}))
