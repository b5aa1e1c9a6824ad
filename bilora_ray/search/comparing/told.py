"""What a comparison found, beside its runs: as JSON, as a picture, on their page, and in their run in MLflow."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

from bilora_ray.errors import first_line
from bilora_ray.evidence.kept import FOLDER, PICTURE, TEXT
from bilora_ray.evidence.outcome import Outcome, as_json
from bilora_ray.files import atomic_file, atomic_folder
from bilora_ray.search.session import tell_result, write_page
from bilora_ray.search.study.view import StudyView
from bilora_ray.words import finite

logger = logging.getLogger(__name__)


def tell_outcome(outcome: Outcome, runs: StudyView, mlflow_uri: str | None, say: Callable[[str], None]) -> Path:
    """Write what came of a comparison into the folder of its runs, unless it is there, and tell MLflow.

    Of what is there MLflow is told again: whoever wrote it may have been killed then, or MLflow did not answer.

    Args:
        outcome: what came of it.
        runs: the study of its runs.
        mlflow_uri: MLflow server or database; None: a SQLite file beside the studies.
        say: shows one line to a person.

    Returns:
        The folder.
    """
    folder = runs.layout.study(runs.space.study.name) / FOLDER
    text = as_text(outcome)
    if not (folder / TEXT).is_file() or (folder / TEXT).read_text(encoding="utf-8") != text:
        with atomic_folder(folder) as unfinished:
            with atomic_file(unfinished / TEXT) as file:
                file.write(text)
            _draw(outcome, unfinished / PICTURE, say)
    write_page(runs, say)
    tell_result(runs, mlflow_uri, dict(_metrics(outcome)), say, files=sorted(folder.iterdir()))
    return folder


def as_text(outcome: Outcome) -> str:
    """The outcome as the text of a JSON file."""
    return json.dumps(finite(as_json(outcome)), indent=2) + "\n"


def _draw(outcome: Outcome, file: Path, say: Callable[[str], None]) -> None:
    try:
        from bilora_ray.evidence.picture import picture

        file.write_bytes(picture(outcome))
    except Exception as error:  # of a chart library: no comparison is lost for a picture
        logger.debug("the picture of a comparison was not drawn", exc_info=True)
        say(f"Note: there is no picture of the comparison ({first_line(error)})")


def _metrics(outcome: Outcome) -> Iterator[tuple[str, float]]:
    """What MLflow draws, by entry, at as many scores: it keeps what it has at a step, and a score may come late."""
    yield "step", float(sum(run.has_score for run in outcome.runs))
    for entry in outcome.entries:
        measured = {outcome.metric: outcome.mean(entry), "step_time_ratio": outcome.step_time_ratio(entry)}
        if (found := outcome.differences.get(entry)) is not None:
            measured |= {"difference": found.mean, "difference_low": found.low, "difference_high": found.high}
            measured |= {"holm_p": found.p_holm}
        yield from ((f"{key}/{entry}", value) for key, value in measured.items() if value is not None)
