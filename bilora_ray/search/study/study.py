"""The study database is the truth: which trials there are, what each was given, how each ended.

An Optuna study in one storage holds it. Tune and MLflow follow. A trial that is RUNNING there while no process has a
claim to it was interrupted; it is handed out again, under its own number, before any new one is asked for.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

import optuna
from optuna.samplers import RandomSampler
from optuna.trial import FrozenTrial, Trial, TrialState

from bilora_ray.errors import MachineError
from bilora_ray.records import Observer, Status, TrialRecord, is_last
from bilora_ray.search.space import Space
from bilora_ray.search.study.claims import Claims
from bilora_ray.search.study.control import disk
from bilora_ray.search.study.control.budget import Budget
from bilora_ray.search.study.control.causes import common_cause
from bilora_ray.search.study.control.evaluations import ENDED_BY, best_values, evaluations_of, excesses, remember
from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.looks import look_again, one_look
from bilora_ray.search.study.population.population import Population
from bilora_ray.search.study.samplers import propose
from bilora_ray.search.study.schedulers import OF_SEVERAL, SCHEDULERS
from bilora_ray.search.study.schedulers.base import Asked
from bilora_ray.search.study.schedulers.rungs import reached
from bilora_ray.search.study.steering.requests import STOP
from bilora_ray.search.study.view import ENDED, ERROR, MADE_WITH, STOPPED, THREADS, StudyView
from bilora_ray.training.folder import EXAMPLES

# So long the workers of a stopped trial may take to end.
STOP_WAIT_S = 10.0
# How often a search that has nothing to do asks whether the others have ended.
POLL_S = 2.0


class SearchStudy(StudyView):
    """One study that is run: proposes settings, remembers results, decides on early stops.

    Args:
        study: the Optuna study.
        space: what is searched.
        layout: where the trials' folders are.

    Attributes:
        budget: what the search may use.
        full: why no trial was begun when one was asked for last, if the disk was why.
    """

    def __init__(self, study: optuna.Study, space: Space, layout: Layout) -> None:
        super().__init__(study, space, layout)
        self.full: MachineError | None = None
        self._live: dict[int, Trial] = {}
        self._stopped: set[int] = set()
        self._claims = Claims(layout, study.study_name)
        self.budget = Budget(study, space, self.objective, self.folder, alone=layout.study_database is None)
        self._population = Population(self) if space.study.scheduler == "pbt" else None
        self._asked_before = study.user_attrs.get(STOP)

    def adopt(self) -> None:
        """Give trials that died while they were sampled the rest of their settings, before anything reads them."""
        with self.layout.choosing(self.study.study_name):
            for number in self._orphans():
                propose(self.study, self.space, number)
                self._claims.release(number)
        for trial in self.trials(*ENDED):  # whose search may have died before it did, or before `settle`
            self.folder(trial.number).discard_tensors()
        disk.finish(self)
        disk.trim(self)

    def next_trials(self) -> list[int]:
        """The numbers of the trials to run together next; none when all are given.

        Today that is one: an interrupted one if there is any, else a new one. It is this process's until it ends, or
        `release`.
        """
        with self._choosing():
            number = next(self._orphans(), None)
            ended = self.budget.end(begins=number is None)
            begins = number is None and ended is None and not self._all_given()
            self.full = disk.full(self) if begins else None
            if begins and self.full is None:
                if self._population is not None:
                    self._population.fill_place()
                # What `propose` samples is decided by the number, so this sampler has nothing to say.
                self.study.sampler = RandomSampler(seed=0)
                number = self.study.ask().number
                self._claims.take(number)
            if number is not None:
                self._live[number] = propose(self.study, self.space, number)
                if self._population is not None:
                    self._population.hand_on(number)
        return [] if number is None else [number]

    def await_others(self, observer: Observer, say: Callable[[str], None]) -> bool:
        """Wait while other processes run all that is left.

        Args:
            observer: hears of the trials that have ended.
            say: shows a person, once, that this process waits.

        Returns:
            Whether one of them died, so that there is a trial to go on with.
        """
        told: set[int] = set()
        waits = False
        while True:
            ended = {trial.number: trial for trial in self.trials(*ENDED)}
            for number in ended.keys() - told:
                observer.trial_ended(self._record(ended[number]))
            told.update(ended)
            if self.finished():
                return False
            if self.asked_to_stop():
                raise KeyboardInterrupt
            with self.layout.choosing(self.study.study_name):
                for number in self._orphans():
                    self._claims.release(number)
                    return True
            running = len(self.trials(TrialState.RUNNING))
            if running and not waits:
                waits = True
                say(f"waiting for other searches: they run {running} of the trials")
            time.sleep(POLL_S)

    def own_records(self) -> list[TrialRecord]:
        """All trials but those that other processes run, and track."""
        ours = self.interrupted() | self._live.keys()
        return [record for record in self.records() if record.status is not Status.RUNNING or record.number in ours]

    def elsewhere(self) -> set[int]:
        """The running trials that are other processes'."""
        ours = self.interrupted() | self._live.keys()
        return {trial.number for trial in self.trials(TrialState.RUNNING)} - ours

    def in_hand(self) -> list[int]:
        """The running trials that are this process's."""
        return sorted(self._live)

    def keep_made_with(self, made_with: Mapping[str, str]) -> None:
        """Keep with which versions and on what machine the study is searched, in place of those before."""
        self.study.set_user_attr(MADE_WITH, dict(made_with))

    def keep_threads(self, choose: Callable[[int | None], int]) -> None:
        """Keep how many threads `choose` takes, which hears how many there were at the study's begin."""
        begun_with = self.study.user_attrs.get(THREADS)
        used = choose(begun_with)
        if begun_with is None:
            self.study.set_user_attr(THREADS, used)

    def settle(self) -> None:
        """Wait until nobody writes to the trials that were stopped here, and free what they have written since.

        The workers of a trial that has several go on while they wait to hear of its end.
        """
        while self._stopped:
            number = self._stopped.pop()
            folder = self.folder(number)
            # TimeoutError is an OSError; and the storage may be away.
            with suppress(OSError), folder.lock(STOP_WAIT_S):
                folder.discard_tensors()
                folder.discard_unfinished()
                if self.record(number).removed:
                    folder.discard_adapters()

    def discard_examples(self) -> None:
        """Free the disk of the tokenized rows of large data, once no trial will ask for them; more trials make anew.

        So it is with the checkpoints that trials have lent.
        """
        shutil.rmtree(self.layout.trials(self.study.study_name) / EXAMPLES, ignore_errors=True)
        shutil.rmtree(self.layout.lent(self.study.study_name), ignore_errors=True)

    def release(self) -> None:
        """Leave the running trials of this process to whoever asks for them next."""
        self._live.clear()
        self._claims.release()

    def report(self, number: int, metrics: Mapping[str, float]) -> Status:
        """Take in one evaluation of a running trial and say how the trial stands after it.

        Args:
            number: of the trial.
            metrics: `step`, `max_steps` and the study's metrics, at least. An evaluation that the study knows already,
                which a resumed trial tells again, changes nothing.
        """
        with one_look(self.study):
            return self._report(number, metrics)

    def _report(self, number: int, metrics: Mapping[str, float]) -> Status:
        trial = self._live[number]
        step, stored, objectives = int(metrics["step"]), self.trial(number), self.objectives
        known = evaluations_of(stored, objectives)
        if step not in known:
            remember(trial, metrics, objectives)
        self.budget.charge(trial, metrics)
        above, best = excesses(metrics, self.space.study), best_values([*known.values(), metrics], objectives)
        if is_last(metrics) or max(above.values(), default=0) > 0:
            if math.isnan(best[0]):  # which Optuna takes for no result at all
                self.fail(number, f"{self.objective.metric} is nan in every evaluation", by_settings=True)
                return Status.FAILED
            for limit in above.keys() - stored.constraints.keys():
                trial.set_constraint(limit, above[limit])
            if ENDED_BY in stored.user_attrs:  # a search that died as it wrote this; the budget has grown since
                trial.set_user_attr(ENDED_BY, None)
            # To Optuna a trial that breaks a limit is complete: of another state not every sampler learns of it.
            self._end(number, TrialState.COMPLETE, best, by_itself=is_last(metrics))
            return Status.PRUNED if max(above.values(), default=0) > 0 else Status.COMPLETE
        newest = step >= max(known, default=0)
        judged = newest and not math.isnan(best[0])
        asked = Asked(trial, stored.params, metrics, self.space, self.objective, self._choosing)
        if judged and STOP in stored.user_attrs:  # who asked was told that it counts: no scheduler has a say
            return self._end_early(asked, best, by=STOP)
        schedulers = OF_SEVERAL if len(objectives) > 1 else SCHEDULERS
        if newest and schedulers[self.space.study.scheduler](asked):
            self._end(number, TrialState.PRUNED)
            return Status.PRUNED
        if newest and self._population is not None:
            self._population.lend(number, step)
        if judged and (ended := self.budget.end()) is not None:
            return self._end_early(asked, best, by=ended.by)
        return Status.RUNNING

    def asked_to_stop(self) -> bool:
        """Whether somebody has asked, since this process began, that the search stop. Whoever waits asks now and then.

        What the time of the search has ended meanwhile is ended, though no trial reports.
        """
        self.budget.end()
        return self.study.user_attrs.get(STOP) != self._asked_before

    def common_cause(self) -> str | None:
        """Why the last trials have failed, where so many did for one cause that more are not worth it."""
        return common_cause(self.study)

    def fail(self, number: int, error: str, by_settings: bool) -> None:
        """End a trial that cannot go on.

        Args:
            number: of the trial.
            error: the one line that says why.
            by_settings: whether its own settings are why, so that the sampler is to keep away from them: to it they
                are worse than any that were measured, whatever the trial had reached. What a machine did is no
                reason: it does not see such a trial.
        """
        trial = self._live[number]
        trial.set_user_attr(ERROR, error)
        if by_settings:
            trial.set_constraint(ERROR, 1.0)
        self._end(number, TrialState.PRUNED if by_settings else TrialState.FAIL)

    @contextmanager
    def _choosing(self) -> Iterator[None]:
        """In it no other process decides anything for the whole study, and what they decided before is known."""
        with self.layout.choosing(self.study.study_name), one_look(self.study):
            look_again(self.study)
            yield

    def trial(self, number: int) -> FrozenTrial:
        """As `StudyView.trial`, in a look."""
        with one_look(self.study):
            return super().trial(number)

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """As `StudyView.trials`, in a look."""
        with one_look(self.study):
            return super().trials(*states)

    def _all_given(self) -> bool:
        return len(self.trials(TrialState.RUNNING, *ENDED)) >= self.space.study.num_trials

    def _orphans(self) -> Iterator[int]:
        """Running trials that no process had a claim to; each is claimed as it is handed out."""
        for trial in self.trials(TrialState.RUNNING):
            if trial.number in self._live or not self._claims.take(trial.number):
                continue
            look_again(self.study)
            now = self.trial(trial.number)
            if now.state == TrialState.RUNNING and ERROR not in now.constraints:
                yield trial.number
                continue
            if now.state == TrialState.RUNNING:  # whoever ran it died as it was failed by its settings
                self.study.tell(trial.number, state=TrialState.PRUNED)
                self.folder(trial.number).discard_tensors()
            self._claims.release(trial.number)  # it has ended, now or between the question and the claim

    def _end_early(self, asked: Asked, values: list[float], by: str) -> Status:
        """End a trial that counts with what it has reached."""
        now = reached(asked)
        asked.trial.set_user_attr(STOPPED, {now.unit: now.amount})
        asked.trial.set_user_attr(ENDED_BY, by)
        self._end(asked.trial.number, TrialState.COMPLETE, values)
        return Status.COMPLETE

    def _end(self, number: int, state: TrialState, values: list[float] | None = None, by_itself: bool = False) -> None:
        """End a trial. Unless it has ended `by_itself`, its workers may go on until they hear of it."""
        self.study.tell(self._live.pop(number), values=values, state=state)
        if not by_itself:
            self._stopped.add(number)
        self.folder(number).discard_tensors()
        disk.trim(self)
        self._claims.release(number)
