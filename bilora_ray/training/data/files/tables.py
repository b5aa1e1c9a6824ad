"""Rows of tables: of text that is cut into cells, and of columns that Arrow reads. Nothing here imports torch.

What a text's cells are is decided by looking: see `look`. What was decided is told by `told`, and by every error.
"""

from __future__ import annotations

import csv
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, islice
from typing import Any

from bilora_ray.config import TrialConfig
from bilora_ray.errors import UserError, first_line
from bilora_ray.training.data.files.decoding import CHUNK, DataFile, check_kind, lines, opened

# What stands between the cells of a file with such a suffix; a line of `.txt` is one cell, which is called `text`.
DELIMITERS = {".csv": ",", ".tsv": "\t", ".txt": ""}
# What else may, in order of how often it does.
OTHERS = (",", ";", "\t", "|")
# Rows by which it is told what stands between cells, and whether the first row is a header.
SAMPLE = 100
# A cell as CSV's rules have it, and the beginning of a line whose last cell goes on in the next.
CELL = re.compile(r'"(?:[^"]++|"")*+"|[^"\t\r]*+')
CELLS = re.compile(rf"(?:{CELL.pattern})(?:\t(?:{CELL.pattern}))*+")
OPEN = re.compile(rf'(?:(?:{CELL.pattern})\t)*+"(?:[^"]++|"")*+')
GOES_ON = re.compile(r'(?:[^"]++|"")*+')
# Characters that a cell over several lines has at the most: a stray quote would have all that follows it.
LONGEST = 1 << 24
# A quote that only CSV's rules explain: doubled within a cell in quotes, or around what would cut that.
INNER = re.compile(r'""|[\t\n]')


@dataclass(frozen=True)
class Quotes:
    """What was found of the quotes in tables between tabs.

    Attributes:
        are_csv: whether they are CSV's: one shows that, one forbids it, or (None) none says.
        file: that with the line.
        line: that shows it, or the first with quotes; None where there are none (a \\r within a cell forbids CSV too.
        count: of the tables.
        most: as many lines were looked at, of a table that has more; None: all were.
    """

    are_csv: bool | None
    file: DataFile
    line: int | None
    count: int = 1
    most: int | None = None


@dataclass(frozen=True)
class Dialect:
    """How a text is cut into cells, and what the columns are called.

    Attributes:
        delimiter: between cells; empty where a line is one.
        is_csv: whether cells may stand in CSV's quotes. Else quotes mean themselves.
        names: of the columns.
        header: the first row as it is written, if it names them.
    """

    delimiter: str
    is_csv: bool
    names: tuple[str, ...]
    header: tuple[str, ...] | None

    @property
    def words(self) -> str:
        """How the cells were cut, in the words of the settings."""
        shown = {"\t": "\\t", "": "none"}.get(self.delimiter, self.delimiter)
        return f'delimiter "{shown}", quoting {"csv" if self.is_csv else "none"}'


def text_rows(file: DataFile, config: TrialConfig, quotes: Quotes | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The rows of a text that is a table, each with its place.

    Args:
        file: the text.
        config: how it is read.
        quotes: what `quotes_among` found of it and of those that are read with it.

    Raises:
        UserError: it cannot be read, its columns have no names, or a row has not as many cells as there are names.
    """
    dialect = look(file, config, quotes)
    rows = _cells(file, config.encoding, dialect.delimiter, dialect.is_csv)
    names = dialect.names
    if dialect.header is not None:
        next(rows, None)
    for number, cells in rows:
        place = f"line {number}"
        if len(cells) != len(names):
            found = f"{file.name}, {place}: {len(cells)} columns instead of {len(names)} ({', '.join(names)})"
            raise UserError(f"{found}, as read with {dialect.words}")
        if config.column_names and tuple(cells) == names:
            raise UserError(f"{file.name}, {place}: is a header; leave column_names out")
        if len(cells) > 1 and tuple(cells) == dialect.header:
            raise UserError(f"{file.name}, {place}: is the header once more")
        yield place, dict(zip(names, cells, strict=True))


def _cells(file: DataFile, encoding: str | None, delimiter: str, is_csv: bool) -> Iterator[tuple[int, Sequence[str]]]:
    """Rows of cells, each with the number of its first line; lines that hold nothing are left out."""
    if is_csv:
        yield from _csv(file, encoding, delimiter)
        return
    for number, line in lines(file, encoding):
        if line := line.removesuffix("\n").removesuffix("\r"):
            yield number, line.split(delimiter) if delimiter else [line]


def _csv(file: DataFile, encoding: str | None, delimiter: str) -> Iterator[tuple[int, Sequence[str]]]:
    csv.field_size_limit(sys.maxsize)  # of the process; Python's own is 131,072 characters, which documents exceed
    reader = csv.reader(_csv_lines(file, encoding), delimiter=delimiter, strict=True)
    first = 1
    try:
        for cells in reader:
            if cells:
                yield first, cells
            first = reader.line_num + 1
    except csv.Error as error:
        problem = f"{file.name}, line {first}: not valid CSV ({error})"
        hint = "CSV doubles a quote within quotes; with quoting: none quotes mean themselves"
        raise UserError(f"{problem}; {hint}") from None


def _csv_lines(file: DataFile, encoding: str | None) -> Iterator[str]:
    """Lines as the csv module counts them: a \\r ends one too."""
    for _, line in lines(file, encoding):
        if "\r" in line.removesuffix("\r\n"):
            yield from re.findall(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+", line)
        else:
            yield line


def look(file: DataFile, config: TrialConfig, quotes: Quotes | None) -> Dialect:
    """How a text is cut into cells.

    `delimiter` and `quoting` are what the settings say. Else a delimiter is that of the file's suffix, unless by it the
    first rows have one cell, or different numbers of them, and by just one other the same number of two or more.
    Quotes are CSV's, unless the delimiter is a tab and the tables between tabs do not say so: see `quotes_among`. With
    quoting `by-suffix` nothing is looked at, as before there was a look.

    Raises:
        UserError: the file cannot be read, or two columns would have one name.
    """
    if config.quoting == "by-suffix":
        own = DELIMITERS[file.suffix]
        by_suffix = {"delimiter": config.delimiter or own, "quoting": "none" if own == "\t" else "csv"}
        return look(file, config.model_copy(update=by_suffix), None)
    delimiter = _delimiter(file, config)
    is_csv = config.quoting == "csv"
    if config.quoting is None:
        is_csv = delimiter != "\t" or (quotes is not None and bool(quotes.are_csv))
    return _look(file, _stamp(file), config.column_names, delimiter, delimiter != "" and is_csv, config.encoding)


def _stamp(file: DataFile) -> tuple[int, int] | None:
    found = file.path.stat() if file.path.exists() else None
    return None if found is None else (found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=1024)
def _look(
    file: DataFile,
    _: Any,
    column_names: tuple[str, ...] | None,
    delimiter: str,
    is_csv: bool,
    encoding: str | None,
) -> Dialect:
    """As `look`, once for each state of a file."""
    if not column_names and file.suffix == ".txt" and not delimiter:
        _check_text(file, encoding)
        column_names = ("text",)
    if column_names:
        header, names = None, column_names
    else:
        header = tuple(next(_cells(file, encoding, delimiter, is_csv), (1, ()))[1])
        if header and header[0].lower().startswith("sep="):
            raise UserError(f"{file.name}, line 1: tells Excel the delimiter, and is no header; take the line out")
        names = _names(header)
    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    if repeated:
        raise UserError(f"column_names: '{repeated[0]}' is named twice")
    return Dialect(delimiter, is_csv, tuple(names), header)


def _check_text(file: DataFile, encoding: str | None) -> None:
    """UserError for a text whose lines are no texts: by the first of them it is a table, or JSON."""
    sample = [cells[0] for _, cells in islice(_cells(file, encoding, "", False), SAMPLE)]
    tabs = {line.count("\t") for line in sample}
    if len(sample) > 1 and len(tabs) == 1 and tabs != {0}:
        way, what = 'delimiter: "\\t" reads them', f"each of its rows has {max(tabs) + 1} cells between tabs"
    elif sample and all(line.startswith("{") and line.endswith("}") for line in sample):
        way, what = "a name that ends with .jsonl has them read", "its rows are objects of JSON"
    else:
        return
    raise UserError(f"{file.name}: {what}; {way}, column_names: [text] takes each line for a text")


def _names(header: Sequence[str]) -> tuple[str, ...]:
    """The cells of a header; those without a name, or whose name another has too, are called after their position."""
    count = Counter(header)
    return tuple(
        cell if cell and count[cell] == 1 else f"{cell or 'column'}_{position}"
        for position, cell in enumerate(header, start=1)
    )


def _delimiter(file: DataFile, config: TrialConfig) -> str:
    if config.delimiter is not None:
        return config.delimiter
    return _found_delimiter(file, _stamp(file), len(config.column_names or ()), config.quoting, config.encoding)


@lru_cache(maxsize=1024)
def _found_delimiter(file: DataFile, _: Any, columns: int, quoting: str | None, encoding: str | None) -> str:
    own = DELIMITERS[file.suffix]
    if own == "" or columns == 1 or _agrees(file, own, columns, quoting, encoding):
        return own
    others = [other for other in OTHERS if other != own and _agrees(file, other, columns, quoting, encoding)]
    return others[0] if len(others) == 1 else own


def _agrees(file: DataFile, delimiter: str, columns: int, quoting: str | None, encoding: str | None) -> bool:
    """Whether by a `delimiter` the first rows have the same number of cells: `columns`, or if that is 0 two or more."""
    ways = (False, True) if delimiter == "\t" else (True,)
    for is_csv in ways if quoting is None else (quoting == "csv",):
        try:
            counts = {len(cells) for _, cells in islice(_cells(file, encoding, delimiter, is_csv), SAMPLE)}
        except UserError:
            continue
        if len(counts) == 1 and min(counts) >= 2 and columns in (0, min(counts)):
            return True
    return False


def quotes_among(files: Sequence[DataFile], config: TrialConfig, most: int | None) -> Quotes | None:
    """What those of the tables in `files` that are between tabs say of their quotes together; None if no such is asked.

    Parts of one data set are written by one program, and a small one may have no quote that shows how it was done.

    Args:
        files: all that a trial reads.
        config: how they are read.
        most: lines to look at, of all of them together; None: all.

    Raises:
        UserError: a file cannot be read, or one shows what another one forbids.
    """
    if config.quoting is not None:
        return None
    found = [file for file in files if _delimiter(file, config) == "\t"]
    return _quotes_among(tuple(found), tuple(map(_stamp, found)), config.encoding, most) if found else None


@lru_cache(maxsize=8)
def _quotes_among(files: tuple[DataFile, ...], _: Any, encoding: str | None, most: int | None) -> Quotes:
    """As `quotes_among`, once for each state of the files."""
    each = None if most is None else -(-most // len(files))
    found = [quotes_of(file, encoding, each) for file in files]
    shows, forbids = ([quotes for quotes in found if quotes.are_csv is way] for way in (True, False))
    if forbids and (sure := [quotes for quotes in shows if quotes.most is None]):  # others may forbid it further on
        raise UserError(
            f"quoting: {_place(sure[0])} has CSV's quotes, which {_place(forbids[0])} cannot have; "
            "say csv or none if all have, or write one of them anew"
        )
    told = sorted(forbids or shows or found, key=lambda quotes: quotes.line is None)[0]
    cut = [quotes.most for quotes in found if quotes.most is not None]
    return replace(told, count=len(files), most=cut[0] if cut else None)


def _place(quotes: Quotes) -> str:
    return quotes.file.name + ("" if quotes.line is None else f", line {quotes.line}")


def quotes_of(file: DataFile, encoding: str | None, most: int | None = None) -> Quotes:
    """Whether the quotes of a table between tabs are CSV's, by the whole of it, or by about the first `most` lines.

    They are if all could be, with as many cells as in the first row; and one could be nothing else: it is doubled
    within a cell in quotes, or a cell in quotes holds a tab or the end of a line, or all rows have quotes and the first
    has no cell without.
    """
    width, all_quoted, quoted, shows, cut = 0, True, 0, 0, None
    for number, record in _quoted_records(file, encoding):
        if most is not None and number > most:
            cut = most
            break
        if width and '"' not in record and "\r" not in record:
            all_quoted = False
            continue
        if not CELLS.fullmatch(record):
            return Quotes(False, file, number if '"' in record else None)
        cells = [cell for cell in CELL.findall(record) if cell]
        if not width:
            width = _width(record)
            all_quoted = all(cell.startswith('"') for cell in cells)
        if '"' not in record:
            continue
        if _width(record) != width:
            return Quotes(False, file, number)
        quoted = quoted or number
        # Lines each of which is whole may be rows, one of which begins with a quote, and one of which ends with one.
        if "\n" in record and all(line.count("\t") + 1 == width for line in record.split("\n")):
            continue
        if any(INNER.search(cell[1:-1]) for cell in cells if cell.startswith('"')):
            shows = shows or number
    return Quotes(bool(shows or (all_quoted and quoted)) or None, file, shows or quoted or None, most=cut)


def _quoted_records(file: DataFile, encoding: str | None) -> Iterator[tuple[int, str]]:
    """Rows with the number of their first line; of several lines where a cell in quotes goes on."""
    parts: list[str] = []
    first = length = 0
    for number, line in lines(file, encoding):
        first = first if parts else number
        goes_on = GOES_ON if parts else OPEN
        parts.append(line)
        length += len(line)
        if (len(parts) > 1 or '"' in line) and length < LONGEST and goes_on.fullmatch(line.rstrip("\r\n")):
            continue
        if record := "".join(parts).rstrip("\r\n"):
            yield first, record
        parts, length = [], 0
    if parts:
        yield first, "".join(parts)


def _width(record: str) -> int:
    """How many cells a row has."""
    return CELL.sub("", record).count("\t") + 1


def told(file: DataFile, config: TrialConfig, quotes: Quotes | None) -> Iterator[str]:
    """What was decided of a table, for who may know better: lines that begin with the setting that decides it."""
    dialect = look(file, config, quotes)
    own = DELIMITERS[file.suffix]
    if config.delimiter is None and dialect.delimiter != own:
        yield f"delimiter: {file.name} is read with {dialect.words}, for by that its rows have equally many cells"
    yield from _told_of_header(file, dialect, config)


def told_of_quotes(quotes: Quotes) -> Iterator[str]:
    """The same of the quotes in tables between tabs."""
    if quotes.line is not None:
        what = "has CSV's quotes" if quotes.are_csv else "has quotes that mean themselves"
        other = "none if they mean themselves" if quotes.are_csv else "csv if they are CSV's"
        others = f", and the others are read alike ({quotes.count} in all)" if quotes.count > 1 else ""
        yield f"quoting: {quotes.file.name} {what}, as line {quotes.line} shows{others}; say {other}"
    if quotes.most is not None:
        yield f"quoting: only the first {quotes.most} lines of a table were looked at for quotes; a search looks at all"


def _told_of_header(file: DataFile, dialect: Dialect, config: TrialConfig) -> Iterator[str]:
    sample = [cells for _, cells in islice(_cells(file, config.encoding, dialect.delimiter, dialect.is_csv), SAMPLE)]
    if not sample:
        return
    first, below = sample[0], [cells for cells in sample[1:] if len(cells) == len(sample[0])]
    columns = list(zip(*below, strict=True))
    if dialect.header is None:
        heads = [
            head
            for head, column in zip(first, columns, strict=False)
            if not _number(head) and all(map(_number, column))
        ]
        if dialect.delimiter and heads:
            yield (
                f"column_names: the first row of {file.name} is read as data, and looks like a header ('{heads[0]}'); "
                "leave column_names out if it is one"
            )
        return
    renamed = [name for name, cell in zip(dialect.names, dialect.header, strict=True) if name != cell]
    if renamed:
        yield f"column_names: columns of {file.name} without a name of their own are called {', '.join(renamed)}"
    data = [head for head, column in zip(first, columns, strict=False) if _number(head) or (head and head in column)]
    if data:
        yield (
            f"column_names: the first row of {file.name} is its header, and looks like data ('{data[0]}'); "
            "name the columns if it is"
        )


def _number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def columnar_rows(file: DataFile) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The rows of a Parquet or Arrow file, each with its place. UserError if it is none."""
    import pyarrow

    kind = "a Parquet" if file.suffix == ".parquet" else "an Arrow"
    with opened(file) as stream:
        check_kind(stream.read(CHUNK), file)
        stream.seek(0)
        try:
            rows = chain.from_iterable(batch.to_pylist() for batch in _batches(stream, file))
            for number, row in enumerate(rows, start=1):
                yield f"row {number}", row
        except (pyarrow.ArrowException, OSError) as error:
            if getattr(error, "errno", None) is not None:  # the disk's
                raise
            raise UserError(f"{file.name}: not {kind} file ({first_line(error)})") from None


def _batches(stream: Any, file: DataFile) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    if file.suffix == ".parquet":
        parquet = pyarrow.parquet.ParquetFile(stream)
        _check_names(parquet.schema_arrow.names, file)
        yield from parquet.iter_batches()
        return
    try:
        reader = pyarrow.ipc.open_file(stream)
        batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
    except pyarrow.ArrowInvalid:  # `datasets` writes streams
        stream.seek(0)
        batches = reader = pyarrow.ipc.open_stream(stream)
    _check_names(reader.schema.names, file)
    yield from batches


def _check_names(names: Sequence[str], file: DataFile) -> None:
    """UserError if two columns have one name, of which a row would keep the last."""
    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    if repeated:
        raise UserError(f"{file.name}: column '{repeated[0]}' is there twice; write it with another name")
