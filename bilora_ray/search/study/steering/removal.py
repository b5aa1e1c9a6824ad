"""A study, removed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna

from bilora_ray.errors import UserError
from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.steering.requests import is_searched
from bilora_ray.search.study.storage import running_study
from bilora_ray.search.study.view import StudyView


@contextmanager
def none_searches(found: StudyView, layout: Layout) -> Iterator[None]:
    """For the block, no search of the study begins. UserError if one runs."""
    name = found.study.study_name
    with running_study(layout, name):
        if layout.study_database is not None and is_searched(found.study, layout):
            raise UserError(f"study '{name}' is being searched by another process; `bilora-ray stop {name}` stops it")
        yield


def remove(found: StudyView, layout: Layout) -> int:
    """Remove a study that no process runs, and its folder. Who is killed amid this can ask for it again.

    Returns:
        How many bytes of files are gone; of a database file none, which keeps its size for the next study.
    """
    name = found.study.study_name
    freed = size_of(layout.study(name))
    # The study's own rows last but for its marks: without them nobody would know what there is to remove.
    shutil.rmtree(layout.trials(name))
    optuna.delete_study(study_name=name, storage=found.study._storage)
    shutil.rmtree(layout.study(name), ignore_errors=True)
    return freed


def size_of(folder: Path) -> int:
    """The bytes of all files in `folder`; 0 where there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
