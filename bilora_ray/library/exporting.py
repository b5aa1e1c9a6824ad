"""A trial's adapter, found and taken out of its study: `bilora-ray export` and `Study.export` are this."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bilora_ray.errors import MachineError, UserError, first_line
from bilora_ray.paths import absolute, have_home

if TYPE_CHECKING:
    from bilora_ray.records import TrialRecord
    from bilora_ray.search.study.layout import Layout
    from bilora_ray.search.study.view import StudyView


@dataclass(frozen=True)
class Meant:
    """The trial that a name and a number mean.

    Attributes:
        study: the trial's: of a search with finalists it may be theirs.
        record: the trial.
        notes: what there is to say of the choice.
    """

    study: StudyView
    record: TrialRecord
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Chosen:
    """An adapter that is there.

    Attributes:
        study: the study of its trial: of a search with finalists it may be theirs.
        record: the trial.
        adapter: the folder.
        objectives: the metrics that the trial is judged by.
        origin: study, trial, what it is worth by each metric of the study, and what that is without training.
        notes: what there is to say of the choice.
    """

    study: str
    record: TrialRecord
    adapter: Path
    objectives: Sequence[str]
    origin: Mapping[str, Any]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Exported:
    """What has been written.

    Attributes:
        output: the new folder, absolute.
        merged: whether it holds a merged model.
        origin: study, trial, and what the adapter is worth by each metric of the study.
        notes: what there is to say of it, what servers would refuse among it.
        serve: server -> the command that serves it.
    """

    output: Path
    merged: bool
    origin: Mapping[str, Any]
    notes: Sequence[str]
    serve: Mapping[str, str]


def meant(layout: Layout, study: str, number: int | None, prefer: str | None = None) -> Meant:
    """Trial `number` of a study, or its best.

    Args:
        layout: where the study is.
        study: its name.
        number: the trial's; None: the best, and of a study with finalists the winner's run with the middle score.
        prefer: of several objectives the one by which the trial is the best of the front.

    Raises:
        UserError: there is no such study or trial.
    """
    from bilora_ray.search.study.control.finalists import finals_of
    from bilora_ray.search.study.storage import naming_the_database
    from bilora_ray.search.study.studies import load_study, refuse_trained_anew

    if number is not None and prefer is not None:
        raise UserError("--prefer: --trial names the trial already; leave one out")
    with naming_the_database(layout, then=""):
        found = load_study(layout, study)
        if number is None:
            refuse_trained_anew(found, takes_trial=True)
        finals = finals_of(found) if number is None and prefer is None else None
        if finals is not None and finals.winner is not None:
            return Meant(finals.study, finals.winner)
        notes = [] if finals is None else ["the best single run is taken, for its finalists are not all trained"]
        return Meant(found, found.chosen(number, prefer), notes)


def choose(layout: Layout, study: str, number: int | None, prefer: str | None = None) -> Chosen:
    """The adapter of the trial that is `meant`.

    Raises:
        UserError: as there; or there is no adapter.
    """
    from bilora_ray.search.study.storage import naming_the_database

    have_home()
    one = meant(layout, study, number, prefer)
    with naming_the_database(layout, then=""):
        origin = one.study.origin(one.record)
    return Chosen(
        one.study.space.study.name,
        one.record,
        _adapter_of(one.study, one.record),
        [objective.metric for objective in one.study.objectives],
        origin,
        one.notes,
    )


def write(chosen: Chosen, output: Path, merge: bool, check: bool = True) -> Exported:
    """Copy the adapter to the new folder `output`, or write its base model there with the adapter merged in.

    Args:
        chosen: the adapter.
        output: the folder.
        merge: whether it is merged, which is compared in any case.
        check: whether the copy is loaded and compared with what was trained.

    Raises:
        UserError: something is in `output`; the adapter or its base cannot be read, or their sum cannot be written.
        MachineError: the folder cannot be written.
        RuntimeError: torch's, of a GPU without enough memory.
    """
    from bilora_ray.release.export import check_merges, export_adapter, export_merged
    from bilora_ray.release.servers import advice_on

    check_new(output)
    if merge:
        check_merges(chosen.adapter)
    if merge or check:
        from bilora_ray.quiet import quiet

        quiet()
    folder = absolute(output)
    try:
        if merge:
            lost = export_merged(chosen.adapter, folder, chosen.origin)
        else:
            lost = export_adapter(chosen.adapter, folder, chosen.origin, check)
    except OSError as error:
        raise MachineError(f"--output {output}: cannot be written ({error.strerror or first_line(error)})") from None
    advice = advice_on(chosen.adapter, output, merge)
    return Exported(folder, merge, chosen.origin, [*chosen.notes, *lost, *advice.notes], advice.commands)


def _adapter_of(found: StudyView, record: TrialRecord) -> Path:
    study = found.space.study.name
    adapter = record.adapter or found.folder(record.number).path
    if record.removed:
        again = f"`bilora-ray train --study {study} --trial {record.number} --name NEW` trains it again"
        raise UserError(
            f"study '{study}': the adapter of trial {record.number} was removed by study.{record.removed}; {again}"
        )
    if record.adapter is None and record.value is None:
        raise UserError(f"study '{study}': trial {record.number} has no adapter; it ended before its first evaluation")
    if record.adapter is None or not adapter.is_dir():
        raise UserError(f"study '{study}': the adapter of trial {record.number} is gone; it was in {adapter}")
    return adapter


def check_new(output: Path) -> None:
    """UserError if something is in the folder `output`."""
    try:
        found = output.exists() and any(output.iterdir() if output.is_dir() else [output])
    except OSError as error:
        raise UserError(f"--output {output}: cannot be read ({error.strerror})") from None
    if found:
        raise UserError(f"--output {output}: exists already")
