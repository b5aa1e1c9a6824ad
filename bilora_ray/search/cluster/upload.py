"""What a Ray job is sent: a folder, by Ray's own rules, in which every local file of the search must be."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ray._private.ray_constants import RAY_RUNTIME_ENV_IGNORE_GITIGNORE, get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

from bilora_ray.errors import UserError, first_line
from bilora_ray.paths import IMAGE_SUFFIXES, LocalSource, files_of
from bilora_ray.search.space import Space
from bilora_ray.search.space.shipped import shipped_name
from bilora_ray.settings import SOURCES
from bilora_ray.training.data.sources import image_files

# The dashboard refuses a larger request.
LIMIT = 100 * 1024**2
# A zip file has this for each of its files, besides the name, twice; and this at its end.
ENTRY, END = 76, 22
NAMED_FILES = 3
IGNORED = "left out of the upload by a .gitignore or .rayignore"
ELSEWHERE = "on storage that all nodes share, with an absolute path"


@dataclass(frozen=True)
class Upload:
    """A folder as Ray packs it: a zip file, not compressed.

    Attributes:
        folder: absolute, without symbolic links.
        files: what Ray packs of it -> size in bytes.
    """

    folder: Path
    files: dict[Path, int]

    @property
    def size(self) -> int:
        """Of the zip file, in bytes."""
        names = sum(2 * len(os.fsencode(path.relative_to(self.folder))) for path in self.files)
        return sum(self.files.values()) + names + ENTRY * len(self.files) + END

    def holds(self, path: Path) -> bool:
        """Whether a file is sent, all files that a pattern matches, or all of a folder that could be read."""
        is_folder = path.is_dir()
        found = (file for file in files_of(path) if not is_folder or _is_read(file.relative_to(path)))
        return all(file in self.files for file in found)


def _is_read(file: Path) -> bool:
    """Whether a model or data could have a folder's `file`: right in the folder or an image below it, not hidden."""
    hidden = any(part.startswith(".") for part in file.parts)
    return not hidden and (len(file.parts) == 1 or file.suffix.lower() in IMAGE_SUFFIXES)


def read_upload(working_dir: Path) -> Upload:
    """What Ray would pack of a folder. UserError if it is none that can be read."""
    if not working_dir.is_dir():
        raise UserError(f"--working-dir {working_dir}: no such folder")
    folder = working_dir.resolve()
    files: dict[Path, int] = {}

    def add(path: Path) -> None:
        if path.is_file():
            files[path] = path.stat().st_size

    try:
        _dir_travel(
            folder,
            [_get_excludes(folder, get_runtime_env_default_excludes())],
            add,
            include_gitignore=os.environ.get(RAY_RUNTIME_ENV_IGNORE_GITIGNORE) != "1",
            logger=logging.getLogger(__name__),
        )
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--working-dir {working_dir}: cannot be read ({first_line(error)})") from None
    return Upload(folder, files)


def check_upload(upload: Upload, space: Space, sources: Sequence[LocalSource]) -> Path | str:
    """Refuse a job that would miss a file, or be refused by Ray for its size.

    Args:
        upload: what would be sent.
        space: the space; its file must be in it.
        sources: the local files that it names; they too.

    Returns:
        The space file, as seen from the uploaded folder; of a shipped space that is not in it the name.

    Raises:
        UserError: what is missing, and why; or what is large.
    """
    space_file = space.path.parent.resolve() / space.path.name
    name = None if space_file in upload.files else shipped_name(space.path)
    if name is not None:
        _check_size(upload)
        return name
    if not space_file.is_relative_to(upload.folder):
        raise UserError(f"--space {space.path}: is outside --working-dir {upload.folder}, which is all that a job sees")
    if space_file not in upload.files:
        raise UserError(f"--space {space.path}: is {IGNORED}")
    outside = [source for source in sources if not source.path.is_relative_to(upload.folder)]
    if outside:
        raise UserError(
            f"{_listed(outside)}: outside --working-dir {upload.folder}; move it there, or put it {ELSEWHERE}"
        )
    missing = [source for source in sources if not upload.holds(source.path)]
    if missing:
        raise UserError(f"{_listed(missing)}: {IGNORED}; take it out of that file, or put it {ELSEWHERE}")
    for source in sources:
        _check_images(upload, space, source)
    _check_size(upload)
    return space_file.relative_to(upload.folder)


def _check_images(upload: Upload, space: Space, source: LocalSource) -> None:
    """Refuse a table that names images by relative paths, of which one is not sent. Absolute ones are the cluster's."""
    setting = source.where.rpartition(".")[2]
    for image in image_files(str(source.path), space.first_config(), setting) if SOURCES[setting] == "data" else ():
        path = Path(os.path.normpath(image))
        is_relative = ".." in image.parts or image.is_relative_to(upload.folder)
        if is_relative and path.is_file() and path not in upload.files:
            cure = f"put it below --working-dir {upload.folder}, or the table and its images {ELSEWHERE}"
            raise UserError(f"{source.where}: {source.name}: the image {path} is outside the upload or ignored; {cure}")


def _listed(sources: Sequence[LocalSource]) -> str:
    return ", ".join(f"{source.where}: {source.name}" for source in sources)


def _check_size(upload: Upload) -> None:
    if upload.size < LIMIT:
        return
    largest = sorted(upload.files.items(), key=lambda item: -item[1])[:NAMED_FILES]
    names = ", ".join(f"{path.relative_to(upload.folder)} ({_mebibytes(size)})" for path, size in largest)
    raise UserError(
        f"--working-dir {upload.folder}: {_mebibytes(upload.size)} to upload, and Ray takes less than "
        f"{_mebibytes(LIMIT)}; the largest are {names}: name them in .rayignore, or put them {ELSEWHERE}"
    )


def _mebibytes(size: int) -> str:
    return f"{size / 1024**2:.1f} MiB"
