"""Which adapter is meant where a study is named."""

from __future__ import annotations

from pathlib import Path

from bilora_ray.errors import UserError
from bilora_ray.search.study.layout import Layout


def adapter_of(layout: Layout, study: str, number: int | None) -> Path:
    """The folder of a trial's adapter; without a number that of the best trial, or of the winner of its finalists.

    Raises:
        UserError: there is no such study, it has no such trial, or that has no adapter.
    """
    from bilora_ray.search.study.control.finalists import finals_of
    from bilora_ray.search.study.storage import naming_the_database
    from bilora_ray.search.study.studies import load_study, refuse_finalists

    with naming_the_database(layout, then=""):
        found = load_study(layout, study)
        if number is None:
            refuse_finalists(found)
        record = found.chosen(number)
        finals = finals_of(found) if number is None else None
    if finals is not None and finals.winner is not None:
        study, record = finals.study.space.study.name, finals.winner
    if record.adapter is None or not record.adapter.is_dir():
        raise UserError(f"study '{study}': trial {record.number} has no adapter; `bilora-ray show {study}` says why")
    return record.adapter
