"""A study in Python: what it has found so far, whoever runs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from bilora_ray.errors import MachineError, first_line
from bilora_ray.library.arguments import checked
from bilora_ray.library.exporting import choose, write
from bilora_ray.library.rows import evaluation_rows, trial_rows
from bilora_ray.library.surroundings import importing, left_as_found
from bilora_ray.records import TrialRecord
from bilora_ray.search.study.layout import Layout

if TYPE_CHECKING:
    import pandas as pd

    from bilora_ray.search.study.view import StudyView


class Study:
    """One study, read anew each time that it is asked: it may be running. To read it writes nothing.

    `tune`, `train` and `load_study` make one.

    Args:
        name: the study's.
        layout: where it is.

    Raises:
        UserError: there is no such study.
    """

    def __init__(self, name: str, layout: Layout) -> None:
        self.name = name
        self._layout = layout
        with self._read() as view:
            self.metric = view.objective.metric
            """What its trials are judged by."""
            self.greater_is_better = view.objective.greater_is_better
            """Whether more of that is better."""

    def __repr__(self) -> str:
        return f"<Study '{self.name}' in {self._layout.database}>"

    @property
    def storage_path(self) -> Path:
        """The folder with its trials."""
        return self._layout.storage_path

    @property
    def best(self) -> TrialRecord | None:
        """The best complete trial, and of a study whose finalists are trained the winner; None before there is one.

        Of the runs of a comparison, which are judged together, none is the best.
        """
        from bilora_ray.search.study.control.finalists import finals_of

        with self._read() as view:
            finals = finals_of(view)
            if finals is not None and finals.verdict is not None:
                return view.record(finals.verdict.winner.trial)
            return view.best()

    @checked
    def trial(self, number: int) -> TrialRecord:
        """One trial. UserError if there is none of that number."""
        with self._read() as view:
            return view.chosen(number)

    def trials(self) -> pd.DataFrame:
        """A row a trial, the best first.

        Returns:
            `trial`, `status`, the metrics of its best adapter, the settings that are searched, `step`, `max_steps`,
            `seconds` of training, `parent` (what it goes on from), `error`, `adapter` (its folder).
        """
        import pandas as pd

        with self._read() as view:
            return pd.DataFrame(trial_rows(view))

    def history(self) -> pd.DataFrame:
        """A row an evaluation, in order: `trial` and all that was measured, such as `step` and `eval_loss`."""
        import pandas as pd

        with self._read() as view:
            return pd.DataFrame(evaluation_rows(view))

    @checked
    def export(
        self, output: str | Path, trial: int | None = None, *, prefer: str | None = None, merge: bool = False
    ) -> Path:
        """Copy the best trial's adapter to the new folder `output`: an ordinary PEFT adapter.

        Args:
            output: a folder that is not there yet, or empty.
            trial: another trial's number.
            prefer: of several objectives the metric by which the trial is the best of the front.
            merge: write the base model with the adapter merged in, and its tokenizer, in its place.

        Returns:
            The folder, as an absolute path.

        Raises:
            UserError: there is no such trial or adapter, or something is in `output`.
        """
        chosen = choose(self._layout, self.name, trial, prefer)
        with left_as_found():
            return write(chosen, Path(output), merge).output

    def report(self) -> Path:
        """Write the study's page anew, as `bilora-ray report` does, and say where it is.

        Raises:
            MachineError: it cannot be written.
        """
        file = self._layout.report(self.name)
        with self._read() as view:
            from bilora_ray.report.page import write_report

            try:
                write_report([view], file)
            except OSError as error:
                raise MachineError(f"{file}: cannot be written ({error.strerror or first_line(error)})") from None
        return file

    @contextmanager
    def _read(self) -> Iterator[StudyView]:
        with importing():
            from bilora_ray.search.study.storage import naming_the_database
            from bilora_ray.search.study.studies import load_study

        with naming_the_database(self._layout, then=""):
            yield load_study(self._layout, self.name)
