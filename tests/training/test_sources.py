"""Reading: every format gives the same records, and every broken file one line that names the place."""

import errno
import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from bilora_ray import builtin
from bilora_ray.checking import build, completed
from bilora_ray.config import TrialConfig
from bilora_ray.errors import MachineError, UserError
from bilora_ray.training.data.sources import first_records, read_file, read_train, read_validation

ROWS = [{"text": 'a "quoted", text', "label": "0"}, {"text": "é\u2028b", "label": "1"}]


def config(**settings: Any) -> TrialConfig:
    return TrialConfig(**{"model_name_or_path": "m", "task": "causal-lm", "train_data": "d", **settings})


def written(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def fails(path: Path | str, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        read_file(str(path), config(**settings), "train_data")
    return str(caught.value)


def _content(suffix: str) -> bytes:
    if suffix == "parquet":
        sink = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), sink)
        return sink.getvalue().to_pybytes()
    text = {
        "jsonl": "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS),
        "json": json.dumps(ROWS),
        "csv": 'text,label\r\n"a ""quoted"", text",0\r\n"é\u2028b",1\r\n',
        "tsv": 'text\tlabel\na "quoted", text\t0\né\u2028b\t1\n',
    }
    return text[suffix].encode()


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_every_format_gives_the_same_columns_and_the_digest_of_its_bytes(tmp_path: Path, suffix: str) -> None:
    content = _content(suffix)
    source = read_file(written(tmp_path / f"d.{suffix}", content), config(), "train_data")
    assert [dict(record.columns) for record in source.records] == ROWS
    assert source.digest == hashlib.sha256(content).hexdigest()[:16]


@pytest.mark.parametrize(
    ("file", "content", "places"),
    [
        ("d.jsonl", '{"a": 1}\n\n   \r\n{"a": 2}\r\n', ["line 1", "line 4"]),
        ("d.json", '{"data": [{"a": 1},\n{"a": 2}]}', ["row 1", "row 2"]),
        ("d.csv", 'a,b\n"x\ny",1\n\nz,2\n', ["line 2", "line 5"]),
        ("d.tsv", "a\tb\r\n\r\nx\t1\r\n\t\r\n", ["line 3", "line 4"]),
    ],
)
def test_records_know_their_place(tmp_path: Path, file: str, content: str, places: list[str]) -> None:
    name = written(tmp_path / file, content)
    records = read_file(name, config(), "train_data").records
    assert [record.where for record in records] == [f"{name}, {place}" for place in places]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv"])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path, suffix: str) -> None:
    name = written(tmp_path / f"d.{suffix}", b"\xef\xbb\xbf" + _content(suffix))
    assert [dict(record.columns) for record in read_file(name, config(), "train_data").records] == ROWS


def test_column_names_stand_for_a_header(tmp_path: Path) -> None:
    for suffix, separator in (("csv", ","), ("tsv", "\t")):
        name = written(tmp_path / f"d.{suffix}", f"x{separator}1\ny{separator}0")
        records = read_file(name, config(column_names=("text", "label")), "train_data").records
        assert [record.columns for record in records] == [{"text": "x", "label": "1"}, {"text": "y", "label": "0"}]


@pytest.mark.parametrize(
    ("file", "content", "looked", "before"),
    [
        ("t.tsv", 'a\tb\n"x ""y"""\t1\n', 'x "y"', '"x ""y"""'),
        ("t.csv", 'a,b\n"x, y",1\n', "x, y", "x, y"),
        ("t.csv", "a;b\nx;1\n", "x", None),
    ],
)
def test_what_began_before_tables_were_looked_at_reads_them_by_their_suffix(
    tmp_path: Path, file: str, content: str, looked: str, before: str | None
) -> None:
    stored = {"model_name_or_path": "m", "task": "causal-lm", "train_data": written(tmp_path / file, content)}
    for settings, expected in ((stored, looked), (completed(TrialConfig, stored), before)):
        (record,) = read_train(build(TrialConfig, settings, "w")).records
        assert record.columns.get("a") == expected
    tabs = completed(TrialConfig, {**stored, "delimiter": content[1]})
    (record,) = read_train(build(TrialConfig, tabs, "w")).records
    assert len(record.columns) == 2


def test_a_file_that_is_missing_or_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fails(tmp_path / "no.jsonl") == f"train_data: no such file: {tmp_path / 'no.jsonl'}"
    name = written(tmp_path / "d.jsonl", "{}")

    def denied(path: Path, mode: str) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    assert fails(name) == f"train_data: cannot read {name} (Permission denied)"


def test_a_builtin_name_reads_the_file_in_the_package() -> None:
    source = read_train(config(train_data="builtin:quickstart/validation.jsonl"))
    assert len(source.records) == 200
    assert source.records[0].where == "builtin:quickstart/validation.jsonl, line 1"


def test_unknown_built_in_data() -> None:
    known = ", ".join(sorted(builtin.NAMES))
    assert fails("builtin:nothing") == f"train_data: no built-in 'nothing'; allowed: {known}"


def test_shards_have_one_digest_of_their_bytes_in_order_and_one_alone_its_own(tmp_path: Path) -> None:
    one, two = b"a\n1\n", b"a\n2\n"
    written(tmp_path / "1.csv", one)
    alone = read_file(f"{tmp_path}/*.csv", config(), "train_data").digest
    written(tmp_path / "2.csv", two)
    both = read_file(str(tmp_path), config(), "train_data").digest
    parts = "\n".join(hashlib.sha256(part).hexdigest() for part in (one, two))
    assert (alone, both) == (
        hashlib.sha256(one).hexdigest()[:16],
        hashlib.sha256(parts.encode()).hexdigest()[:16],
    )
    assert read_file(f"{tmp_path}/?.csv", config(), "train_data").digest == both


def test_first_records_open_no_further_file_and_ask_no_hub(tmp_path: Path) -> None:
    written(tmp_path / "1.jsonl", '{"a": 1}\n{"a": 2}\n{"a": ')
    written(tmp_path / "2.jsonl", b"\xff")
    found = first_records(config(train_data=str(tmp_path), validation_data="org/data"), 2)
    assert {key: [record.columns for record in records] for key, records in found.items()} == {
        "train_data": [{"a": 1}, {"a": 2}]
    }


class Hub:
    """Stands for the Hub: one data set with two splits."""

    def __init__(self) -> None:
        self.revisions: list[str | None] = []

    def load(self, name: str, config_name: str | None, split: str, revision: str | None) -> Any:
        import datasets

        self.revisions.append(revision)
        if name != "org/data":
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist on the Hub\nmore")
        if split not in ("train", "dev"):
            raise ValueError(f'Unknown split "{split}".')
        return datasets.Dataset.from_list([{"prompt": split, "completion": str(config_name)}] * 2)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    import datasets

    fake = Hub()
    monkeypatch.setattr(datasets, "load_dataset", fake.load)
    return fake


@pytest.mark.usefixtures("hub")
def test_hub_splits() -> None:
    hub_config = config(train_data="org/data", dataset_config_name="c", validation_split="dev")
    train, validation = read_train(hub_config), read_validation(hub_config)
    assert validation is not None
    assert [record.where for record in train.records] == ["org/data/c, train row 1", "org/data/c, train row 2"]
    assert validation.records[1].columns == {"prompt": "dev", "completion": "c"}
    assert validation.records[1].where == "org/data/c, dev row 2"
    assert len(train.digest) == len(validation.digest) == 16
    assert train.digest == read_train(hub_config).digest != validation.digest
    assert read_validation(config(train_data="org/data")) is None


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"train_data": "org/no"},
            "train_data: cannot load 'org/no', split 'train' (Dataset 'org/no' doesn't exist on the Hub)",
        ),
        (
            {"train_data": "org/data", "train_split": "x"},
            "train_data: cannot load 'org/data', split 'x' (Unknown split \"x\".)",
        ),
        (
            {"train_data": "org/data", "validation_split": "x"},
            "validation_split: cannot load 'org/data', split 'x' (Unknown split \"x\".)",
        ),
        (
            {"train_data": "org/data", "validation_data": "org/no", "validation_split": "x"},
            "validation_data: cannot load 'org/no', split 'x' (Dataset 'org/no' doesn't exist on the Hub)",
        ),
        (
            {"train_data": "org/data", "validation_data": "org/data"},
            "validation_split: missing; it says which split of 'org/data' to validate on",
        ),
    ],
)
def test_hub_errors_are_one_line(settings: dict[str, str], message: str) -> None:
    read = read_validation if message.startswith("validation") else read_train
    with pytest.raises(UserError) as caught:
        read(config(**settings))
    assert str(caught.value) == message


def test_each_data_set_is_read_at_its_own_revision(hub: Hub) -> None:
    both = {"train_data": "org/data", "train_revision": "a", "validation_split": "dev"}
    read_train(config(**both))
    read_validation(config(**both))
    read_validation(config(**both, validation_data="org/data", validation_revision="b"))
    assert hub.revisions == ["a", "a", "b"]
    with pytest.raises(UserError, match=r"^validation_revision: is of validation_data, which is absent"):
        read_validation(config(**both, validation_revision="b"))


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ConnectionError("Couldn't reach 'org/data' on the Hub (ConnectTimeout)"), MachineError),
        (OSError("Not enough disk space. Needed: 3 GB (download: 1 GB, generated: 2 GB)"), MachineError),
        (OSError(errno.EIO, "Input/output error", "a.arrow"), MachineError),
        (ImportError("To support decoding images, please install 'Pillow'."), UserError),
        (RuntimeError("Dataset scripts are no longer supported, but found data.py"), UserError),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_hub_or_disk_that_fails_is_told_from_data_that_cannot_be_read(
    error: Exception, kind: type[UserError], monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    def failing(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", failing)
    with pytest.raises(UserError, match=r"^train_data: cannot load 'org/data', split 'train' \(") as caught:
        read_train(config(train_data="org/data"))
    assert type(caught.value) is kind


def test_a_file_on_a_disk_that_fails_is_no_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = written(tmp_path / "d.jsonl", "{}")

    def failing(path: Path, mode: str) -> Any:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(Path, "open", failing)
    with pytest.raises(MachineError, match=r"^train_data: cannot read .* \(Stale file handle\)$"):
        read_file(name, config(), "train_data")


def test_a_file_has_no_splits(tmp_path: Path) -> None:
    name = written(tmp_path / "d.jsonl", '{"prompt": "a", "completion": "b"}')
    with pytest.raises(UserError) as caught:
        read_validation(config(train_data=name, validation_split="dev"))
    assert str(caught.value) == f"validation_split: {name} has no splits; name a file in validation_data"
