"""Every kind of file loads right, or one line says what to add: the cases are in `file_cases.py`."""

import csv
import io
import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
from training.file_cases import CASES, QUOTED, STRAY, TYPED, Case, Loads, file, parquet

from bilora_ray.config import TrialConfig
from bilora_ray.errors import UserError
from bilora_ray.training.data import sources
from bilora_ray.training.data.columns import text_of
from bilora_ray.training.data.files.decoding import DataFile
from bilora_ray.training.data.files.tables import quotes_among
from bilora_ray.training.data.sources import first_records, notes, read_file
from bilora_ray.training.rows import load_rows
from bilora_ray.training.rows import notes as row_notes
from bilora_ray.training.tasks.sequence_classification import LabelledRow
from bilora_ray.training.tasks.text import TextRow


def config(train_data: str = "d", **settings: Any) -> TrialConfig:
    return TrialConfig(**{"model_name_or_path": "m", "task": "causal-lm", "train_data": train_data, **settings})


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_file_loads_or_one_line_says_what_to_add(case: Case, tmp_path: Path) -> None:
    name = case.make(tmp_path)
    settings = config(name, **case.settings)
    if isinstance(case.outcome, Loads):
        source = read_file(name, settings, "train_data")
        assert [dict(record.columns) for record in source.records] == case.outcome.rows
        assert list(notes(settings)) == [note.replace("{}", name) for note in case.outcome.notes]
        assert first_records(settings, 1) == {"train_data": source.records[:1]}
    else:
        with pytest.raises(UserError) as caught:
            read_file(name, settings, "train_data")
        assert str(caught.value) == case.outcome.line.replace("{here}", str(tmp_path)).replace("{}", name)


EMPTY = [{"text": "a", "pair": "x", "label": 0}, {"text": None, "pair": "", "label": 1}]


def _written(here: Path, suffix: str, empty: Any) -> str:
    rows = [{key: empty if value in (None, "") else value for key, value in row.items()} for row in EMPTY]
    if suffix == ".parquet":
        return file("d.parquet", parquet(rows))(here)
    if suffix == ".jsonl":
        return file("d.jsonl", "".join(json.dumps(row) + "\n" for row in rows))(here)
    delimiter = {".csv": ",", ".tsv": "\t"}[suffix]
    cells = [list(rows[0]), *([str(value or "") if value != 0 else "0" for value in row.values()] for row in rows)]
    return file(f"d{suffix}", "".join(delimiter.join(row) + "\n" for row in cells))(here)


@pytest.mark.parametrize("empty", ["", None])
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_an_empty_text_is_read_and_told_and_an_empty_label_is_refused(suffix: str, empty: Any, tmp_path: Path) -> None:
    name = _written(tmp_path, suffix, empty)
    settings = {"train_data": name, "validation_data": name, "task": "sequence-classification"}
    config = TrialConfig(model_name_or_path="m", text_pair_column="pair", **settings)
    dataset = load_rows(config)
    assert [(row.text, row.text_pair) for row in dataset.train if isinstance(row, LabelledRow)] == [
        ("a", "x"),
        ("", ""),
    ]
    place = f"{name}, {'row' if suffix == '.parquet' else 'line'} {3 if suffix in ('.csv', '.tsv') else 2}"
    told = [line for line in row_notes(dataset, config, 1) if "empty" in line]
    assert told == [
        f"{setting}: 1 of 2 {kind} rows have an empty {what}, the first is {place}"
        for setting, kind in (("train_data", "training"), ("validation_data", "validation"))
        for what in ("text", "text pair")
    ]
    with pytest.raises(UserError) as caught:
        load_rows(TrialConfig(model_name_or_path="m", label_column="pair", **settings))
    assert str(caught.value) == f"{place}: column 'pair' has no value"


def test_a_prompt_with_an_empty_column_is_read_and_one_with_nothing_is_told(tmp_path: Path) -> None:
    rows = [{"ask": "a", "input": None, "say": "b"}, {"ask": "", "input": None, "say": None}]
    name = file("d.parquet", parquet(rows))(tmp_path)
    data = {"train_data": name, "validation_data": name, "completion_template": "{say}"}
    settings = config(**data, prompt_template="{ask}\nInput: {input}")
    dataset = load_rows(settings)
    assert [(row.prompt, row.completion) for row in dataset.train if isinstance(row, TextRow)] == [
        ("a\nInput: ", "b"),
        ("\nInput: ", ""),
    ]
    assert [line for line in row_notes(dataset, settings, 1) if line.startswith("train_data")] == [
        f"train_data: 1 of 2 training rows have an empty prompt, the first is {name}, row 2",
        "train_data: 1 of 2 training rows have an empty completion",
    ]


def _steps(name: str, *settings: dict[str, Any]) -> list[str]:
    """What is said of a file under growing settings, and of the last ones how many rows there are."""
    given: dict[str, Any] = {"model_name_or_path": "m", "task": "sequence-classification", "train_data": name}
    told = []
    for more in settings:
        try:
            rows = load_rows(TrialConfig(**(given := {**given, **more})))
            told.append(f"{len(rows.train) + len(rows.validation)} rows, labels {rows.label_names}")
        except UserError as error:
            told.append(str(error))
    return told


def test_a_kaggle_file_needs_the_keys_that_its_errors_name(tmp_path: Path) -> None:
    content = "v1,v2,,,\r\n" + 'ham,"Go, 50£ off",,,\r\nspam,"FREE ""entry""",,,\r\n' * 10
    name = file("spam.csv", content, "cp1252")(tmp_path)
    steps = ({}, {"encoding": "cp1252"}, {"label_column": "v1"}, {"text_column": "v2"})
    columns = "columns: v1, v2, column_3, column_4, column_5"
    assert _steps(name, *steps) == [
        f"{name}, line 2: not UTF-8 (byte 0xa3); name its encoding, such as encoding: cp1252 ('50£')",
        f"{name}, line 2: no column 'label' (label_column); {columns}",
        f"{name}, line 2: no column 'text' (text_column); {columns}",
        "20 rows, labels ('ham', 'spam')",
    ]


def test_a_table_like_colas_needs_the_keys_that_its_errors_name(tmp_path: Path) -> None:
    content = "".join(f'gj04\t{number % 2}\t{"*" * (1 - number % 2)}\tThey "go" {number}.\n' for number in range(1, 9))
    name = file("in_domain_train.tsv", content)(tmp_path)
    names = {"column_names": ("source", "label", "mark", "sentence")}
    assert _steps(name, {}, names, {"text_column": "sentence"}) == [
        f"{name}, line 2: no column 'label' (label_column); columns: gj04, 1, column_3, They \"go\" 1.; "
        "if the file has no header, column_names names them",
        f"{name}, line 1: no column 'text' (text_column); columns: source, label, mark, sentence",
        "8 rows, labels ('0', '1')",
    ]


def test_a_table_of_pairs_like_mrpcs_is_read_with_its_quotes(tmp_path: Path) -> None:
    header = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
    rows = '1\t7\t8\t"He said, ""No."""\tNo, he said.\n0\t7\t9\tIt fell 5%.\t"A ""quote""."\n'
    name = file("msr.tsv", header + rows * 4)(tmp_path)
    columns = {"label_column": "Quality", "text_column": "#1 String", "text_pair_column": "#2 String"}
    assert _steps(name, {}, columns) == [
        f"{name}, line 2: no column 'label' (label_column); columns: Quality, #1 ID, #2 ID, #1 String, #2 String",
        "8 rows, labels ('0', '1')",
    ]
    [record] = list(read_file(name, config(), "train_data").records)[:1]
    assert (record.columns["#1 String"], record.columns["#2 String"]) == ('He said, "No."', "No, he said.")


def test_training_and_validation_tables_are_read_alike(tmp_path: Path) -> None:
    train = file("train.tsv", 'text\tlabel\n"just, quoted"\t0\nplain\t1\n')(tmp_path)
    other = file("dev.tsv", 'text\tlabel\n"He said ""no""."\t0\nplain\t1\n')(tmp_path)
    settings = config(train, validation_data=other, prompt_template="{label}", completion_template="{text}")
    dataset = load_rows(settings)
    assert [row.completion for row in (*dataset.train, *dataset.validation) if isinstance(row, TextRow)] == [
        *("just, quoted", "plain"),
        *('He said "no".', "plain"),
    ]
    assert list(notes(settings)) == [
        f"quoting: {other} has CSV's quotes, as line 2 shows, and the others are read alike (2 in all); "
        "say none if they mean themselves"
    ]
    Path(other).write_text('text\tlabel\n"No" he said\t0\n')
    Path(train).write_text('text\tlabel\n"He said ""no""."\t0\n')
    for read in (load_rows, lambda settings: first_records(settings, 1)):
        with pytest.raises(UserError) as caught:
            read(settings)
        assert str(caught.value) == (
            f"quoting: {train}, line 2 has CSV's quotes, which {other}, line 2 cannot have; "
            "say csv or none if all have, or write one of them anew"
        )


def test_a_csv_beside_a_table_between_tabs_keeps_its_own_quotes(tmp_path: Path) -> None:
    train = file("train.csv", 'text,label\n"a, b",1\n"c",0\n')(tmp_path)
    other = file("dev.tsv", 'text\tlabel\n"No" he said\t0\n')(tmp_path)
    settings = config(train, validation_data=other)
    records = [*read_file(train, settings, "train_data").records, *read_file(other, settings, "train_data").records]
    assert [record.columns["text"] for record in records] == ["a, b", "c", '"No" he said']


@pytest.mark.parametrize(
    ("last", "whole"),
    [(b'"a ""b"""\t1\n', "plain"), (b'5" pipe\t1\n', '"plain"'), (b"\xff\t1\n", None)],
    ids=["shows", "forbids", "damaged"],
)
def test_a_look_and_a_dry_run_of_large_tables_see_the_beginning_of_their_quotes_and_a_search_all(
    last: bytes, whole: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = file("d.tsv", b"text\tlabel\n" + b'"plain"\t1\n' * 150 + last)(tmp_path)
    settings = config(name, prompt_template="{label}", completion_template="{text}")
    monkeypatch.setattr(sources, "BEGINNING", 20)
    assert first_records(settings, 1)["train_data"][0].columns["text"] == '"plain"'
    monkeypatch.setattr(sources, "LARGE", 100)
    looked = load_rows(settings, beginning=True)
    assert {row.completion for row in looked.train if isinstance(row, TextRow)} == {'"plain"'}
    told = list(row_notes(looked, settings, 1))
    assert "quoting: only the first 20 lines of a table were looked at for quotes; a search looks at all" in told
    if whole is None:
        with pytest.raises(UserError, match="line 152: not UTF-8"):
            load_rows(settings)
        return
    found = load_rows(settings)
    assert next(row.completion for row in found.train if isinstance(row, TextRow)) == whole
    assert not any("only the first" in line and line.startswith("quoting") for line in row_notes(found, settings, 1))


def test_a_beginning_that_shows_csv_quotes_refuses_nothing_that_the_whole_takes(tmp_path: Path) -> None:
    shows = DataFile(Path(file("a.tsv", QUOTED * 10 + 'a 5" pipe\t1\n')(tmp_path)), "a.tsv", "train_data")
    forbids = DataFile(Path(file("b.tsv", STRAY)(tmp_path)), "b.tsv", "train_data")
    for most in (8, None):
        found = quotes_among([shows, forbids], config(), most)
        assert found is not None
        assert found.are_csv is False


def test_decimals_and_dates_are_written_as_they_are(tmp_path: Path) -> None:
    name = file("d.parquet", parquet(TYPED))(tmp_path)
    [record] = read_file(name, config(), "train_data").records
    assert [text_of(record, column) for column in ("price", "day", "at")] == [
        "1.50",
        "2024-05-01",
        "2024-05-01 12:30:00",
    ]


def test_tables_are_cut_as_by_the_plainest_code(tmp_path: Path) -> None:
    random = Random(0)
    for number in range(100):
        cells = ["".join(random.choices('ab "é\u2028\x85', k=random.randrange(4))) for _ in range(6)]
        text = "\r\n".join(["x\ty", '1" a\t"b', *("\t".join(cells[i : i + 2]) for i in (0, 2, 4))])
        name = file(f"{number}.tsv", text)(tmp_path)
        rows = [line.split("\t") for line in text.split("\r\n")[1:]]
        assert [list(record.columns.values()) for record in read_file(name, config(), "train_data").records] == rows
        quoted = [f'"{cell.replace(chr(34), chr(34) * 2)}\r"' for cell in cells]
        text = "\n".join(["x,y", *(",".join(quoted[i : i + 2]) for i in (0, 2, 4))])
        name = file(f"{number}.csv", text)(tmp_path)
        rows = list(csv.reader(io.StringIO(text, newline="")))[1:]
        assert [list(record.columns.values()) for record in read_file(name, config(), "train_data").records] == rows


def test_no_two_cases_have_one_name() -> None:
    assert len({case.id for case in CASES}) == len(CASES)
