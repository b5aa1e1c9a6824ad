"""A study, removed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import optuna

from bilora_ray.errors import UserError
from bilora_ray.search.study.control.disk import used
from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.steering.requests import is_searched
from bilora_ray.search.study.storage import running_study
from bilora_ray.search.study.studies import finalists_of, steered_study
from bilora_ray.search.study.view import StudyView


@contextmanager
def none_searches(found: StudyView, layout: Layout) -> Iterator[list[StudyView]]:
    """For the block, no search of the study begins, nor the training of its finalists. UserError if one runs.

    Gives the studies to remove, in their order: that of the finalists, if there is one, is known by the other.
    """
    name = found.study.study_name
    with ExitStack() as stack:
        _keep_from_searching(stack, layout, name)
        finalists = finalists_of(layout, name)
        studies = [found]
        if finalists is not None:
            _keep_from_searching(stack, layout, finalists)
            studies.insert(0, steered_study(layout, finalists, even_if_gone=True))
        if layout.study_database is not None and any(is_searched(one.study, layout) for one in studies):
            raise UserError(f"study '{name}' is being searched by another process; `bilora-ray stop {name}` stops it")
        yield studies


def _keep_from_searching(stack: ExitStack, layout: Layout, name: str) -> None:
    """Nobody searches a study whose folder is gone, and none is made for a lock."""
    if layout.trials(name).is_dir():
        stack.enter_context(running_study(layout, name))


def remove(found: StudyView, layout: Layout) -> int:
    """Remove a study that no process runs, and its folder. Who is killed amid this can ask for it again.

    Returns:
        How many bytes of files are gone; of a database file none, which keeps its size for the next study.
    """
    name = found.study.study_name
    freed = used(layout.study(name))
    # The study's own rows last but for its marks: without them nobody would know what there is to remove.
    if layout.trials(name).is_dir():  # else it was removed by hand, or by who was killed amid this
        shutil.rmtree(layout.trials(name))
    optuna.delete_study(study_name=name, storage=found.study._storage)
    shutil.rmtree(layout.study(name), ignore_errors=True)
    return freed
