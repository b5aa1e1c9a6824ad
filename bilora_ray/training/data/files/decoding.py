"""What the bytes of a text file say: unpacked, as numbered lines, as values of JSON.

Nothing is guessed: a file is UTF-8, or what its byte order mark or `encoding` says. Nothing here imports torch.
"""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from bilora_ray.errors import UserError, first_line, nearest, refusal
from bilora_ray.paths import COMPRESSIONS, data_suffix

# The mark of UTF-16 begins that of UTF-32.
MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# Encodings in which a line does not end with the one byte 0x0a; the short names are of files without a mark.
WIDE = {"utf-16": "utf-16-le", "utf-32": "utf-32-le"} | {name: name for _, name in MARKS[1:]}
# How files begin that are not what another suffix says -> what to do with one.
KINDS = (
    (rb"\x1f\x8b", "is packed by gzip: its name must end with .gz"),
    (rb"BZh[1-9]1AY&SY", "is packed by bzip2: its name must end with .bz2"),
    (rb"\x28\xb5\x2f\xfd", "is packed by zstd: its name must end with .zst"),
    (rb"PK\x03\x04", "is a zip file or a workbook: unpack it, or save its sheet as CSV"),
    (rb"PAR1[\x00-\x1f]", "is a Parquet file: its name must end with .parquet"),
    (rb"ARROW1\x00", "is an Arrow file: its name must end with .arrow"),
    (rb"version https://git-lfs", "is not the file but its pointer in Git LFS: `git lfs pull` fetches it"),
    (rb"(?i)<!doctype html|<html", "is a web page, not the file: download that itself"),
)
# What bytes beyond ASCII may be: the Western letters stand alone among ASCII, others seldom do.
ALONE = re.compile(rb"(?<![\x80-\xff])[\x80-\xff](?![\x80-\xff])")
WESTERN, OTHERS = ("cp1252",), ("cp1251", "gb18030", "shift_jis", "euc_kr")
# Bytes.
CHUNK = 1 << 18


@dataclass(frozen=True)
class DataFile:
    """A local file of data.

    Attributes:
        path: where it is.
        name: what errors call it.
        setting: the setting that named it, for errors.
    """

    path: Path
    name: str
    setting: str

    @property
    def suffix(self) -> str:
        """That which says how it is read."""
        return data_suffix(self.path.name)


@contextmanager
def opened(file: DataFile) -> Iterator[io.BufferedReader]:
    """The bytes of `file`, unpacked. UserError as for `stored`."""
    compression = COMPRESSIONS.get(file.path.suffix.lower())
    with stored(file) as stream:
        yield stream if compression is None else _unpacked(stream, compression)


@contextmanager
def stored(file: DataFile) -> Iterator[io.BufferedReader]:
    """The bytes of `file` as they are on the disk. UserError if they can't be read, in the block too."""
    try:
        with file.path.open("rb") as stream:
            yield stream
    except FileNotFoundError:
        raise UserError(f"{file.setting}: no such file: {file.name}") from None
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise refusal(f"{file.setting}: cannot read {file.name} ({reason})", error) from None


def _unpacked(stream: io.BufferedReader, compression: str) -> io.BufferedReader:
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(stream, compression))


def lines(file: DataFile, encoding: str | None) -> Iterator[tuple[int, str]]:
    """Numbered lines, each with its end. Only \\n ends one: str.splitlines would also cut JSON texts at U+2028.

    Raises:
        UserError: the file cannot be read, or is in another encoding.
    """
    with opened(file) as stream:
        start = stream.readline()
        check_kind(start, file)
        mark, marked = next(((mark, name) for mark, name in MARKS if start.startswith(mark)), (b"", None))
        found = marked or codecs.lookup(encoding or "utf-8").name
        if marked is None and encoding is None:
            _check_width(start[:CHUNK], file)
        start = start.removeprefix(mark)
        if found in WIDE:
            yield from enumerate(_wide_lines(start, stream, WIDE[found], file), start=1)
        else:
            raw: Iterable[bytes] = chain([start] if start else [], stream)
            is_named = marked is None and encoding is not None
            yield from _narrow_lines(_checked(raw, stream, found, file) if is_named else raw, found, file)


def check_kind(start: bytes, file: DataFile) -> None:
    """UserError if the `start` of a file is that of another kind than its suffix says."""
    for magic, problem in KINDS:
        if re.match(magic, start) and not problem.endswith(file.suffix):
            raise UserError(f"{file.name}: {problem}")


def _check_width(start: bytes, file: DataFile) -> None:
    """UserError for a text in UTF-16 without a mark: half of its bytes are zero, which UTF-8 takes for characters."""
    zeros = start.count(0)
    if 3 * zeros > len(start):
        likely = "utf-16-le" if start[1::2].count(0) > zeros // 2 else "utf-16-be"
        raise UserError(f"{file.name}, line 1: not UTF-8 (byte 0x00); name its encoding, such as encoding: {likely}")


def _checked(raw: Iterable[bytes], stream: io.BufferedReader, encoding: str, file: DataFile) -> Iterator[bytes]:
    """The `raw` lines of a `stream`. UserError where an `encoding` of one byte a character is named for UTF-8.

    It would take any bytes, and make two or more characters of one; the other way round two in UTF-8 are rare. The
    first line beyond ASCII shows it, however late it is.
    """
    unknown = encoding != "utf-8" and len(bytes(range(128, 256)).decode(encoding, "replace")) == 128
    for line in raw:
        if unknown and not line.isascii():
            unknown = False
            _check_named(line + stream.peek(), encoding, file)
        yield line


def _check_named(text: bytes, encoding: str, file: DataFile) -> None:
    with suppress(UnicodeDecodeError):
        codecs.getincrementaldecoder("utf-8")().decode(text)
        raise UserError(
            f"encoding: {file.name} is UTF-8, not {encoding}; encoding: utf-8 reads it, if no other file needs that one"
        )


def _narrow_lines(raw: Iterable[bytes], encoding: str, file: DataFile) -> Iterator[tuple[int, str]]:
    before = 0
    for number, line in enumerate(raw, start=1):
        try:
            yield number, line.decode(encoding)
        except UnicodeDecodeError as error:
            problem = f"{file.name}, line {number}: not {encoding.upper()} (byte 0x{line[error.start]:02x})"
            raise UserError(f"{problem}; {_cure(line, error.start, encoding, before)}") from None
        if not before and not line.isascii():
            before = number


def _cure(line: bytes, place: int, encoding: str, before: int) -> str:
    """What to do about the byte at a `place` of a `line`; `before` is a line with right ones, or 0."""
    if encoding != "utf-8":
        return "encoding: names another"
    if before:
        return f"line {before} is, so that this one is damaged: write it anew"
    start = max(line.rfind(b" ", 0, place), line.rfind(b"\t", 0, place), line.rfind(b",", 0, place)) + 1
    word = re.split(rb"[\s,]", line[start:], maxsplit=1)[0][:20]
    likely = ((name, _decoded(word, name)) for name in (WESTERN if ALONE.search(word) else OTHERS))
    ways = [f"{name} ({text!r})" for name, text in likely if text is not None]
    return f"name its encoding, such as encoding: {' or '.join(ways) or 'cp1252'}"


def _decoded(word: bytes, encoding: str) -> str | None:
    try:
        text = word.decode(encoding)
    except UnicodeDecodeError:
        return None
    return text if text.isprintable() else None


def _wide_lines(start: bytes, stream: io.BufferedReader, encoding: str, file: DataFile) -> Iterator[str]:
    decoder, rest, number = codecs.getincrementaldecoder(encoding)(), "", 1
    for chunk in chain([start], iter(lambda: stream.read(CHUNK), b""), [None]):
        try:
            text = rest + decoder.decode(chunk or b"", final=chunk is None)
        except UnicodeDecodeError as error:
            number += error.object[: error.start].decode(encoding, "replace").count("\n")
            raise UserError(f"{file.name}, line {number}: not {encoding.upper()} ({error.reason})") from None
        *whole, rest = text.split("\n")
        number += len(whole)
        yield from (f"{line}\n" for line in whole)
    if rest:
        yield rest


def json_rows(file: DataFile, encoding: str | None, field: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSON file, each with its place: one a line, or a document of them, whichever suffix it has.

    Args:
        file: the file.
        encoding: see `lines`.
        field: the key of a document that holds the rows; found when absent.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    if is_document(file, encoding):
        yield from _document(file, encoding, field)
        return
    for number, line in lines(file, encoding):
        if line.strip():
            place = f"line {number}"
            yield place, _object(_parsed(line.rstrip("\r\n"), file.name, number), file.name, place)


def is_document(file: DataFile, encoding: str | None) -> bool:
    """Whether not each line of a JSON file is a value of its own: it has no rows before its end is read.

    Only `.json` may begin with an object that is the whole file. UserError as for `lines`.
    """
    begun = list(islice((line for _, line in lines(file, encoding) if line.strip()), 2))
    if not begun or (file.suffix != ".json" and not begun[0].lstrip().startswith("[")):
        return False
    if len(begun) == 1:
        return True
    try:
        json.loads(begun[0])
    except ValueError:
        return True
    return False


def _document(file: DataFile, encoding: str | None, field: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    rows = _parsed("".join(line for _, line in lines(file, encoding)), file.name, 1)
    if isinstance(rows, dict):
        rows = rows.get(_field(rows, field, file))
    if not isinstance(rows, list):
        raise UserError(f'{file.name}: must hold a list of objects, or {{"data": [...]}}; field names another key')
    for number, row in enumerate(rows, start=1):
        yield f"row {number}", _object(row, file.name, f"row {number}")


def _field(document: dict[str, Any], field: str | None, file: DataFile) -> str:
    """The key of a `document` that holds the rows: the one that is named, `data`, or the only one that could be."""
    if field is not None and field not in document:
        raise UserError(f"field: {file.name} has no key '{field}'; {nearest(field, document)}")
    if field is not None or isinstance(document.get("data"), list):
        return field or "data"
    rows = [key for key, value in document.items() if isinstance(value, list) and isinstance((value or [0])[0], dict)]
    if len(rows) > 1:
        raise UserError(f"{file.name}: several keys hold rows; name one in field: {', '.join(rows)}")
    return rows[0] if rows else "data"


def _parsed(text: str, name: str, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise UserError(f"{name}, line {line}: not valid JSON ({error.msg}: column {error.colno})") from None
    except (RecursionError, ValueError):
        raise UserError(f"{name}, line {first_line}: JSON nested too deep, or with too long a number") from None


def _object(row: Any, name: str, place: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f'{name}, {place}: must be an object, such as {{"text": ...}}, not {type(row).__name__}')
    return row
