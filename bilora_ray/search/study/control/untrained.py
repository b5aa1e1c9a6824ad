"""What a study keeps of its winner beside what needs no training: a baseline, once, and some rows answered by both."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna

from bilora_ray.files import atomic_file
from bilora_ray.records import TrialRecord
from bilora_ray.search.study.control.finalists import finals_of
from bilora_ray.search.study.storage import open_storage
from bilora_ray.search.study.studies import load_study
from bilora_ray.search.study.view import BASELINE, COMPARED, StudyView, decisive, search_of


@dataclass(frozen=True)
class Asked:
    """A winner that is to be compared.

    Attributes:
        study: the search that it has won.
        runs: the study that it is a trial of: the search, or that of its finalists.
        winner: the trial.
        adapter: its folder.
        measured: whether there is no baseline yet, or one of another base or of other rows.
    """

    study: StudyView
    runs: StudyView
    winner: TrialRecord
    adapter: Path
    measured: bool

    @property
    def key(self) -> dict[str, Any]:
        """What the study keeps of whom it has compared."""
        name = self.runs.space.study.name
        return {"study": name, "trial": self.winner.number, "adapter": self.adapter.name}


def to_compare(study: StudyView) -> Asked | None:
    """The winner of a search that has ended, unless it was compared already; None too where no adapter is there.

    Of a search that trains finalists there is a winner once `study` is theirs.
    """
    search = search_of(study.study)
    if search is None and study.space.study.finalists:
        return None
    runs, searched, winner = study, study, None
    if search is not None:
        searched = load_study(study.layout, search)
        finals = finals_of(searched)
        winner = None if finals is None else finals.winner
    if winner is None:
        runs, winner = searched, searched.best()
    if winner is None or winner.adapter is None or not winner.adapter.is_dir():
        return None
    compared, there = searched.study.user_attrs.get(COMPARED, {}), searched.baseline() is not None
    measured = not there or not searched.has_measured(runs.config(winner.number))
    asked = Asked(searched, runs, winner, winner.adapter, measured)
    same = all(compared.get(key) == value for key, value in asked.key.items())
    return None if same and not measured and searched.examples() else asked


def keep(asked: Asked, baseline: Mapping[str, Any] | None, examples: list[dict[str, Any]]) -> None:
    """Keep what a comparison has found; who is killed before the end of this compares again."""
    name, layout = asked.study.space.study.name, asked.study.layout
    with atomic_file(layout.examples(name)) as file:
        json.dump(examples, file, indent=2, ensure_ascii=False)
    study = optuna.load_study(study_name=name, storage=open_storage(layout))
    if baseline is not None:
        study.set_user_attr(BASELINE, dict(baseline))
    study.set_user_attr(COMPARED, {**asked.key, "settings": decisive(asked.runs.config(asked.winner.number))})
