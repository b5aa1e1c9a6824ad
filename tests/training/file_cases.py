"""Every kind of data file that people have, made small, and what happens to it: for its test, and for docs/data.md."""

from __future__ import annotations

import bz2
import datetime
import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

Row = dict[str, Any]
Make = Callable[[Path], str]

AB = [{"a": "1", "b": "x"}, {"a": "2", "b": "y"}]
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SUFFIXES = ".jsonl, .ndjson, .json, .csv, .tsv, .txt, .parquet, .arrow, and of text .gz, .bz2, .zst after it"
# What an error adds, by how the cells were cut.
AS_CSV = 'as read with delimiter ",", quoting csv'
AS_TSV = 'as read with delimiter "\\t", quoting none'
PLAIN = "CSV doubles a quote within quotes; with quoting: none quotes mean themselves"


@dataclass(frozen=True)
class Loads:
    """The rows that a file gives, and the Notes that are told of it; `{}` is its name."""

    rows: list[Row]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Refused:
    """The line that says why; `{}` is the name of the file, `{here}` the folder that it is in."""

    line: str


@dataclass(frozen=True)
class Case:
    """A kind of file.

    Attributes:
        id: what it is.
        make: makes one in a folder, and gives its name.
        outcome: what happens.
        settings: those that a user gives with it.
    """

    id: str
    make: Make
    outcome: Loads | Refused
    settings: dict[str, Any] = field(default_factory=dict)


def file(name: str, content: str | bytes, encoding: str = "utf-8") -> Make:
    """Makes one file."""
    return folder({name: content.encode(encoding) if isinstance(content, str) else content}, name)


def folder(files: dict[str, bytes | str], name: str = "") -> Make:
    """Makes several files, and names the folder or what is in it."""

    def make(here: Path) -> str:
        for inside, content in files.items():
            path = here / inside
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        return f"{here}/{name}" if name else str(here)

    return make


def parquet(table: Any) -> bytes:
    """A Parquet file of a table or of rows."""
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table if isinstance(table, pyarrow.Table) else pyarrow.Table.from_pylist(table), sink)
    return sink.getvalue().to_pybytes()


def arrow(rows: list[Row], kind: Any) -> bytes:
    """An Arrow file or stream of rows."""
    sink, table = pyarrow.BufferOutputStream(), pyarrow.Table.from_pylist(rows)
    with kind(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def saved(here: Path) -> str:
    """A folder of `save_to_disk`."""
    import datasets

    datasets.Dataset.from_list(AB).save_to_disk(here / "saved")
    return f"{here}/saved"


def saved_splits(here: Path) -> str:
    """The same of two splits."""
    import datasets

    one = datasets.Dataset.from_list(AB)
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(here / "saved")
    return f"{here}/saved"


def zstd(text: str) -> bytes:
    """Packed."""
    return pyarrow.compress(text.encode(), codec="zstd", asbytes=True)


CSV = "a,b\n1,x\n2,y\n"
JSONL = "".join(json.dumps(row) + "\n" for row in AB)
QUOTED = 'text\tlabel\n"He said ""no""."\t0\nplain\t1\n'
STRAY = 'text\tlabel\n"Wow!" he said\t0\na 5" pipe\t1\n'
LOOKS = "looks like data ('{}'); name the columns if it is"

JSON_CASES = [
    Case("JSON lines", file("d.jsonl", JSONL), Loads(AB)),
    Case(
        "JSON lines with empty lines and CRLF",
        file("d.jsonl", '{"a": 1}\r\n\r\n  \n{"a": 2}'),
        Loads([{"a": 1}, {"a": 2}]),
    ),
    Case("JSON lines named .ndjson", file("d.ndjson", JSONL), Loads(AB)),
    Case("JSON lines named .json", file("d.json", JSONL), Loads(AB)),
    Case("a JSON list", file("d.json", json.dumps(AB, indent=1)), Loads(AB)),
    Case("a JSON list named .jsonl", file("d.jsonl", json.dumps(AB, indent=1)), Loads(AB)),
    Case("JSON with the rows under data", file("d.json", json.dumps({"data": AB, "meta": [{}]})), Loads(AB)),
    Case("JSON with one key that holds rows", file("d.json", json.dumps({"v": 1, "rows": AB})), Loads(AB)),
    Case(
        "JSON with several keys that hold rows",
        file("d.json", json.dumps({"train": AB, "test": AB})),
        Refused("{}: several keys hold rows; name one in field: train, test"),
    ),
    Case("the same, with field", file("d.json", json.dumps({"train": AB, "test": []})), Loads(AB), {"field": "train"}),
    Case(
        "JSON without the key that field names",
        file("d.json", json.dumps({"train": AB})),
        Refused("field: {} has no key 'trian'; did you mean 'train'?"),
        {"field": "trian"},
    ),
    Case(
        "JSON of columns, as pandas writes it",
        file("d.json", '{"a": {"0": 1}, "b": {"0": 2}}'),
        Refused('{}: must hold a list of objects, or {"data": [...]}; field names another key'),
    ),
    Case(
        "a JSON list of texts",
        file("d.json", '[{"a": 1}, "b"]'),
        Refused('{}, row 2: must be an object, such as {"text": ...}, not str'),
    ),
    Case(
        "JSON lines that hold lists",
        file("d.jsonl", '["a", 1]\n["b", 0]\n'),
        Refused('{}, line 1: must be an object, such as {"text": ...}, not list'),
    ),
    Case(
        "JSON lines, one cut off",
        file("d.jsonl", '{"a": 1}\n{"a": "x'),
        Refused("{}, line 2: not valid JSON (Unterminated string starting at: column 7)"),
    ),
    Case(
        "JSON lines, two rows in one",
        file("d.jsonl", '{"a": 1} {"a": 2}'),
        Refused("{}, line 1: not valid JSON (Extra data: column 10)"),
    ),
    Case(
        "JSON lines, one a list",
        file("d.jsonl", '{"a": 1}\n[1]'),
        Refused('{}, line 2: must be an object, such as {"text": ...}, not list'),
    ),
    Case(
        "a JSON list with an error",
        file("d.json", '[{"a": 1},\n{"a": }]'),
        Refused("{}, line 2: not valid JSON (Expecting value: column 7)"),
    ),
    Case(
        "JSON of too many brackets",
        file("d.jsonl", '{"a": ' + "[" * 100_000),
        Refused("{}, line 1: JSON nested too deep, or with too long a number"),
    ),
    Case("an empty JSON list", file("d.json", "[]"), Refused("train_data: no rows in {}")),
    Case("an empty file of JSON lines", file("d.jsonl", ""), Refused("train_data: no rows in {}")),
]

TABLE_CASES = [
    Case("CSV", file("d.csv", CSV), Loads(AB)),
    Case(
        "CSV with quotes, line ends and commas in cells",
        file("d.csv", 'a,b\n"x\ny","1, ""2"""\n'),
        Loads([{"a": "x\ny", "b": '1, "2"'}]),
    ),
    Case("CSV of a Mac, CR at the ends of lines", file("d.csv", CSV.replace("\n", "\r")), Loads(AB)),
    Case(
        "CSV with a field of 200,000 characters",
        file("d.csv", f"a,b\n1,{'x' * 200_000}\n"),
        Loads([{"a": "1", "b": "x" * 200_000}]),
    ),
    Case("CSV without a header, with column_names", file("d.csv", "1,x\n2,y"), Loads(AB), {"column_names": ["a", "b"]}),
    Case(
        "CSV without a header",
        file("d.csv", "1,x\n2,y\n"),
        Loads([{"1": "2", "x": "y"}], (f"column_names: the first row of {{}} is its header, and {LOOKS.format('1')}",)),
    ),
    Case(
        "CSV whose header repeats below it",
        file("d.csv", "ham,x\nspam,y\nham,z\n"),
        Loads(
            [{"ham": "spam", "x": "y"}, {"ham": "ham", "x": "z"}],
            (f"column_names: the first row of {{}} is its header, and {LOOKS.format('ham')}",),
        ),
    ),
    Case(
        "CSV with the header that column_names names",
        file("d.csv", CSV),
        Refused("{}, line 1: is a header; leave column_names out"),
        {"column_names": ["a", "b"]},
    ),
    Case(
        "CSV with another header than column_names",
        file("d.csv", "v1,v2\n1,x\n2,y\n"),
        Loads(
            [{"a": "v1", "b": "v2"}, *AB],
            (
                "column_names: the first row of {} is read as data, and looks like a header ('v1'); "
                "leave column_names out if it is one",
            ),
        ),
        {"column_names": ["a", "b"]},
    ),
    Case(
        "CSV files put together, each with its header",
        file("d.csv", CSV + CSV),
        Refused("{}, line 4: is the header once more"),
    ),
    Case(
        "CSV with empty header cells",
        file("d.csv", "v1,v2,,\nham,x,,\nspam,y,,\n"),
        Loads(
            [
                {"v1": "ham", "v2": "x", "column_3": "", "column_4": ""},
                {"v1": "spam", "v2": "y", "column_3": "", "column_4": ""},
            ],
            ("column_names: columns of {} without a name of their own are called column_3, column_4",),
        ),
    ),
    Case(
        "CSV with doubled column names",
        file("d.csv", "a,b,a\n1,x,2\n"),
        Loads(
            [{"a_1": "1", "b": "x", "a_3": "2"}],
            ("column_names: columns of {} without a name of their own are called a_1, a_3",),
        ),
    ),
    Case(
        "column_names with one name twice",
        file("d.csv", CSV),
        Refused("column_names: 'a' is named twice"),
        {"column_names": ["a", "a"]},
    ),
    Case(
        "CSV with too few cells in a row",
        file("d.csv", "a,b\n1,2\n3\n"),
        Refused(f"{{}}, line 3: 1 columns instead of 2 (a, b), {AS_CSV}"),
    ),
    Case(
        "CSV with too many cells in a row",
        file("d.csv", 'a,b\n"x\ny",1\n1,2,3\n'),
        Refused(f"{{}}, line 4: 3 columns instead of 2 (a, b), {AS_CSV}"),
    ),
    Case(
        "CSV with a quote that does not end",
        file("d.csv", 'a,b\n1,2\n3,"x'),
        Refused(f"{{}}, line 3: not valid CSV (unexpected end of data); {PLAIN}"),
    ),
    Case(
        "CSV with backslashes before quotes",
        file("d.csv", 'a,b\n1,"He said \\"No\\"."\n'),
        Refused(f"{{}}, line 2: not valid CSV (',' expected after '\"'); {PLAIN}"),
    ),
    Case(
        "CSV with stray quotes, with quoting: none",
        file("d.csv", 'a,b\n1,"x\n2,y\n'),
        Loads([{"a": "1", "b": '"x'}, AB[1]]),
        {"quoting": "none"},
    ),
    Case(
        "CSV with semicolons",
        file("d.csv", "a;b\n1,5;x\n2;y\n"),
        Loads(
            [{"a": "1,5", "b": "x"}, AB[1]],
            ('delimiter: {} is read with delimiter ";", quoting csv, for by that its rows have equally many cells',),
        ),
    ),
    Case(
        "CSV with semicolons, with delimiter",
        file("d.csv", "a;b\n1,5;x\n2,5;y\n"),
        Loads([{"a": "1,5", "b": "x"}, {"a": "2,5", "b": "y"}]),
        {"delimiter": ";"},
    ),
    Case(
        "CSV with bars",
        file("d.csv", "a|b\n1|x\n2|y\n"),
        Loads(
            AB, ('delimiter: {} is read with delimiter "|", quoting csv, for by that its rows have equally many cells',)
        ),
    ),
    Case(
        "CSV with tabs",
        file("d.csv", "a\tb\n1\tx\n2\ty\n"),
        Loads(
            AB,
            ('delimiter: {} is read with delimiter "\\t", quoting none, for by that its rows have equally many cells',),
        ),
    ),
    Case(
        "CSV whose first line is Excel's sep=;",
        file("d.csv", "sep=;\na;b\n1;x\n"),
        Refused("{}, line 1: tells Excel the delimiter, and is no header; take the line out"),
    ),
    Case("CSV of one column", file("d.csv", "text\nHi; you\nno\n"), Loads([{"text": "Hi; you"}, {"text": "no"}])),
    Case("CSV that is empty", file("d.csv", ""), Refused("train_data: no rows in {}")),
    Case("CSV of a header alone", file("d.csv", "a,b\n"), Refused("train_data: no rows in {}")),
    Case("TSV", file("d.tsv", "a\tb\r\n\r\n1\tx\r\n\t\r\n"), Loads([AB[0], {"a": "", "b": ""}])),
    Case(
        "TSV with stray quotes, as GLUE's",
        file("d.tsv", STRAY),
        Loads(
            [{"text": '"Wow!" he said', "label": "0"}, {"text": 'a 5" pipe', "label": "1"}],
            ("quoting: {} has quotes that mean themselves, as line 2 shows; say csv if they are CSV's",),
        ),
    ),
    Case(
        "TSV with whole cells in quotes, none doubled",
        file("d.tsv", 'text\tlabel\n"Wow!"\t0\nno\t1\n'),
        Loads(
            [{"text": '"Wow!"', "label": "0"}, {"text": "no", "label": "1"}],
            ("quoting: {} has quotes that mean themselves, as line 2 shows; say csv if they are CSV's",),
        ),
    ),
    Case(
        "TSV with CSV quotes",
        file("d.tsv", QUOTED),
        Loads(
            [{"text": 'He said "no".', "label": "0"}, {"text": "plain", "label": "1"}],
            ("quoting: {} has CSV's quotes, as line 2 shows; say none if they mean themselves",),
        ),
    ),
    Case(
        "TSV with CSV quotes around tabs and ends of lines",
        file("d.tsv", 'text\tlabel\n"a\tb"\t0\n"c\nd"\t1\n'),
        Loads(
            [{"text": "a\tb", "label": "0"}, {"text": "c\nd", "label": "1"}],
            ("quoting: {} has CSV's quotes, as line 2 shows; say none if they mean themselves",),
        ),
    ),
    Case(
        "TSV with all texts in quotes",
        file("d.tsv", '"text"\t"label"\n"a"\t0\n"b"\t1\n'),
        Loads(
            [{"text": "a", "label": "0"}, {"text": "b", "label": "1"}],
            ("quoting: {} has CSV's quotes, as line 1 shows; say none if they mean themselves",),
        ),
    ),
    Case(
        "TSV with a quote that opens one cell and ends the next",
        file("d.tsv", 'a\tb\tc\n"x\ty"\tz\n'),
        Loads(
            [{"a": '"x', "b": 'y"', "c": "z"}],
            ("quoting: {} has quotes that mean themselves, as line 2 shows; say csv if they are CSV's",),
        ),
    ),
    Case(
        "TSV with a quote that opens in one row and ends in another",
        file("d.tsv", 'text\tlabel\n"He said\t0\nand went"\t1\n'),
        Loads(
            [{"text": '"He said', "label": "0"}, {"text": 'and went"', "label": "1"}],
            ("quoting: {} has quotes that mean themselves, as line 2 shows; say csv if they are CSV's",),
        ),
    ),
    Case(
        "TSV with a quote that nothing ends",
        file("d.tsv", 'text\tlabel\n"He said\t0\nand went\t1\n'),
        Loads(
            [{"text": '"He said', "label": "0"}, {"text": "and went", "label": "1"}],
            ("quoting: {} has quotes that mean themselves, as line 2 shows; say csv if they are CSV's",),
        ),
    ),
    Case(
        "TSV with doubled quotes and one stray one",
        file("d.tsv", QUOTED + 'a 5" pipe\t1\n'),
        Loads(
            [
                {"text": '"He said ""no""."', "label": "0"},
                {"text": "plain", "label": "1"},
                {"text": 'a 5" pipe', "label": "1"},
            ],
            ("quoting: {} has quotes that mean themselves, as line 4 shows; say csv if they are CSV's",),
        ),
    ),
    Case(
        "TSV with CSV quotes, with quoting: none",
        file("d.tsv", QUOTED),
        Loads([{"text": '"He said ""no""."', "label": "0"}, {"text": "plain", "label": "1"}]),
        {"quoting": "none"},
    ),
    Case(
        "TSV with whole cells in quotes, with quoting: csv",
        file("d.tsv", 'text\tlabel\n"Wow!"\t0\n'),
        Loads([{"text": "Wow!", "label": "0"}]),
        {"quoting": "csv"},
    ),
    Case(
        "TSV with stray quotes, with quoting: csv",
        file("d.tsv", STRAY),
        Refused(f"{{}}, line 2: not valid CSV ('\t' expected after '\"'); {PLAIN}"),
        {"quoting": "csv"},
    ),
    Case(
        "TSV with too few cells in a row",
        file("d.tsv", "a\tb\n1\t2\n3 4\n"),
        Refused(f"{{}}, line 3: 1 columns instead of 2 (a, b), {AS_TSV}"),
    ),
    Case(
        "TSV that is CSV",
        file("d.tsv", CSV),
        Loads(
            AB, ('delimiter: {} is read with delimiter ",", quoting csv, for by that its rows have equally many cells',)
        ),
    ),
    Case("TSV of a header alone", file("d.tsv", "a\tb\n\n"), Refused("train_data: no rows in {}")),
    Case(
        "text, a row a line", file("d.txt", "Hi, you\n\n a\tb \r\n"), Loads([{"text": "Hi, you"}, {"text": " a\tb "}])
    ),
    Case(
        "text that is a table",
        file("d.txt", "a\tb\n1\tx\n2\ty\n"),
        Refused(
            '{}: each of its rows has 2 cells between tabs; delimiter: "\\t" reads them, '
            "column_names: [text] takes each line for a text"
        ),
    ),
    Case(
        "text that is JSON lines",
        file("d.txt", JSONL),
        Refused(
            "{}: its rows are objects of JSON; a name that ends with .jsonl has them read, "
            "column_names: [text] takes each line for a text"
        ),
    ),
    Case(
        "text that is a table, with column_names: [text]",
        file("d.txt", "a\tb\n1\tx\n"),
        Loads([{"text": "a\tb"}, {"text": "1\tx"}]),
        {"column_names": ["text"]},
    ),
    Case("text that is a table, with delimiter", file("d.txt", "a\tb\n1\tx\n2\ty\n"), Loads(AB), {"delimiter": "\t"}),
    Case(
        "text with the column_names of a table",
        file("d.txt", "1\tx\n"),
        Refused('{}, line 1: 1 columns instead of 2 (a, b), as read with delimiter "none", quoting none'),
        {"column_names": ["a", "b"]},
    ),
]

CAFE = "a,b\n1,café\n"
ENCODING_CASES = [
    Case("UTF-8 with a byte order mark", file("d.csv", CSV, "utf-8-sig"), Loads(AB)),
    Case(
        "UTF-16 with a byte order mark, as Excel's Unicode text",
        file("d.tsv", "a\tb\r\n1\té\r\n", "utf-16"),
        Loads([{"a": "1", "b": "é"}]),
    ),
    Case("big-endian UTF-16 with a mark", file("d.jsonl", "\ufeff" + JSONL, "utf-16-be"), Loads(AB)),
    Case("UTF-32 with a mark", file("d.csv", CSV, "utf-32"), Loads(AB)),
    Case(
        "UTF-16 without a mark",
        file("d.csv", CSV, "utf-16-le"),
        Refused("{}, line 1: not UTF-8 (byte 0x00); name its encoding, such as encoding: utf-16-le"),
    ),
    Case("UTF-16 without a mark, with encoding", file("d.csv", CSV, "utf-16-le"), Loads(AB), {"encoding": "utf-16-le"}),
    Case(
        "UTF-16 that is cut off",
        file("d.csv", CSV.encode("utf-16")[:-1]),
        Refused("{}, line 3: not UTF-16-LE (truncated data)"),
    ),
    Case(
        "cp1252",
        file("d.csv", CAFE, "cp1252"),
        Refused("{}, line 2: not UTF-8 (byte 0xe9); name its encoding, such as encoding: cp1252 ('café')"),
    ),
    Case(
        "cp1252, with encoding", file("d.csv", CAFE, "cp1252"), Loads([{"a": "1", "b": "café"}]), {"encoding": "cp1252"}
    ),
    Case(
        "a Kaggle file: v1,v2,,, in cp1252",
        file("d.csv", "v1,v2,,,\r\nham,50£ off,,,\r\n", "cp1252"),
        Refused("{}, line 2: not UTF-8 (byte 0xa3); name its encoding, such as encoding: cp1252 ('50£')"),
    ),
    Case(
        "the same, with encoding",
        file("d.csv", "v1,v2,,,\r\nham,50£ off,,,\r\n", "cp1252"),
        Loads(
            [{"v1": "ham", "v2": "50£ off", "column_3": "", "column_4": "", "column_5": ""}],
            ("column_names: columns of {} without a name of their own are called column_3, column_4, column_5",),
        ),
        {"encoding": "cp1252"},
    ),
    Case(
        "Cyrillic cp1251",
        file("d.csv", "a,b\n1,Привет\n", "cp1251"),
        Refused(
            "{}, line 2: not UTF-8 (byte 0xcf); name its encoding, such as encoding: cp1251 ('Привет') "
            "or gb18030 ('橡桠弪') or euc_kr ('厥外奄')"
        ),
    ),
    Case(
        "Cyrillic cp1251, with encoding",
        file("d.csv", "a,b\n1,Привет\n", "cp1251"),
        Loads([{"a": "1", "b": "Привет"}]),
        {"encoding": "cp1251"},
    ),
    Case(
        "UTF-8 with a byte that is damaged",
        file("d.csv", "a,b\n1,é\n2,".encode() + b"\xe9\n"),
        Refused("{}, line 3: not UTF-8 (byte 0xe9); line 2 is, so that this one is damaged: write it anew"),
    ),
    Case(
        "UTF-8, with encoding: cp1252",
        file("d.csv", CAFE),
        Refused("encoding: {} is UTF-8, not cp1252; encoding: utf-8 reads it, if no other file needs that one"),
        {"encoding": "cp1252"},
    ),
    Case(
        "UTF-8 whose first letter beyond ASCII is late, with encoding: cp1252",
        file("d.csv", "a,b\n" + "1,x\n" * 9999 + "1,café\n"),
        Refused("encoding: {} is UTF-8, not cp1252; encoding: utf-8 reads it, if no other file needs that one"),
        {"encoding": "cp1252"},
    ),
    Case(
        "another encoding than the one that is named",
        file("d.csv", b"a,b\n1,\x81\n"),
        Refused("{}, line 2: not CP1252 (byte 0x81); encoding: names another"),
        {"encoding": "cp1252"},
    ),
]

PACKED_CASES = [
    Case("CSV packed by gzip", file("d.csv.gz", gzip.compress(CSV.encode())), Loads(AB)),
    Case("gzip of several parts", file("d.csv.gz", gzip.compress(b"a,b\n1,x\n") + gzip.compress(b"2,y\n")), Loads(AB)),
    Case("JSON lines packed by bzip2", file("d.jsonl.bz2", bz2.compress(JSONL.encode())), Loads(AB)),
    Case("JSON lines packed by zstd", file("d.jsonl.zst", zstd(JSONL)), Loads(AB)),
    Case(
        "gzip that is cut off",
        file("d.csv.gz", gzip.compress(CSV.encode())[:-9]),
        Refused("train_data: cannot read {} (Truncated compressed stream)"),
    ),
    Case(
        "a .gz that is none",
        file("d.csv.gz", CSV),
        Refused("train_data: cannot read {} (zlib inflate failed: incorrect header check)"),
    ),
    Case(
        "gzip without .gz in its name",
        file("d.csv", gzip.compress(CSV.encode())),
        Refused("{}: is packed by gzip: its name must end with .gz"),
    ),
    Case(
        "a workbook named .csv",
        file("d.csv", b"PK\x03\x04rest"),
        Refused("{}: is a zip file or a workbook: unpack it, or save its sheet as CSV"),
    ),
    Case(
        "Parquet packed by gzip",
        file("d.parquet.gz", b""),
        Refused(f"train_data: {{}} has an unknown suffix; allowed: {SUFFIXES}"),
    ),
    Case(
        "a pointer of Git LFS",
        file("d.parquet", "version https://git-lfs.github.com/spec/v1\noid sha256:1\n"),
        Refused("{}: is not the file but its pointer in Git LFS: `git lfs pull` fetches it"),
    ),
    Case(
        "a web page in place of the file",
        file("d.csv", "<!DOCTYPE html>\n<html>"),
        Refused("{}: is a web page, not the file: download that itself"),
    ),
]

TYPED = [{"price": Decimal("1.50"), "day": datetime.date(2024, 5, 1), "at": datetime.datetime(2024, 5, 1, 12, 30)}]
CATEGORIES = pyarrow.table({"a": pyarrow.array(["x", "y", "x"]).dictionary_encode()})
COLUMNAR_CASES = [
    Case("Parquet", file("d.parquet", parquet(AB)), Loads(AB)),
    Case("Parquet with chats", file("d.parquet", parquet([{"messages": CHAT}])), Loads([{"messages": CHAT}])),
    Case(
        "Parquet with categories", file("d.parquet", parquet(CATEGORIES)), Loads([{"a": "x"}, {"a": "y"}, {"a": "x"}])
    ),
    Case("Parquet with decimals and dates", file("d.parquet", parquet(TYPED)), Loads(TYPED)),
    Case(
        "Parquet with doubled column names",
        file("d.parquet", parquet(pyarrow.Table.from_arrays([pyarrow.array([1])] * 2, names=["a", "a"]))),
        Refused("{}: column 'a' is there twice; write it with another name"),
    ),
    Case(
        "CSV named .parquet",
        file("d.parquet", CSV),
        Refused(
            "{}: not a Parquet file (Parquet magic bytes not found in footer. Either the file is corrupted or this is "
            "not a parquet file.)"
        ),
    ),
    Case(
        "Parquet named .csv",
        file("d.csv", parquet(AB)),
        Refused("{}: is a Parquet file: its name must end with .parquet"),
    ),
    Case(
        "an empty Parquet file",
        file("d.parquet", parquet(pyarrow.table({"a": []}))),
        Refused("train_data: no rows in {}"),
    ),
    Case("an Arrow file", file("d.arrow", arrow(AB, pyarrow.ipc.new_file)), Loads(AB)),
    Case("an Arrow stream", file("d.arrow", arrow(AB, pyarrow.ipc.new_stream)), Loads(AB)),
    Case(
        "text named .arrow",
        file("d.arrow", "some text, not Arrow"),
        Refused("{}: not an Arrow file (Expected to read 1701670771 metadata bytes, but only read 16)"),
    ),
    Case("a folder of save_to_disk", saved, Loads(AB)),
    Case(
        "a folder of save_to_disk with splits",
        saved_splits,
        Refused("train_data: {} holds several splits; name one of its folders: test, train"),
    ),
]

SHARD_CASES = [
    Case(
        "a folder of shards",
        folder({"part-2.csv": "b,a\ny,2\n", "part-1.csv": "a,b\n1,x\n", "_SUCCESS": "", ".x.csv": "z"}),
        Loads(AB),
    ),
    Case(
        "a pattern of shards",
        folder({"d/1.jsonl": '{"a": 1}', "e/2.jsonl.gz": gzip.compress(b'{"a": 2}')}, "*/[12].jsonl*"),
        Loads([{"a": 1}, {"a": 2}]),
    ),
    Case(
        "a pattern that matches several splits",
        folder({"train.csv": "a,b\n2,y\n", "test.csv": "a,b\n1,x\n"}, "t*.csv"),
        Loads(AB, ("train_data: {} matches files of several splits (test.csv, train.csv)",)),
    ),
    Case(
        "a pattern that matches folders of several splits",
        folder(
            {"hf/train/0.jsonl": '{"a": 1}', "hf/train/1.jsonl": '{"a": 2}', "hf/test/0.jsonl": '{"a": 0}'}, "hf/*/*"
        ),
        Loads(
            [{"a": 0}, {"a": 1}, {"a": 2}],
            ("train_data: {} matches files of several splits (test/0.jsonl, train/0.jsonl)",),
        ),
    ),
    Case(
        "a pattern of the shards of one split in folders",
        folder({"train/0/x.jsonl": '{"a": 1}', "train/1/x.jsonl": '{"a": 2}'}, "*/?/x.jsonl"),
        Loads([{"a": 1}, {"a": 2}]),
    ),
    Case("a pattern that matches nothing", folder({"1.csv": CSV}, "*.tsv"), Refused("train_data: no file matches {}")),
    Case(
        "a pattern that matches what is no data",
        folder({"1.csv": CSV, "1.md": "#"}, "1.*"),
        Refused(f"train_data: {{here}}/1.md has an unknown suffix; allowed: {SUFFIXES}"),
    ),
    Case(
        "TSV shards of which one shows CSV quotes",
        folder({"0.tsv": 'text\tlabel\n"just, quoted"\t1\n', "1.tsv": QUOTED}),
        Loads(
            [
                {"text": "just, quoted", "label": "1"},
                {"text": 'He said "no".', "label": "0"},
                {"text": "plain", "label": "1"},
            ],
            (
                "quoting: {}/1.tsv has CSV's quotes, as line 2 shows, and the others are read alike (2 in all); "
                "say none if they mean themselves",
            ),
        ),
    ),
    Case(
        "TSV shards of which one forbids CSV quotes",
        folder({"0.tsv": 'text\tlabel\n"Wow!"\t1\n', "1.tsv": 'text\tlabel\n"Oh" no\t0\n', "2.tsv": "text\tlabel\n"}),
        Loads(
            [{"text": '"Wow!"', "label": "1"}, {"text": '"Oh" no', "label": "0"}],
            (
                "quoting: {}/1.tsv has quotes that mean themselves, as line 2 shows, and the others are read alike "
                "(3 in all); say csv if they are CSV's",
            ),
        ),
    ),
    Case(
        "TSV shards of which one shows what another forbids",
        folder({"0.tsv": QUOTED, "1.tsv": STRAY}),
        Refused(
            "quoting: {}/0.tsv, line 2 has CSV's quotes, which {}/1.tsv, line 2 cannot have; "
            "say csv or none if all have, or write one of them anew"
        ),
    ),
    Case(
        "the same, with quoting: none",
        folder({"0.tsv": QUOTED, "1.tsv": STRAY}),
        Loads(
            [
                {"text": '"He said ""no""."', "label": "0"},
                {"text": "plain", "label": "1"},
                {"text": '"Wow!" he said', "label": "0"},
                {"text": 'a 5" pipe', "label": "1"},
            ]
        ),
        {"quoting": "none"},
    ),
    Case(
        "shards with other columns",
        folder({"1.csv": CSV, "2.csv": "a,c\n1,x\n"}),
        Refused("train_data: {}/2.csv has other columns than {}/1.csv: only one of them has 'b', 'c'"),
    ),
    Case(
        "a folder of splits",
        folder({"train.csv": CSV, "test.csv": CSV}),
        Refused(
            "train_data: {} holds files of several splits (test.csv, train.csv); name one, or a pattern as {}/*train*"
        ),
    ),
    Case(
        "a folder of splits that other words are before",
        folder({"in_domain_train.tsv": "a\tb\n1\tx\n", "in_domain_dev.tsv": "a\tb\n2\ty\n"}),
        Refused(
            "train_data: {} holds files of several splits (in_domain_dev.tsv, in_domain_train.tsv); name one, "
            "or a pattern as {}/*train*"
        ),
    ),
    Case(
        "a folder of shards whose names hold words like a split's",
        folder({"latest-0.csv": "a,b\n1,x\n", "trainees.csv": "a,b\n2,y\n"}),
        Loads(AB),
    ),
    Case(
        "a folder of the shards of one split",
        folder({"train-00000-of-00002.csv": "a,b\n1,x\n", "train-00001-of-00002.csv": "a,b\n2,y\n"}),
        Loads(AB),
    ),
    Case(
        "a folder of files of several kinds",
        folder({"1.csv": CSV, "2.jsonl": JSONL}),
        Refused("train_data: {} holds files of several kinds; name one, as in {}/*.csv"),
    ),
    Case(
        "a folder with shards that are packed by what is not read",
        folder({"part-0.csv": CSV, "part-1.csv.xz": "x", "part-2": "x"}),
        Refused("train_data: {} holds what is not read (part-1.csv.xz, part-2); name what is, as in {}/*.csv"),
    ),
    Case(
        "a folder with shards in a folder of it",
        folder({"0.csv.gz": gzip.compress(CSV.encode()), "more/1.csv.gz": b""}),
        Refused("train_data: {} holds what is not read (more); name what is, as in {}/*.gz"),
    ),
    Case(
        "a folder with what is put beside data",
        folder(
            {
                "0.parquet": parquet(AB),
                "dataset_info.json": "{}",
                "README.md": "#",
                "LICENSE": "x",
                "readme.txt": "x",
                "plots/1.pdf": "x",
                ".cache/1.csv": "x",
            }
        ),
        Loads(AB),
    ),
    Case(
        "a folder of folders",
        folder({"train/1.csv": CSV, "test/1.csv": CSV}),
        Refused("train_data: {} is a folder without data files; it holds the folders test, train"),
    ),
    Case(
        "a folder without data",
        folder({"README.md": "#"}),
        Refused(
            "train_data: {} is a folder without data files (.jsonl, .ndjson, .json, .csv, .tsv, .txt, .parquet, .arrow)"
        ),
    ),
    Case("a file that is not there", folder({}, "d.csv"), Refused("train_data: no such file: {}")),
    Case(
        "a file of another suffix",
        file("d.xlsx", "x"),
        Refused(f"train_data: {{}} has an unknown suffix; allowed: {SUFFIXES}"),
    ),
]

CASES = [*JSON_CASES, *TABLE_CASES, *ENCODING_CASES, *PACKED_CASES, *COLUMNAR_CASES, *SHARD_CASES]
