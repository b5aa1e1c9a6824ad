"""What a page says of a study, read once: everything else of this room is a function of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from bilora_ray.evidence.kept import Kept, kept_in
from bilora_ray.records import Objective, Status, TrialRecord
from bilora_ray.search.space import Space, setting_of
from bilora_ray.search.study.control.disk import used_by
from bilora_ray.search.study.control.finalists import Finals, finals_of
from bilora_ray.search.study.control.verdict import Verdict
from bilora_ray.search.study.importances import Importances
from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.steering.copying import written
from bilora_ray.search.study.view import StudyView, compared_in, search_of


@dataclass(frozen=True)
class Found:
    """A study as a page shows it. What is empty or None was not measured, or not kept by the version that wrote it.

    Attributes:
        space: what was searched; its study's name is that of the page.
        layout: where the study is kept.
        objectives: what trials are judged by, the first of which chooses each trial's adapter.
        records: all trials that began, by number.
        front: numbers of those on the Pareto front, the best by the first objective first; none of one objective.
        importances: which settings mattered.
        finals: what fresh seeds said of the best.
        search: the search whose finalists these trials are.
        comparison: the comparison whose runs they are.
        outcome: what that comparison came to, once its runs are scored.
        end: which budget ended the search, one line.
        space_file: the text of a space file that says what was searched.
        disk: bytes of the study's folder.
        seconds: for which the search ran.
        baseline: what is had without training: `kind`, and a metric's value by its name.
        examples: held-out rows: `prompt`, `expected`, `adapter` and `base_model`, all texts.
        made_with: what the study was searched with, by name: versions and hardware.
    """

    space: Space
    layout: Layout
    objectives: Sequence[Objective]
    records: Sequence[TrialRecord]
    front: Sequence[int] = ()
    importances: Importances = field(default_factory=lambda: Importances(None, 0))
    finals: Finals | None = None
    search: str | None = None
    comparison: str | None = None
    outcome: Kept | None = None
    end: str | None = None
    space_file: str = ""
    disk: int = 0
    seconds: float | None = None
    baseline: Mapping[str, Any] = field(default_factory=dict)
    examples: Sequence[Mapping[str, Any]] = ()
    made_with: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The study's."""
        return self.space.study.name

    @property
    def objective(self) -> Objective:
        """The first."""
        return self.objectives[0]

    @property
    def metric(self) -> str:
        """That of the first objective."""
        return self.objective.metric

    @cached_property
    def best(self) -> TrialRecord | None:
        """The best complete trial; None before there is one, and where these are not what is judged."""
        return None if self.trains_anew else self.objective.best_of(self.records)

    @property
    def trains_anew(self) -> bool:
        """Whether known settings are trained on fresh seeds: nothing is searched, and the luckiest run is no best."""
        return self.search is not None or self.comparison is not None

    @property
    def verdict(self) -> Verdict | None:
        """Who wins among the finalists, once that is known."""
        return None if self.finals is None else self.finals.verdict

    @cached_property
    def chosen(self) -> TrialRecord | None:
        """The trial that the search comes to: the winner among finalists, or the best."""
        winner = None if self.verdict is None else self.verdict.winner.trial
        return next((record for record in self.records if record.number == winner), self.best)

    @cached_property
    def ranked(self) -> list[TrialRecord]:
        """All trials, those of the front first, then the best first."""
        by_number = {record.number: record for record in self.records}
        rest = (record for record in self.objective.ranked(self.records) if record.number not in self.front)
        return [*(by_number[number] for number in self.front), *rest]

    @cached_property
    def settings(self) -> list[str]:
        """The searched settings, those that mattered first."""
        drawn = dict.fromkeys(map(setting_of, self.space.distributions))
        shares = {setting_of(name): share.share for name, share in self.importances.shares.items()}
        return sorted(drawn, key=lambda key: -shares.get(key, 0.0))

    @property
    def runs(self) -> bool:
        """Whether the search goes on as this is read."""
        return any(record.status is Status.RUNNING for record in self.records)


def read(study: StudyView, ended: Collection[int] = ()) -> Found:
    """All that a page says of `study`.

    Args:
        study: the study.
        ended: trials that are running in the database, and that this process, which has them, runs no more.
    """
    records, end, finals = study.records_now(), study.end(), finals_of(study)
    comparison = compared_in(study.study)
    records = [
        replace(one, status=Status.INTERRUPTED) if one.status is Status.RUNNING and one.number in ended else one
        for one in records
    ]
    found = Found(
        space=study.space,
        layout=study.layout,
        objectives=study.objectives,
        records=records,
        front=[record.number for record in study.front(records)],
        importances=study.importances(),
        finals=finals,
        search=search_of(study.study),
        comparison=comparison,
        outcome=None if comparison is None else kept_in(study.layout.study(study.space.study.name)),
        end=None if end is None else end.line,
        space_file=written(study.space),
        disk=used_by(study),
        seconds=study.seconds,
        examples=study.examples(),
        made_with=study.made_with,
    )
    baseline = None if found.chosen is None else study.baseline_of(study.config(found.chosen.number))
    return replace(found, baseline=baseline or {})
