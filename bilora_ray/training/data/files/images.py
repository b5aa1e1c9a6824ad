"""Images as they are stored: found in folders, checked by their headers, and decoded when they are needed.

Nothing here imports torch, and Pillow is imported only where there are images.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bilora_ray.errors import UserError, first_line, refusal
from bilora_ray.paths import IMAGE_SUFFIXES

if TYPE_CHECKING:
    from PIL.Image import Image

# What other programs leave in folders of images.
LEFT_BEHIND = frozenset({"desktop.ini", "thumbs.db"})


@dataclass(frozen=True, slots=True, repr=False)
class StoredImage:
    """An image that is not decoded: as `datasets` has it, a path, or bytes that may have the path that they came from.

    Attributes:
        path: of the file; of bytes only a name, and empty where there is none.
        data: the content of the file, if it is not to be read from `path`.
        where: the place that an error names.
    """

    path: str
    data: bytes | None
    where: str

    def __repr__(self) -> str:
        """What tells it from another image: the path, or the digest of the bytes."""
        return self.path if self.data is None else hashlib.sha256(self.data).hexdigest()

    @property
    def name(self) -> str:
        """What a person calls it."""
        return self.path or self.where


def files_by_label(folder: Path, setting: str) -> dict[str, list[Path]]:
    """The images of `folder`, which has a folder for each label, both in the order of their names.

    Hidden files, what file managers leave behind and the texts beside the folders are passed over.

    Raises:
        UserError: there are none, or a file that is not `folder/label/image`.
    """
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        parts, is_image = path.relative_to(folder).parts, path.suffix.lower() in IMAGE_SUFFIXES
        hidden = path.name.lower() in LEFT_BEHIND or any(part.startswith(".") for part in parts)
        if hidden or path.is_dir() or (len(parts) == 1 and not is_image):
            continue
        if len(parts) != 2:
            hint = _meant(folder, parts)
            raise UserError(f"{setting}: {path} must be in a folder of {folder} that its label names{hint}")
        if not is_image:
            allowed = ", ".join(sorted(IMAGE_SUFFIXES))
            raise UserError(f"{setting}: {path} is among images and has the suffix of none; allowed: {allowed}")
        found.setdefault(parts[0], []).append(path)
    if not found:
        raise UserError(f"{setting}: no images in {folder}; each must be in a folder that its label names")
    return found


def _meant(folder: Path, parts: tuple[str, ...]) -> str:
    """What may have been meant where `parts` lead to an image: a split that is in `folder`, or its table of images."""
    if len(parts) > 2:
        return f"; did you mean {folder / parts[0]}?"
    tables = sorted(folder.glob("metadata.*"))
    return f"; did you mean {tables[0]}, with image_column: file_name?" if tables else ""


def beside(folder: Path, value: Any) -> Any:
    """`value` of an image's column, its path made absolute: a relative one starts at `folder`."""
    if isinstance(value, str) and value:
        return str(folder / Path(value).expanduser())
    if isinstance(value, dict) and value.get("bytes") is None and isinstance(value.get("path"), str):
        return {**value, "path": beside(folder, value["path"])}
    return value


def stored(value: Any, where: str) -> StoredImage:
    """The image that a column holds, once its header can be read.

    Args:
        value: a path, bytes, or both as `datasets` stores them.
        where: the place that an error names.

    Raises:
        UserError: it is nothing of that; there is no such file, or it is no image; Pillow is not installed.
        MachineError: the file cannot be read now.
    """
    path, data = (value.get("path"), value.get("bytes")) if isinstance(value, dict) else (value, None)
    if isinstance(path, bytes):
        path, data = None, path
    if not (isinstance(path, str) and path) and not isinstance(data, bytes):
        raise UserError(f"{where}: must be an image or the path of one, not {type(value).__name__}")
    image = StoredImage(path or "", data, where)
    with _opened(image) as found:
        if found.mode.startswith(("I", "F")):
            raise UserError(f"{_place(image)} has pixels of more than 8 bits (mode {found.mode}); convert it to 8 bits")
    return image


def pixels(image: StoredImage) -> Image:
    """The image in RGB, decoded and upright: of several frames the first, without its transparency.

    That is what `transformers.image_utils.load_image` makes of it, so that who uses the model sees the same.

    Raises:
        UserError: it cannot be decoded.
        MachineError: its file cannot be read now.
    """
    from PIL import ImageOps

    with _opened(image) as found:
        return ImageOps.exif_transpose(found).convert("RGB")


@contextmanager
def _opened(image: StoredImage) -> Iterator[Image]:
    """The image with its header read. What cannot be read is one line."""
    try:
        from PIL import Image
    except ImportError:
        raise UserError("task: images need the package Pillow: pip install 'bilora-ray[images]'") from None
    try:
        with Image.open(image.path if image.data is None else io.BytesIO(image.data)) as found:
            yield found
    except UserError:
        raise
    # A broken file raises what its format's reader stumbles over.
    except Exception as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else first_line(error)
        raise refusal(f"{_place(image)} cannot be read as an image ({reason})", error) from error


def _place(image: StoredImage) -> str:
    return f"{image.where}: the image {image.path}".rstrip() if image.path != image.where else image.path
