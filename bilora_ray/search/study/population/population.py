"""Who goes on from whose checkpoint, in a study whose scheduler is `pbt`.

A trial that was stopped at a rung leaves a place. The next trial that begins takes it, under a number of its own: it
goes on from the checkpoint that one of the best had written at that rung, with settings near that one's. Checkpoints
are lent from a folder of their own, in which they outlast the parent: of each rung those of the best quarter of a
population, and no others, so that the disk they take is bounded. The files of a checkpoint never change; they are
links wherever the disk has such.

Each step leaves in the study database what the next is decided by, and may be made again: who is killed in between
leaves what the next process goes on with.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
from optuna.trial import FrozenTrial, TrialState

from bilora_ray.errors import MachineError
from bilora_ray.files import atomic_folder, link_files
from bilora_ray.records import Parent
from bilora_ray.search.study.population.lineage import LENT, PARENT, RUNG, newest_rung, parent_of, ranked
from bilora_ray.search.study.population.offspring import changed, offspring
from bilora_ray.search.study.samplers.base import seed_of
from bilora_ray.search.study.schedulers.pbt import SHARE
from bilora_ray.search.study.view import ERROR, STOPPED, StudyView

# What a place draws by, among what is drawn by its number.
STREAM = "population"


class Population:
    """Lends checkpoints and hands them on.

    Args:
        study: that is run.
    """

    def __init__(self, study: StudyView) -> None:
        self._view, self._study, self._space = study, study.study, study.space
        self._lenders = self._space.study.population // SHARE

    def lend(self, number: int, step: int) -> None:
        """Keep the checkpoint of a trial that is among the best at a rung which it has reached at `step`.

        One that is not there any more, or that the disk has no room for, is not lent: others are. Where several
        workers train a trial, they may have gone on and written the next.
        """
        own = self._view.trial(number)
        rung = newest_rung(own)
        if not rung or own.user_attrs[RUNG.format(rung)]["step"] != step or LENT.format(rung) in own.user_attrs:
            return
        with self._view.layout.choosing(self._study.study_name):
            trials = self._study.get_trials(deepcopy=False)
            rivals = self._lending(trials, rung)
            best = [trial.number for trial in ranked([*rivals, own], rung)][: self._lenders]
            if number in best and self._kept(number, step, rung):
                self._study._storage.set_trial_user_attr(own._trial_id, LENT.format(rung), True)
                self._discard_others(rung, {*best, *_awaited(trials, rung)})

    def fill_place(self) -> None:
        """Have the next trial of the study take a place that one has left, unless a person has asked for another.

        Nobody else may be choosing a trial of the study meanwhile.
        """
        trials = self._study.get_trials(deepcopy=False)
        if any(trial.state == TrialState.WAITING for trial in trials):
            return
        taken = {parent.replaces for trial in trials if (parent := parent_of(trial.user_attrs)) is not None}
        for left in trials:
            if left.number in taken or not _was_stopped(left):
                continue
            rung = newest_rung(left)
            most = max(1, min(self._lenders, len(ranked(trials, rung)) // SHARE))
            if best := self._lending(trials, rung)[:most]:
                self._enqueue(left.number, rung, best)
                return

    def hand_on(self, number: int) -> None:
        """Give a trial that goes on from another its checkpoint, unless it has one. MachineError if that cannot be."""
        own = self._view.trial(number)
        parent, folder = parent_of(own.user_attrs), self._view.folder(number)
        if parent is None or folder.latest() is not None:
            return
        inherited = self._view.trial(parent.number).params
        lent = self._lent(parent.rung, parent.number)
        try:
            folder.begin_from(lent, changed(self._space, inherited, own.params))
        except OSError as error:
            raise MachineError(f"trial {number}: cannot go on from {lent} ({error.strerror or error})") from None

    def _enqueue(self, left: int, rung: int, best: list[FrozenTrial]) -> None:
        seed = seed_of(self._space, left, STREAM)
        chosen = best[int(np.random.default_rng(seed).integers(len(best)))]
        told = chosen.user_attrs[RUNG.format(rung)]
        parent = Parent(chosen.number, told["step"], rung, told["seconds"], replaces=left)
        # Made with its attributes in one write: there is no moment at which it is a trial like others.
        self._study.enqueue_trial(offspring(self._space, chosen.params, seed), user_attrs={PARENT: asdict(parent)})

    def _kept(self, number: int, step: int, rung: int) -> bool:
        lent = self._lent(rung, number)
        lent.parent.mkdir(parents=True, exist_ok=True)
        with suppress(OSError), atomic_folder(lent) as unfinished:
            link_files(self._view.folder(number).checkpoint_at(step), unfinished)
        return lent.is_dir()

    def _discard_others(self, rung: int, kept: set[int]) -> None:
        wanted = {self._lent(rung, number) for number in kept}
        for entry in self._lent(rung, 0).parent.iterdir():
            if entry not in wanted:
                shutil.rmtree(entry, ignore_errors=True)

    def _lending(self, trials: list[FrozenTrial], rung: int) -> list[FrozenTrial]:
        """Those whose checkpoints of `rung` may be had, the best first: of a study that had ended there are none."""
        lent = (trial for trial in ranked(trials, rung) if LENT.format(rung) in trial.user_attrs)
        return [trial for trial in lent if self._lent(rung, trial.number).is_dir()]

    def _lent(self, rung: int, number: int) -> Path:
        return self._view.layout.lent(self._study.study_name) / f"rung-{rung:04d}" / f"{number:04d}"


def _was_stopped(trial: FrozenTrial) -> bool:
    return trial.state == TrialState.PRUNED and STOPPED in trial.user_attrs and ERROR not in trial.constraints


def _awaited(trials: list[FrozenTrial], rung: int) -> set[int]:
    """Whose checkpoints of `rung` a trial that has not ended may yet have to be given."""
    parents = (parent_of(trial.user_attrs) for trial in trials if not trial.state.is_finished())
    return {parent.number for parent in parents if parent is not None and parent.rung == rung}
