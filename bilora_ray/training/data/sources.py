"""Records from where a trial's data is: a local file, a built-in one, or the Hub. Every record knows its place.

Nothing here imports torch; `datasets` and `pyarrow` are imported only when they are needed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

from bilora_ray.config import TrialConfig
from bilora_ray.errors import MachineError, UserError, first_line, refusal
from bilora_ray.measures import TASK_FACTS
from bilora_ray.paths import COMPRESSIONS, data_files, files_of, holds_images, kind_of, loadable, root, splits_of
from bilora_ray.training.data.files import tables
from bilora_ray.training.data.files.decoding import DataFile, is_document, json_rows, stored
from bilora_ray.training.data.files.images import beside, files_by_label
from bilora_ray.training.data.files.tables import DELIMITERS

JSON = (".jsonl", ".ndjson", ".json")
# Bytes of a source whose records are not kept: they take some times as much memory.
LARGE = 32 * 2**20
# About so many times its size is what a file packs.
PACKED = 10
# So many records of a large source are looked at by who does not go through all of them.
BEGINNING = 10_000

T = TypeVar("T")
Stamp = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Record:
    """One row as its source has it.

    Attributes:
        columns: values by column name.
        where: the place that an error names, such as `train.jsonl, line 3`.
    """

    columns: Mapping[str, Any]
    where: str


class Reread(Collection[T]):
    """What is made again at each pass, so that however much there is of it, it takes no memory.

    Args:
        read: begins a pass. Each gives the same.
        count: how many there are; None: a pass will tell, when that is asked.
    """

    def __init__(self, read: Callable[[], Iterator[T]], count: int | None = None) -> None:
        self._read = read
        self._count = count

    def __iter__(self) -> Iterator[T]:
        return self._read()

    def __len__(self) -> int:
        if self._count is None:
            self._count = sum(1 for _ in self._read())
        return self._count

    def __contains__(self, item: object) -> bool:
        return any(item == other for other in self._read())


@dataclass(frozen=True)
class Source:
    """The records of one split, at least one, and what identifies their content.

    Attributes:
        records: in the order of the source: a list, or what reads a large one again at each pass.
        digest: 16 hexadecimal digits: the start of the SHA-256 of a file's bytes, or a Hub dataset's fingerprint.
            That many tell data sets apart by accident, not by malice.
        size: bytes of all of it.
        everything: all records there are, where `records` are the first of them only.
    """

    records: Collection[Record]
    digest: str
    size: int
    everything: Collection[Record] | None = None

    @property
    def is_large(self) -> bool:
        """Whether the records are read again at each pass."""
        return not isinstance(self.records, list)

    def beginning(self) -> Source:
        """The first `BEGINNING` records of a large source; all of one that is not."""
        if not self.is_large:
            return self
        return replace(self, records=list(islice(self.records, BEGINNING)), everything=self.records)


def read_train(config: TrialConfig, beginning: bool = False) -> Source:
    """The records of the training data. UserError if they can't be read or there are none. See `read_file`."""
    return _read(config.train_data, config.train_split, config.train_revision, config, "train_data", beginning)


def read_validation(config: TrialConfig, beginning: bool = False) -> Source | None:
    """The records of the validation data, None if `config` names none. See `read_file`.

    `validation_split` alone is a split of the training data's Hub dataset.

    Raises:
        UserError: they can't be read or there are none; a Hub dataset without a split, or a split of a file; a revision
            of what is not named.
    """
    name, split, revision = config.validation_data, config.validation_split, config.validation_revision
    check_validation(config)
    if name is None and split is None:
        return None
    if name is None:
        return _read(config.train_data, split or "", config.train_revision, config, "validation_split", beginning)
    return _read(name, split or "", revision, config, "validation_data", beginning)


def check_validation(config: TrialConfig) -> None:
    """UserError unless what `config` says of validation data goes together, whatever is in them."""
    name, split, revision = config.validation_data, config.validation_split, config.validation_revision
    if name is None and revision is not None:
        raise UserError("validation_revision: is of validation_data, which is absent; train_revision is of train_data")
    if name is None and split is not None and _is_file(config.train_data):
        raise UserError(f"validation_split: {config.train_data} has no splits; name a file in validation_data")
    if name is not None and split is None and not _is_file(name):
        raise UserError(f"validation_split: missing; it says which split of '{name}' to validate on")


def first_records(config: TrialConfig, count: int) -> dict[str, list[Record]]:
    """The first `count` records of the local data that `config` names, by setting; no file is read much further.

    Of the quotes in tables the first `BEGINNING` lines tell.

    Raises:
        UserError: they can't be read or there are none.
    """
    found = {}
    for setting in ("train_data", "validation_data"):
        name = getattr(config, setting)
        if name is not None and _is_file(name):
            found[setting] = list(islice(_local_records(name, config, setting), count))
            if not found[setting]:
                raise UserError(f"{setting}: no rows in {name}")
    return found


def _local_records(name: str, config: TrialConfig, setting: str) -> Iterable[Record]:
    if (images := _of_images(name, config)) is not None:
        return _image_folder(images, setting).records
    files = _files(name, setting)
    return _records(files, config, _quotes(files, config, BEGINNING))


def notes(config: TrialConfig, beginning: bool = False) -> Iterator[str]:
    """What was decided of local files that could be read in several ways: lines that begin with a setting.

    Args:
        config: how they are read.
        beginning: as for `read_file`.
    """
    told: dict[str, None] = {}
    for setting, files in _local_files(config).items():
        name = getattr(config, setting)
        path = Path(loadable(name)).expanduser()
        if not path.is_dir() and (names := splits_of([file.path for file in files], root(path))):
            told[f"{setting}: {name} matches files of several splits ({names})"] = None
        quotes = _quotes(files, config, _most_lines(config, beginning))
        told |= dict.fromkeys(() if quotes is None else tables.told_of_quotes(quotes))
        told |= dict.fromkeys(
            line for file in files[:1] if file.suffix in DELIMITERS for line in tables.told(file, config, quotes)
        )
    yield from told


def _local_files(config: TrialConfig) -> dict[str, list[DataFile]]:
    """The files that `config` names and that are here, without images, by setting."""
    found = {}
    for setting in ("train_data", "validation_data"):
        name = getattr(config, setting)
        if name is not None and _is_file(name) and _of_images(name, config) is None:
            with suppress(UserError):  # who reads it says what is wrong
                found[setting] = _files(name, setting)
    return found


def _quotes(files: Sequence[DataFile], config: TrialConfig, most: int | None) -> tables.Quotes | None:
    """What is found of the quotes in `files`, and in all other tables that a trial reads: they are read alike."""
    if not any(file.suffix in DELIMITERS for file in files):
        return None
    every = {file.path: file for file in chain(*_local_files(config).values(), files)}
    return tables.quotes_among([file for file in every.values() if file.suffix in DELIMITERS], config, most)


def _most_lines(config: TrialConfig, beginning: bool) -> int | None:
    if not beginning:
        return None
    return BEGINNING if any(_is_large(files, config.encoding) for files in _local_files(config).values()) else None


def _read(name: str, split: str, revision: str | None, config: TrialConfig, setting: str, beginning: bool) -> Source:
    if _is_file(name):
        return read_file(name, config, setting, beginning)
    return _read_hub(name, config.dataset_config_name, split, revision, setting)


def _of_images(name: str, config: TrialConfig) -> Path | None:
    """The folder that `name` is, if it is one of images that are to be read; else None."""
    path = Path(loadable(name)).expanduser() if TASK_FACTS[config.task].reads_images and _is_file(name) else None
    return path if path is not None and path.is_dir() and holds_images(path) else None


def _image_folder(path: Path, setting: str) -> Source:
    found = [(file, label) for label, files in files_by_label(path, setting).items() for file in files]
    sizes = [file.stat().st_size for file, _ in found]
    # Not of the pixels: those of a large folder would take as long to read as an epoch.
    content = "".join(f"{file.relative_to(path)}\0{size}\0" for (file, _), size in zip(found, sizes, strict=True))
    records = [Record({"image": str(file), "label": label}, str(file)) for file, label in found]
    return Source(records, hashlib.sha256(content.encode()).hexdigest()[:16], sum(sizes))


def read_file(name: str, config: TrialConfig, setting: str, beginning: bool = False) -> Source:
    """The records of local data, as the suffix of each file says, or one for each image of a folder of them.

    Args:
        name: a path, a pattern or `builtin:NAME`; what errors call it.
        config: how files are read.
        setting: the setting that named it, for errors.
        beginning: whether of large data the first lines tell how all are read. A later one may know better.

    Raises:
        UserError: a file is missing, unreadable or malformed, or there are no rows.
    """
    if (images := _of_images(name, config)) is not None:
        return _image_folder(images, setting)
    files = _files(name, setting)
    quotes = _quotes(files, config, _most_lines(config, beginning))
    is_large = _is_large(files, config.encoding)
    records = _reread(files, config, quotes) if is_large else list(_records(files, config, quotes))
    if next(iter(records), None) is None:
        raise UserError(f"{setting}: no rows in {name}")
    digest = _digest(files)
    if TASK_FACTS[config.task].reads_images:
        digest = _with_images(digest, records, config)
    return Source(records, digest, sum(map(_size, files)))


def image_files(name: str, config: TrialConfig, setting: str) -> list[Path]:
    """The files that hold the images of local data; none where no task reads any, or a table holds them itself.

    Raises:
        UserError: as `read_file`.
    """
    if not TASK_FACTS[config.task].reads_images:
        return []
    return list(_image_files(_local_records(name, config, setting), config))


def _image_files(records: Iterable[Record], config: TrialConfig) -> Iterator[Path]:
    for record in records:
        value = record.columns.get(config.image_column)
        path = value.get("path") if isinstance(value, dict) and value.get("bytes") is None else value
        if not (isinstance(path, str) and path):
            return  # a table holds its images or names them, so that one row tells
        yield Path(path)


def _with_images(digest: str, records: Iterable[Record], config: TrialConfig) -> str:
    """The `digest` of a table and the sizes of the images that it names: see `_image_folder`."""
    sizes = "".join(f"{_size_of(path)}\0" for path in _image_files(records, config))
    return hashlib.sha256(f"{digest}\0{sizes}".encode()).hexdigest()[:16] if sizes else digest


def _size_of(path: Path) -> int:
    with suppress(OSError, ValueError):  # who reads the row says what is wrong
        return path.stat().st_size
    return -1


def _size(file: DataFile) -> int:
    return file.path.stat().st_size if file.path.exists() else 0


def _is_large(files: Sequence[DataFile], encoding: str | None) -> bool:
    """Whether the records of `files` are read at each pass. A document of JSON would be parsed whole at each."""
    size = sum(_size(file) * (PACKED if file.path.suffix.lower() in COMPRESSIONS else 1) for file in files)
    return size > LARGE and not any(file.suffix in JSON and is_document(file, encoding) for file in files)


def _reread(files: Sequence[DataFile], config: TrialConfig, quotes: tables.Quotes | None) -> Reread[Record]:
    stamps = [stamp_of(file.path) for file in files]

    def check() -> None:
        for file, stamp in zip(files, stamps, strict=True):
            if stamp_of(file.path) != stamp:
                raise MachineError(f"{file.setting}: {file.name} was written to while it was in use")

    def read() -> Iterator[Record]:
        check()
        yield from _records(files, config, quotes)
        check()

    return Reread(read)


def _files(name: str, setting: str) -> list[DataFile]:
    try:
        path = Path(loadable(name)).expanduser()
        paths = data_files(path)
    except UserError as error:
        raise UserError(f"{setting}: {error}") from None
    except OSError as error:
        raise refusal(f"{setting}: cannot read {name} ({error.strerror})", error) from None
    alone = paths == [path]
    return [DataFile(found, name if alone else str(found), setting) for found in paths]


def _records(files: Iterable[DataFile], config: TrialConfig, quotes: tables.Quotes | None) -> Iterator[Record]:
    """The records of `files`, which must have the same columns where all rows of a file have."""
    known: tuple[str, frozenset[str]] | None = None
    for file in files:
        rows = _rows(file, config, quotes)
        first = next(rows, None)
        if first is None:
            continue
        if file.suffix not in JSON:
            columns = frozenset(first[1])
            known = known or (file.name, columns)
            _check_columns(file, columns, known)
        for place, row in chain([first], rows):
            yield Record(_located(row, file, config), f"{file.name}, {place}")


def _located(row: Mapping[str, Any], file: DataFile, config: TrialConfig) -> Mapping[str, Any]:
    """The row with the path of its image, which is relative to the file that names it."""
    column = config.image_column
    if not TASK_FACTS[config.task].reads_images or column not in row:
        return row
    return {**row, column: beside(file.path.parent, row[column])}


def _check_columns(file: DataFile, columns: frozenset[str], known: tuple[str, frozenset[str]]) -> None:
    name, others = known
    if columns != others:
        differ = ", ".join(f"'{column}'" for column in sorted(columns ^ others))
        raise UserError(f"{file.setting}: {file.name} has other columns than {name}: only one of them has {differ}")


def _rows(file: DataFile, config: TrialConfig, quotes: tables.Quotes | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The rows of one file, each with its place in it."""
    if file.suffix in JSON:
        return json_rows(file, config.encoding, config.field)
    if file.suffix in DELIMITERS:
        return tables.text_rows(file, config, quotes)
    return tables.columnar_rows(file)


def _digest(files: Sequence[DataFile]) -> str:
    """Of one file that of its bytes; of several that of theirs, in their order."""
    found = [_file_digest(file, stamp_of(file.path)) for file in files]
    whole = found[0] if len(found) == 1 else hashlib.sha256("\n".join(found).encode()).hexdigest()
    return whole[:16]


def stamp_of(path: Path) -> Stamp:
    """What tells a file from the same one after it was written again. OSError if it is not there."""
    found = path.stat()
    return found.st_mtime_ns, found.st_size


def stamps_of(name: str | None, config: TrialConfig) -> tuple[Stamp, ...]:
    """Those of all files below a local source and of its images; none of one that is elsewhere or not there."""
    if name is None or not _is_file(name):
        return ()
    with suppress(OSError, UserError):  # who reads it says what is wrong
        images = image_files(name, config, "train_data")
        return tuple(stamp_of(file) for file in (*files_of(Path(loadable(name)).expanduser()), *images))
    return ()


@lru_cache(maxsize=256)
def _file_digest(file: DataFile, stamp: Stamp) -> str:
    """Of 10 GB it takes some ten seconds, and a process asks for it several times."""
    with stored(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _is_file(name: str) -> bool:
    return kind_of(name, is_data=True) != "hub"


def _read_hub(name: str, config_name: str | None, split: str, revision: str | None, setting: str) -> Source:
    import datasets

    label = f"{name}/{config_name}" if config_name else name
    try:
        dataset = _undecoded(datasets.load_dataset(name, config_name, split=split, revision=revision))
        # They are read from the disk.
        records: Collection[Record] = Reread(lambda: _hub_records(dataset, label, split), len(dataset))
        size = dataset.data.nbytes
        if size <= LARGE:
            records = list(records)
    except Exception as error:  # of the Hub, of the network, of a file's format, of a package that reads that
        line = f"{setting}: cannot load '{label}', split '{split}' ({first_line(error)})"
        if type(error) is OSError:  # how `datasets` tells of a full disk, and of what the system said as it wrote there
            raise MachineError(line) from error
        raise refusal(line, error) from error
    if not records:
        raise UserError(f"{setting}: no rows in '{label}', split '{split}'")
    return Source(records, dataset._fingerprint, size)


def _hub_records(dataset: Iterable[Any], label: str, split: str) -> Iterator[Record]:
    return (Record(row, f"{label}, {split} row {number}") for number, row in enumerate(dataset, start=1))


def _undecoded(dataset: Any) -> Any:
    """`dataset` with its images as they are stored: the pixels of all of them need not fit into memory."""
    import datasets

    images = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    for name in images:
        dataset = dataset.cast_column(name, datasets.Image(decode=False))
    return dataset
