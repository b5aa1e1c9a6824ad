"""Files that came with a Ray job, kept beside its study: a job's own folder goes when the cluster does."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bilora_ray.digests import MARKS
from bilora_ray.errors import UserError
from bilora_ray.paths import files_of, root
from bilora_ray.search.space import Space
from bilora_ray.settings import SOURCES
from bilora_ray.training.data.sources import image_files

# Where Ray unpacks what a job was sent; the name follows the content of all of it.
JOB_FOLDER = re.compile(r"/_ray_pkg_[0-9a-f]+/")
DIGEST_LENGTH = 16


def keep_inputs(
    space: Space, digests: Mapping[str, str], storage_path: Path, copied: bool = True
) -> tuple[Space, dict[str, str]]:
    """Copy the model and data files that came with this job into the storage path, and the images that tables name.

    The copy is named after its content, so a job that resumes the study, on another cluster and with other files
    beside them, finds them under the same path, and so does whoever takes an adapter later.

    Args:
        space: the space, with absolute sources.
        digests: source -> digest of its content.
        storage_path: a folder that all nodes share.
        copied: whether they are copied; else nothing is written, and a copy may be there or not.

    Returns:
        Both, with the paths of the copies.

    Raises:
        UserError: the storage path cannot be written.
    """

    config, copies = space.first_config(), dict[str, str]()

    def kept(key: str, value: Any) -> Any:
        if key not in SOURCES or not isinstance(value, str) or not JOB_FOLDER.search(value):
            return value
        if value not in copies:
            images = image_files(value, config, key) if SOURCES[key] == "data" else []
            copies[value] = str(_copy(Path(value), images, storage_path / "inputs", copied))
        return copies[value]

    try:
        space = space.mapped(kept)
        kept_digests = {
            mark + copies.get(name := source.removeprefix(mark), name): digest
            for source, digest in digests.items()
            for mark in [next(filter(source.startswith, MARKS.values()), "")]
        }
    except OSError as error:
        raise UserError(f"--storage-path {storage_path}: cannot be written ({error.strerror})") from None
    return space, kept_digests


def _copy(source: Path, images: Iterable[Path], inputs: Path, copied: bool) -> Path:
    """The copy of a file, of a folder, or of all that a pattern matches, below the folder in which that begins.

    The `images` of a table that came with the job are as far from it as they were.
    """
    named = (Path(os.path.normpath(image)) for image in images)
    files = sorted({*files_of(source), *(image for image in named if JOB_FOLDER.search(str(image)))})
    base = Path(os.path.commonpath([root(source), *(file.parent for file in files)]))
    target = inputs / _digest(files, base)
    if copied and not target.is_dir():
        inputs.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=inputs) as scratch:
            fresh = Path(scratch, target.name)
            fresh.mkdir()
            for file in files:
                copy = fresh / file.relative_to(base)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)
            try:
                fresh.rename(target)
            except OSError:
                if not target.is_dir():  # else another job has just made the same
                    raise
    return target / source.relative_to(base)


def _digest(files: Iterable[Path], base: Path) -> str:
    """Of the names and the content of all `files`."""
    whole = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        whole.update(f"{path.relative_to(base)}\0{content}\0".encode())
    return whole.hexdigest()[:DIGEST_LENGTH]
