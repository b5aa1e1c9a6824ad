"""Where a model or data file is, local, built in, or on the Hub: who wants to know asks here."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from glob import glob
from pathlib import Path, PurePath
from typing import Any, Literal

from bilora_ray import builtin
from bilora_ray.errors import UserError, first_line

BUILTIN = "builtin:"
DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".parquet", ".arrow")
COLUMNAR = (".parquet", ".arrow")
TEMPLATE_SUFFIX = ".jinja"
# What a text file that is packed has after its own suffix -> what pyarrow calls that.
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
# What makes a path one that several files can match.
PATTERN = re.compile(r"[*?[]")
# How the files of one folder are told to be parts of a data set that are kept apart for a reason.
SPLITS = re.compile(r"(?<![a-z])(train|training|dev|valid|val|validation|eval|test)(?![a-z])", re.IGNORECASE)
# What people and `datasets` put beside data files, and what is no data though some of it has the suffix.
COMPANIONS = re.compile(
    r"(readme|licen[cs]e)(\.txt|[^.]*)|.*\.(md|rst)|dataset_infos?\.json|state\.json", re.IGNORECASE
)
# What `datasets` writes beside the Arrow files of `save_to_disk`, and beside the folders of several splits.
SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"
IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
COMMIT = re.compile(r"[0-9a-f]{40}")
WEIGHTS = "model.safetensors"
# Files of a model that transformers asks for and that a repository need not have; the cache remembers which it has not.
OPTIONAL = ("tokenizer_config.json", "chat_template.jinja", "adapter_config.json")
# The same, of a model that reads images.
OPTIONAL_OF_IMAGES = ("processor_config.json", "preprocessor_config.json", "adapter_config.json")
Kind = Literal["built in", "local", "hub"]
# A source's name, the folder that relative paths start at, where the name is written, whether it is data -> the source.
Locate = Callable[[str, Path, str, bool], str]


def data_suffix(name: str) -> str:
    """The suffix that says how a data file is read: of `a.csv.gz` it is `.csv`. Empty if none does."""
    path = PurePath(name.lower())
    packed = path.suffix in COMPRESSIONS
    suffix = path.with_suffix("").suffix if packed else path.suffix
    return suffix if suffix in DATA_SUFFIXES and not (packed and suffix in COLUMNAR) else ""


def data_files(path: Path) -> list[Path]:
    """The files of local data, in the order in which they are read.

    Args:
        path: a file; a folder of files of one kind, or of `save_to_disk`; or a pattern as `data/part-*.csv`. What
            is there by that very name goes before a pattern.

    Returns:
        Those of a folder or pattern sorted by name, of a folder without hidden ones and companions; at least one.

    Raises:
        UserError: there are none, the suffix of one is unknown, or those of a folder are of several kinds or splits, or
            not all that it holds.
        OSError: the path cannot be looked at.
    """
    if path.is_dir():
        return _saved(path) if (path / SAVED).is_file() else _of_folder(path)
    found = files_of(path)
    if not found:
        raise UserError(f"no file matches {path}")
    for file in found:
        if not data_suffix(file.name):
            allowed = f"{', '.join(DATA_SUFFIXES)}, and of text {', '.join(COMPRESSIONS)} after it"
            raise UserError(f"{file} has an unknown suffix; allowed: {allowed}")
    return found


def files_of(path: Path) -> list[Path]:
    """All files of a source, sorted: itself, those below a folder, or those that a pattern matches."""
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    if path.exists() or not PATTERN.search(str(path)):
        return [path]
    return sorted(Path(name) for name in glob(str(path), recursive=True) if Path(name).is_file())


def root(path: Path) -> Path:
    """The folder that a source is in, above all that is a pattern."""
    patterns = [] if path.exists() else [part for part in (path, *path.parents) if PATTERN.search(part.name)]
    return (patterns or [path])[-1].parent


def _of_folder(folder: Path) -> list[Path]:
    if (folder / SAVED_SPLITS).is_file():
        folders = sorted(path.parent.name for path in folder.glob(f"*/{SAVED}"))
        raise UserError(f"{folder} holds several splits; name one of its folders: {', '.join(folders)}")
    inside = sorted(path for path in folder.iterdir() if not _is_beside(path))
    files = [path for path in inside if path.is_file() and data_suffix(path.name)]
    if not files:
        folders = [path.name for path in inside if path.is_dir()]
        hint = f"; it holds the folders {', '.join(folders)}" if folders else f" ({', '.join(DATA_SUFFIXES)})"
        raise UserError(f"{folder} is a folder without data files{hint}")
    kinds = sorted({data_suffix(path.name) for path in files})
    if len(kinds) > 1:
        raise UserError(f"{folder} holds files of several kinds; name one, as in {folder}/*{kinds[0]}")
    if names := splits_of(files, folder):
        raise UserError(f"{folder} holds files of several splits ({names}); name one, or a pattern as {folder}/*train*")
    read = set(files)
    if others := [path.name for path in inside if path not in read and (not path.is_dir() or _holds_data(path))]:
        raise UserError(
            f"{folder} holds what is not read ({_first(others)}); name what is, as in {folder}/*{files[0].suffix}"
        )
    return files


def _is_beside(path: Path) -> bool:
    """Whether what lies among data files is hidden, or one of their companions."""
    return path.name[0] in "._" or (path.is_file() and COMPANIONS.fullmatch(path.name) is not None)


def _holds_data(folder: Path) -> bool:
    return any(data_suffix(path.name) and path.is_file() and not _is_beside(path) for path in folder.rglob("*"))


def splits_of(files: Sequence[Path], folder: Path) -> str:
    """A name for each split that files below a `folder` are called after, or their folders; empty where all are of one.

    What is called after none is apart from what is.
    """
    found: dict[frozenset[str], str] = {}
    for name in (path.relative_to(folder).as_posix() for path in files):
        found.setdefault(frozenset(word.lower() for word in SPLITS.findall(name)), name)
    return _first(list(found.values())) if len(found) > 1 else ""


def _first(names: Sequence[str]) -> str:
    return ", ".join([*names[:4], *["..."] * (len(names) > 4)])


def _saved(folder: Path) -> list[Path]:
    """The Arrow files that `datasets.Dataset.save_to_disk` wrote, in their order."""
    try:
        return [folder / file["filename"] for file in json.loads((folder / SAVED).read_text())["_data_files"]]
    except (ValueError, LookupError, TypeError):
        raise UserError(f"{folder}: {SAVED} does not say which Arrow files there are") from None


def kind_by_name(name: str, is_data: bool) -> Kind:
    """Where the `name` of a source says that it is, whatever is on this machine."""
    if name.startswith(BUILTIN):
        return "built in"
    is_file = bool(data_suffix(name) or PATTERN.search(name) or name.endswith(TEMPLATE_SUFFIX))
    looks_local = name.startswith((".", "/", "~")) or (is_data and is_file)
    return "local" if looks_local else "hub"


def kind_of(name: str, is_data: bool) -> Kind:
    """Where a source is: what exists under a path that could be a Hub name goes before it."""
    kind, path = kind_by_name(name, is_data), Path(name)
    return "local" if kind == "hub" and (path.exists() if is_data else path.is_dir()) else kind


def loadable(name: str) -> str:
    """What a library takes for `name`: of what is built in the path, else `name`. UserError if no such is built in."""
    return str(builtin.path(name.removeprefix(BUILTIN))) if name.startswith(BUILTIN) else name


def locate_here(name: str, base: Path, where: str, is_data: bool) -> str:
    """The absolute path of a local source, the name of one elsewhere. UserError if it can be neither."""
    if not name:
        return name
    kind = kind_by_name(name, is_data)
    if kind == "built in":
        _check_builtin(name, where, is_data)
        return name
    try:
        path = Path(base, Path(name).expanduser())
        if _is_here(path, is_data):
            return str(path.resolve())
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except (OSError, RuntimeError) as error:
        raise UserError(f"{where}: {name}: {getattr(error, 'strerror', None) or error}") from None
    if kind == "local" or not HUB_NAME.fullmatch(name):
        raise UserError(f"{where}: no such {'file' if is_data else 'folder'}: {path}")
    if is_data and (close := _misspelt(path)):
        raise UserError(f"{where}: no such file: {path}; did you mean '{close}'?")
    return name


def _misspelt(path: Path) -> str | None:
    """The file of data that `path` may be meant for: a name with another suffix could be one of the Hub."""
    if not path.suffix or not path.parent.is_dir():
        return None
    beside = [file.name for file in path.parent.iterdir() if data_suffix(file.name)]
    return next(iter(get_close_matches(path.name, beside, n=1, cutoff=0.8)), None)


def _is_here(path: Path, is_data: bool) -> bool:
    """Whether a file, folder or pattern of data, or the folder of a model, is here. UserError if it can be neither."""
    if not is_data and path.is_file():
        raise UserError(f"{path} is a file; a model is a folder")
    if is_data and holds_images(path):
        return True
    if is_data and (path.is_dir() or PATTERN.search(str(path))):
        return bool(data_files(path))
    return path.exists()


def holds_images(folder: Path) -> bool:
    """Whether there are images in `folder` or not far below it, as in `folder/train/label/x.png`."""
    files = (file for pattern in ("*", "*/*", "*/*/*") for file in folder.glob(pattern))
    return any(file.suffix.lower() in IMAGE_SUFFIXES for file in files)


def _check_builtin(name: str, where: str, is_data: bool) -> None:
    try:
        found = Path(loadable(name))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if found.is_dir() is is_data:
        raise UserError(f"{where}: '{name}' is {'a model' if is_data else 'data'}")


def have_home() -> None:
    """Give a home to a process that has none, as under a user id of a container's: Ray and MLflow will not do without.

    To be called once the paths that a user gave are known. Nobody but root writes there, so nothing strange is read.
    """
    if os.path.expanduser("~") == "~":
        os.environ["HOME"] = "/"


@dataclass(frozen=True)
class LocalSource:
    """A file or folder that a space names by a relative path.

    Attributes:
        where: it is named, such as `my_space.yaml: trial.train_data`.
        name: as it is written.
        path: absolute; symbolic links are left in it.
    """

    where: str
    name: str
    path: Path


class SourcesElsewhere:
    """Locates the sources of a space that another machine will read, and notes which of them are files of this one.

    Relative paths are this machine's. Absolute ones, and those that start at a home folder, are the other one's.

    Attributes:
        local: the relative paths.
    """

    def __init__(self) -> None:
        self.local: list[LocalSource] = []

    def __call__(self, name: str, base: Path, where: str, is_data: bool) -> str:
        """As `locate_here`, but an absolute path need not exist."""
        if name.startswith(("/", "~")) or not Path(locate_here(name, base, where, is_data)).is_absolute():
            return name
        source = LocalSource(where, name, Path(os.path.abspath(base / name)))
        self.local.append(source)
        return str(source.path)


def is_cached(model: str, revision: str | None, *optional: str, reads_images: bool = False) -> bool:
    """Whether the Hub's cache on this machine has a model's commit whole: its settings, tokenizer and weights.

    A branch or tag may have moved since, so of one this is not known.

    Args:
        model: its name.
        revision: the commit.
        optional: files besides OPTIONAL that are asked for and that it need not have.
        reads_images: whether it has an image processor instead of a tokenizer.
    """
    from huggingface_hub import try_to_load_from_cache

    if not COMMIT.fullmatch(revision or "") or kind_of(model, is_data=False) != "hub" or not HUB_NAME.fullmatch(model):
        return False

    def found(file: str) -> Any:
        return try_to_load_from_cache(model, file, revision=revision)

    weights = {WEIGHTS}
    if isinstance(index := found(f"{WEIGHTS}.index.json"), str):
        weights = set(json.loads(Path(index).read_text())["weight_map"].values())
    asked_for = (*(OPTIONAL_OF_IMAGES if reads_images else OPTIONAL), *optional)
    known = all(found(file) is not None for file in asked_for)
    return known and all(isinstance(found(file), str) for file in ("config.json", *weights))


def model_file(model: str, revision: str | None, file: str) -> Path:
    """Where a `file` of a model is, which is fetched from the Hub if need be.

    Raises:
        OSError: it is not there, or the Hub does not answer.
        ValueError: the Hub can have no model of that name.
    """
    if kind_of(model, is_data=False) != "hub":
        return Path(loadable(model), file)
    from huggingface_hub import hf_hub_download

    # At a commit that is in the cache, the Hub is not asked.
    return Path(hf_hub_download(model, file, revision=revision))


def cached_commit(model: str, revision: str | None) -> str | None:
    """The commit that the Hub's cache on this machine holds for a `revision`; None if `model` is local or not there."""
    from huggingface_hub import try_to_load_from_cache

    if kind_of(model, is_data=False) != "hub":
        return None
    file = try_to_load_from_cache(model, "config.json", revision=revision)
    return Path(file).parent.name if isinstance(file, str) else None


def absolute(path: Path) -> Path:
    """`path` as trials, which run in folders of their own, can use it. UserError if it is in a home that is unknown."""
    try:
        return path.expanduser().resolve()
    except RuntimeError as error:
        raise UserError(f"{path}: {first_line(error)}") from None
