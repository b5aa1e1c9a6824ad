"""Records from where a trial's data is: a local file, a built-in one, or the Hub. Every record knows its place.

Nothing here imports torch; `datasets` and `pyarrow` are imported only when they are needed.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bilora_ray.config import TrialConfig
from bilora_ray.errors import MachineError, UserError, first_line, refusal
from bilora_ray.paths import DATA_SUFFIXES, kind_of, loadable


@dataclass(frozen=True, slots=True)
class Record:
    """One row as its source has it.

    Attributes:
        columns: values by column name.
        where: the place that an error names, such as `train.jsonl, line 3`.
    """

    columns: Mapping[str, Any]
    where: str


@dataclass(frozen=True)
class Source:
    """The records of one split, at least one, and what identifies their content.

    Attributes:
        records: in the order of the source.
        digest: 16 hexadecimal digits: the start of the SHA-256 of a file's bytes, or a Hub dataset's fingerprint.
            That many tell data sets apart by accident, not by malice.
    """

    records: Sequence[Record]
    digest: str


def read_train(config: TrialConfig) -> Source:
    """The records of the training data. UserError if they can't be read or there are none."""
    return _read(config.train_data, config.train_split, config.train_revision, config, "train_data")


def read_validation(config: TrialConfig) -> Source | None:
    """The records of the validation data, None if `config` names none.

    `validation_split` alone is a split of the training data's Hub dataset.

    Raises:
        UserError: they can't be read or there are none; a Hub dataset without a split, or a split of a file; a revision
            of what is not named.
    """
    name, split, revision = config.validation_data, config.validation_split, config.validation_revision
    if name is None and revision is not None:
        raise UserError("validation_revision: is of validation_data, which is absent; train_revision is of train_data")
    if name is None and split is None:
        return None
    if name is None and _is_file(config.train_data):
        raise UserError(f"validation_split: {config.train_data} has no splits; name a file in validation_data")
    if name is not None and split is None and not _is_file(name):
        raise UserError(f"validation_split: missing; it says which split of '{name}' to validate on")
    if name is None:
        return _read(config.train_data, split or "", config.train_revision, config, "validation_split")
    return _read(name, split or "", revision, config, "validation_data")


def _read(name: str, split: str, revision: str | None, config: TrialConfig, setting: str) -> Source:
    if _is_file(name):
        return read_file(name, config.column_names, setting)
    return _read_hub(name, config.dataset_config_name, split, revision, setting)


def read_file(name: str, column_names: Sequence[str] | None, setting: str) -> Source:
    """The records of the file `name`, a path or `builtin:NAME`, as its suffix says.

    Args:
        name: what errors call the file.
        column_names: columns of a CSV or TSV file without a header.
        setting: the setting that named the file, for errors.

    Raises:
        UserError: the file is missing, unreadable, malformed or without rows.
    """
    path = _path(name, setting)
    data = _bytes(path, name, setting)
    if path.suffix == ".parquet":
        records = _parquet(data, name)
    elif path.suffix in (".csv", ".tsv"):
        table = _csv(_text(data, name), name) if path.suffix == ".csv" else _tsv(_text(data, name))
        records = _with_header(table, column_names, name)
    else:
        parse = _json if path.suffix == ".json" else _jsonl
        records = parse(_text(data, name), name)
    found = list(records)
    if not found:
        raise UserError(f"{setting}: no rows in {name}")
    return Source(found, hashlib.sha256(data).hexdigest()[:16])


def _is_file(name: str) -> bool:
    return kind_of(name, is_data=True) != "hub"


def _path(name: str, setting: str) -> Path:
    try:
        path = Path(loadable(name)).expanduser()
    except UserError as error:
        raise UserError(f"{setting}: {error}") from None
    if path.is_dir():
        raise UserError(f"{setting}: {name} is a folder; a file is needed ({', '.join(DATA_SUFFIXES)})")
    if path.suffix not in DATA_SUFFIXES:
        raise UserError(f"{setting}: {name} has an unknown suffix; allowed: {', '.join(DATA_SUFFIXES)}")
    return path


def _bytes(path: Path, name: str, setting: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{setting}: no such file: {name}") from None
    except OSError as error:
        raise refusal(f"{setting}: cannot read {name} ({error.strerror})", error) from None


def _text(data: bytes, name: str) -> str:
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(f"{name}, line {line}: not UTF-8 (byte 0x{data[error.start]:02x})") from None


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Numbered lines. Only \\n ends one: str.splitlines would also cut JSON texts at U+2028."""
    return ((number, line.removesuffix("\r")) for number, line in enumerate(text.split("\n"), start=1))


def _jsonl(text: str, name: str) -> Iterator[Record]:
    for number, line in _lines(text):
        if line.strip():
            yield _record(_parsed(line, name, number), f"{name}, line {number}")


def _json(text: str, name: str) -> Iterator[Record]:
    rows = _parsed(text, name, 1)
    if isinstance(rows, dict):
        rows = rows.get("data")
    if not isinstance(rows, list):
        raise UserError(f'{name}: must hold a list of objects, or {{"data": [...]}}')
    for number, row in enumerate(rows, start=1):
        yield _record(row, f"{name}, row {number}")


def _parsed(text: str, name: str, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise UserError(f"{name}, line {line}: not valid JSON ({error.msg}: column {error.colno})") from None


def _record(row: Any, where: str) -> Record:
    if not isinstance(row, dict):
        raise UserError(f'{where}: must be an object, such as {{"text": ...}}, not {type(row).__name__}')
    return Record(row, where)


def _csv(text: str, name: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    first = 1
    try:
        for cells in reader:
            if cells:
                yield first, cells
            first = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{name}, line {first}: not valid CSV ({error})") from None


def _tsv(text: str) -> Iterator[tuple[int, list[str]]]:
    """Cells between tabs. Quotes mean themselves, as in the GLUE and SST files."""
    for number, line in _lines(text):
        if line:
            yield number, line.split("\t")


def _with_header(
    table: Iterable[tuple[int, list[str]]], column_names: Sequence[str] | None, name: str
) -> Iterator[Record]:
    rows = iter(table)
    names = list(column_names) if column_names else next(rows, (1, []))[1]
    repeated = sorted({column for column in names if names.count(column) > 1})
    if repeated:
        raise UserError(f"{name}: column '{repeated[0]}' is named twice")
    for number, cells in rows:
        where = f"{name}, line {number}"
        if len(cells) != len(names):
            raise UserError(f"{where}: {len(cells)} columns instead of {len(names)} ({', '.join(names)})")
        if column_names and cells == names:
            raise UserError(f"{where}: is a header; leave column_names out")
        yield Record(dict(zip(names, cells, strict=True)), where)


def _parquet(data: bytes, name: str) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(data))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{name}: not a Parquet file ({first_line(error)})") from None
    for number, row in enumerate(table.to_pylist(), start=1):
        yield Record(row, f"{name}, row {number}")


def _read_hub(name: str, config_name: str | None, split: str, revision: str | None, setting: str) -> Source:
    import datasets

    label = f"{name}/{config_name}" if config_name else name
    try:
        dataset = datasets.load_dataset(name, config_name, split=split, revision=revision)
        records = [Record(row, f"{label}, {split} row {number}") for number, row in enumerate(dataset, start=1)]
    except Exception as error:  # of the Hub, of the network, of a file's format, of a package that reads that
        line = f"{setting}: cannot load '{label}', split '{split}' ({first_line(error)})"
        if type(error) is OSError:  # how `datasets` tells of a full disk, and of what the system said as it wrote there
            raise MachineError(line) from error
        raise refusal(line, error) from error
    if not records:
        raise UserError(f"{setting}: no rows in '{label}', split '{split}'")
    return Source(records, dataset._fingerprint)
