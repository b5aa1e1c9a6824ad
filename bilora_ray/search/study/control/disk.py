"""What a study takes of the disk, and whose adapters go when that is too much.

What goes is kept in the study's attributes before it goes, so that whoever is killed in between leaves an adapter that
is whole, or one that is not there: the next process of the study ends what was begun. An adapter once passed over is
never wanted again, since trials to come can only push it further down.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from bilora_ray.errors import MachineError
from bilora_ray.records import TrialRecord
from bilora_ray.search.study.looks import look_again
from bilora_ray.search.study.view import ENDED, FINALISTS, REMOVED, StudyView, search_of

GB = 1e9


def used(path: Path) -> int:
    """The bytes of all files below `path`; what vanishes meanwhile, and what cannot be looked at, counts nothing."""
    total = 0
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                total += used(Path(entry.path)) if entry.is_dir(follow_symlinks=False) else _size(entry)
    except OSError:
        return total
    return total


def used_by(study: StudyView) -> int:
    """The bytes of the study's folder."""
    return used(study.layout.study(study.space.study.name))


def trim(study: StudyView) -> None:
    """Remove the adapters that the study need not keep: all but the best, and then the worst of a study too large.

    Those of the best trial, of a finalist, of a front and of a trial that runs stay. So do all runs of finalists: not
    the best of them is taken, and which one is, all together decide.
    """
    config = study.space.study
    if (config.keep_adapters is None and config.max_disk_gb is None) or search_of(study.study) is not None:
        return
    with study.layout.choosing(config.name):
        look_again(study.study)  # another process may have removed some meanwhile
        kept = _kept(study)
        if config.keep_adapters is not None:
            behind = {record.number for record in kept[config.keep_adapters :]}
            removed = [record for record in _not_protected(study, kept) if record.number in behind]
            _remove(study, "keep_adapters", removed)
            kept = [record for record in kept if record not in removed]
        if config.max_disk_gb is not None and used_by(study) > config.max_disk_gb * GB:
            _remove(study, "max_disk_gb", _worst(study, kept, config.max_disk_gb))


def finish(study: StudyView) -> None:
    """End what a process that was killed had begun to remove."""
    for numbers in study.study.user_attrs.get(REMOVED, {}).values():
        for number in numbers:
            study.folder(number).discard_adapters()


def full(study: StudyView) -> MachineError | None:
    """Why no trial may begin, if the study takes more than it may."""
    most, name = study.space.study.max_disk_gb, study.space.study.name
    if most is None or (taken := used_by(study)) <= most * GB:
        return None
    line = f"study '{name}': takes {taken / GB:.2f} GB and max_disk_gb is {most:g}; what is left is to stay"
    return MachineError(f"{line}. Go on with --resume --set study.max_disk_gb=N")


def _kept(study: StudyView) -> list[TrialRecord]:
    """The trials that have ended and have an adapter, the best first."""
    gone = {number for numbers in study.study.user_attrs.get(REMOVED, {}).values() for number in numbers}
    ended = study.study.get_trials(deepcopy=False, states=ENDED)
    records = [study.record(trial.number) for trial in ended if trial.number not in gone]
    return [record for record in study.objective.ranked(records) if record.adapter is not None]


def _not_protected(study: StudyView, kept: list[TrialRecord]) -> list[TrialRecord]:
    """Those of `kept` that may go, the best first."""
    best, chosen = study.objective.best_of(kept), study.study.user_attrs.get(FINALISTS, {}).get("trials", ())
    front = study.study.best_trials if len(study.study.directions) > 1 else ()
    protected = {*chosen, *(trial.number for trial in front), *([best.number] if best else [])}
    return [record for record in kept if record.number not in protected]


def _worst(study: StudyView, kept: list[TrialRecord], most: float) -> list[TrialRecord]:
    """The worst of `kept`, as few as make the study small enough, or all that may go."""
    excess, found = used_by(study) - most * GB, list[TrialRecord]()
    for record in reversed(_not_protected(study, kept)):
        if excess <= 0:
            break
        found.append(record)
        excess -= used(study.folder(record.number).adapters)
    return found


def _remove(study: StudyView, why: str, records: Iterable[TrialRecord]) -> None:
    numbers = [record.number for record in records]
    if not numbers:
        return
    removed = study.study.user_attrs.get(REMOVED, {})
    study.study.set_user_attr(REMOVED, {**removed, why: [*removed.get(why, ()), *numbers]})
    for number in numbers:
        study.folder(number).discard_adapters()


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat(follow_symlinks=False).st_size
    except OSError:
        return 0
