"""Data too large for the memory: the same rows and examples as ever, none of which is kept there."""

from __future__ import annotations

import errno
import gzip
import json
import signal
import subprocess
import sys
import threading
import tracemalloc
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_trials import TASKS, Tiny, reproducible, run_fit, write_rows

from bilora_ray.config import TrialConfig
from bilora_ray.errors import MachineError, UserError
from bilora_ray.measures import TASK_FACTS, Task
from bilora_ray.search.session import Session
from bilora_ray.search.space import Space
from bilora_ray.search.space_file import load_space
from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.studies import check_study, open_study
from bilora_ray.training import loading
from bilora_ray.training.data import sources
from bilora_ray.training.data.cache import BATCH, Stored, Writer, cached
from bilora_ray.training.data.sources import BEGINNING, Record, Reread, read_file
from bilora_ray.training.loading import Loaded, load_data
from bilora_ray.training.rehearsal import rehearse
from bilora_ray.training.rows import about, load_rows, notes
from bilora_ray.training.tasks.base import Example

Large = Callable[[], None]
READING = TrialConfig(model_name_or_path="m", task="causal-lm", train_data="d")


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> Large:
    """When called: from then on everything is too large, and nothing has been loaded."""

    def everything_is() -> None:
        monkeypatch.setattr(sources, "LARGE", 0)
        loading._kept.clear()

    return everything_is


def texts(path: Path, count: int, **more: Any) -> TrialConfig:
    write_rows(path, [{"prompt": f"say {i}", "completion": "x" * (i % 7)} for i in range(count)])
    return TrialConfig(model_name_or_path="m", task="causal-lm", train_data=str(path), **more)


# Rows


def is_large(path: Path, content: bytes) -> bool:
    path.write_bytes(content)
    return read_file(str(path), READING, "train_data").is_large


def test_what_can_be_read_by_rows_is_by_whichever_name(tmp_path: Path, large: Large) -> None:
    large()
    for suffix in ("jsonl", "json"):
        path = tmp_path / f"d.{suffix}"
        assert is_large(path, b'{"a": 1}\n{"a": 2}\n')
        assert not is_large(path, b'[{"a": 1},\n{"a": 2}]')


def test_a_packed_file_is_as_large_as_what_it_packs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = gzip.compress(b'{"a": 1}\n' * 1000)
    monkeypatch.setattr(sources, "LARGE", 5 * len(content))
    assert is_large(tmp_path / "d.jsonl.gz", content)
    assert not is_large(tmp_path / "d.jsonl", b'{"a": 1}\n')


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_a_large_file_has_the_same_records_at_each_pass(tmp_path: Path, suffix: str, large: Large) -> None:
    path = tmp_path / f"d.{suffix}"
    rows = [{"a": f"{i}", "b": "é\u2028"} for i in range(5)]
    if suffix == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif suffix in ("jsonl", "json"):
        lines = [json.dumps(row) for row in rows]
        path.write_text("\n".join(lines) if suffix == "jsonl" else f"[{', '.join(lines)}]")
    else:
        separator = "," if suffix == "csv" else "\t"
        path.write_text("\n".join(separator.join(cells) for cells in [("a", "b"), *(row.values() for row in rows)]))
    small = read_file(str(path), READING, "train_data")
    large()
    found = read_file(str(path), READING, "train_data")
    assert found.is_large is (suffix != "json")
    assert list(found.records) == list(found.records) == small.records
    assert len(found.records) == 5
    assert (found.digest, found.size) == (small.digest, small.size) == (small.digest, path.stat().st_size)


def test_a_large_hub_data_set_is_read_from_the_disk(monkeypatch: pytest.MonkeyPatch, large: Large) -> None:
    import datasets

    made = datasets.Dataset.from_list([{"prompt": f"{i}", "completion": "c"} for i in range(4)])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: made)
    config = TrialConfig(model_name_or_path="m", task="causal-lm", train_data="org/data", seed=1)
    small = load_rows(config)
    large()
    found = load_rows(config)
    assert not isinstance(found.train, list)
    assert (list(found.train), list(found.validation)) == (small.train, small.validation)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"split_seed": 3, "validation_fraction": 0.4},
        {"max_train_samples": 7},
        {"max_train_samples": 1000, "max_eval_samples": 2},
        {"max_eval_samples": 1000},
    ],
    ids=str,
)
@pytest.mark.parametrize("own_validation", [False, True])
def test_the_same_rows_are_held_out_and_drawn(
    settings: dict[str, Any], own_validation: bool, tmp_path: Path, large: Large
) -> None:
    config = texts(tmp_path / "train.jsonl", 40, **settings)
    if own_validation:
        other = texts(tmp_path / "validation.jsonl", 9).train_data
        config = config.model_copy(update={"validation_data": other})
    small = load_rows(config)
    large()
    found = load_rows(config)
    assert isinstance(found.train, Reread)
    assert isinstance(found.validation, Reread)
    for rows, kept in ((found.train, small.train), (found.validation, small.validation)):
        assert list(rows) == list(rows) == kept
        assert len(rows) == len(kept)
        assert next(iter(kept)) in rows
    assert "x" not in found.train
    assert (found.digests, found.label_names) == (small.digests, small.label_names)


@pytest.mark.parametrize(
    ("last", "message"),
    [
        ('{"prompt": "a"}', "{}, line 6: no column 'completion' (completion_template); columns: prompt"),
        ('{"prompt": ', "{}, line 6: not valid JSON (Expecting value: column 12)"),
        ("[1]", '{}, line 6: must be an object, such as {{"text": ...}}, not list'),
        (b"\xff", "{}, line 6: not UTF-8 (byte 0xff); name its encoding, such as encoding: cp1252 ('ÿ')"),
    ],
)
def test_each_row_of_a_large_file_is_checked(tmp_path: Path, last: str | bytes, message: str, large: Large) -> None:
    path = tmp_path / "d.jsonl"
    config = texts(path, 5)
    path.write_bytes(path.read_bytes() + (last if isinstance(last, bytes) else last.encode()))
    large()
    with pytest.raises(UserError) as caught:
        load_rows(config)
    assert str(caught.value) == message.format(path)


def test_a_large_file_without_rows(tmp_path: Path, large: Large) -> None:
    (tmp_path / "d.jsonl").write_text("\n\n")
    large()
    with pytest.raises(UserError) as caught:
        read_file(str(tmp_path / "d.jsonl"), READING, "train_data")
    assert str(caught.value) == f"train_data: no rows in {tmp_path / 'd.jsonl'}"


def test_a_file_that_is_written_to_between_two_passes(tmp_path: Path, large: Large) -> None:
    path = tmp_path / "d.jsonl"
    config = texts(path, 5)
    large()
    rows = load_rows(config)
    path.write_text(path.read_text() + '{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(MachineError) as caught:
        list(rows.train)
    assert str(caught.value) == f"train_data: {path} was written to while it was in use"


def test_no_row_of_a_large_file_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = texts(tmp_path / "d.jsonl", 5_000)
    monkeypatch.setattr(sources, "LARGE", 1000)
    load_rows(config)  # what is imported is no part of it
    tracemalloc.start()
    dataset = load_rows(config)
    assert sum(len(row.where) for row in dataset.train) > 4_500
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(dataset.train) == 4_500
    # A byte for each row of each split, and the order of the split while it is made: 16 bytes a row. Rows take 400.
    assert peak < 60 * 5_000


LABELLED: dict[Task, list[Any]] = {
    "sequence-classification": ["a", "b", "a", "c", "a", "b", "a"],
    "multi-label-classification": [["a"], ["b", "a"], [], ["c", "b"], ["a"], [], ["b", "a", "c"]],
}


def of_labels(task: Task, folder: Path, **settings: Any) -> TrialConfig:
    rows = [{"text": f"{i}", "label": LABELLED[task][i * i % 7]} for i in range(60)]
    data = {"train_data": str(write_rows(folder / "train.jsonl", rows))}
    if settings.pop("own_validation", False):
        data["validation_data"] = str(write_rows(folder / "validation.jsonl", rows[:20]))
    return TrialConfig(model_name_or_path="m", task=task, **data, **settings)


@pytest.mark.parametrize("task", LABELLED)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_train_samples": 13, "max_eval_samples": 3, "validation_fraction": 0.3, "seed": 4},
        {"max_train_samples": 13, "max_eval_samples": 5, "own_validation": True},
        {"max_train_samples": 13, "max_eval_samples": 5, "own_validation": True, "stratify": False},
    ],
    ids=str,
)
def test_rows_of_labels_are_held_out_drawn_and_counted_as_ever(
    task: Task, settings: dict[str, Any], tmp_path: Path, large: Large
) -> None:
    config = of_labels(task, tmp_path, **settings)
    small = load_rows(config)
    told = about(small, config), list(notes(small, config, 1))
    large()
    found = load_rows(config)
    assert isinstance(found.train, Reread)
    assert (list(found.train), list(found.validation)) == (small.train, small.validation)
    assert (len(found.train), len(found.validation)) == (len(small.train), len(small.validation))
    assert (about(found, config), list(notes(found, config, 1))) == told


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many records each pass over files gave that went to their end."""
    found, records = list[int](), sources._records

    def counted(*arguments: Any) -> Iterator[Record]:
        each = list(records(*arguments))
        yield from each
        found.append(len(each))

    monkeypatch.setattr(sources, "_records", counted)
    return found


@pytest.mark.parametrize("task", LABELLED)
@pytest.mark.parametrize("drawn", [{}, {"max_train_samples": 13, "max_eval_samples": 3}], ids=str)
def test_a_large_file_is_read_for_its_labels_and_to_check_it(
    task: Task, drawn: dict[str, Any], tmp_path: Path, passes: list[int], large: Large
) -> None:
    config = of_labels(task, tmp_path, **drawn)
    large()
    about(load_rows(config), config)
    assert passes == [60, 60]
    passes.clear()
    about(load_rows(config.model_copy(update={"label_names": ("a", "b", "c")})), config)
    assert passes == [60]


def test_a_trial_reads_a_large_file_twice_more_to_tokenize_it(tiny: Tiny, passes: list[int], large: Large) -> None:
    large()
    load_data(tiny.config("sequence-classification", validation_data=None))
    assert passes == [44] * 4


# A part of them


def test_a_dry_run_looks_at_the_beginning_and_says_so(tiny: Tiny, tmp_path: Path, large: Large) -> None:
    config = texts(tmp_path / "d.jsonl", BEGINNING + 1)
    with (tmp_path / "d.jsonl").open("a") as file:
        file.write("wrong\n")
    config = config.model_copy(update={"model_name_or_path": str(tiny.model("causal-lm"))})
    large()
    looked = load_rows(config, beginning=True)
    assert len(looked.train) + len(looked.validation) == BEGINNING
    size = f"{(tmp_path / 'd.jsonl').stat().st_size / 1e9:.1f}"
    told, *_ = notes(looked, config, 1)
    assert told == f"train_data: only the first 10000 rows were looked at, of {size} GB; a search reads all"
    found = rehearse(config)
    assert {split: counts.rows for split, counts in found.rows.items()} == {"train": 9000, "validation": 1000}
    with pytest.raises(UserError, match=f"line {BEGINNING + 2}: not valid JSON"):
        load_rows(config)


def test_notes_of_large_data_say_of_which_rows_they_are(tmp_path: Path, large: Large) -> None:
    config = texts(tmp_path / "d.jsonl", 12_000)
    large()
    told, empty, *_ = notes(load_rows(config), config, 1)
    checked = "each of the 10800 training and 1200 validation rows was checked"
    assert told == f"train_data: {checked}; what is noted of them is of the first 10000 of each"
    assert empty.endswith("of 10000 training rows have an empty completion")


def test_notes_of_large_data_that_are_few_are_of_all_rows(tmp_path: Path, large: Large) -> None:
    config = texts(tmp_path / "d.jsonl", 40, per_device_train_batch_size=99)
    small = list(notes(load_rows(config), config, 1))
    large()
    assert list(notes(load_rows(config), config, 1)) == small != []
    assert next(notes(load_rows(config, beginning=True), config, 1)).startswith("train_data: only the first")


def labelled(path: Path, labels: str) -> str:
    return str(write_rows(path, [{"text": f"{i}", "label": label} for i, label in enumerate(labels)]))


def test_a_label_that_comes_late_is_no_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: Large) -> None:
    train, other = labelled(tmp_path / "train.jsonl", "aaabbc"), labelled(tmp_path / "other.jsonl", "abc")
    config = TrialConfig(model_name_or_path="m", task="sequence-classification", train_data=train)
    monkeypatch.setattr(sources, "BEGINNING", 3)
    large()
    assert load_rows(config).label_names == ("a", "b", "c")
    named = config.model_copy(update={"validation_data": other})
    assert load_rows(named, beginning=True).label_names == ("a", "b", "c")
    # Of a file that is sorted by label all rows are asked for it.
    looked = load_rows(config, beginning=True)
    assert looked.label_names == ("a", "b", "c")
    assert len(looked.train) + len(looked.validation) == 3
    assert about(looked, config)[0] == "train labels: 'a' 2"
    assert next(notes(looked, config, 1)).startswith("train_data: only the first")
    labelled(tmp_path / "train.jsonl", "aaaaaa")
    with pytest.raises(UserError) as caught:
        load_rows(config, beginning=True)
    assert str(caught.value) == f"train_data: every label in {train} is 'a'; two or more are needed"


# Examples


def prepared(loaded: Loaded) -> tuple[Any, ...]:
    return list(loaded.train), list(loaded.validation), loaded.truncation, loaded.label_names, loaded.digests


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("shares", [False, True])
def test_examples_in_files_are_those_in_memory(
    task: Task, shares: bool, tiny: Tiny, tmp_path: Path, large: Large
) -> None:
    config = tiny.config(task, validation_data=None, max_length=24, predict_with_generate=TASK_FACTS[task].generates)
    small = load_data(config)
    large()
    found = load_data(config, tmp_path / "examples" if shares else None)
    assert isinstance(found.train, Stored)
    assert prepared(found) == prepared(small)
    assert found.validation[:2] == small.validation[:2]
    assert found.train[-1] == small.train[-1]
    with pytest.raises(IndexError):
        found.train[len(small.train)]


def test_a_trial_on_large_data_computes_the_same(tiny: Tiny, tmp_path: Path, large: Large) -> None:
    config = tiny.config("causal-lm", validation_data=None, max_steps=4)
    small, _ = run_fit(config, tmp_path / "small")
    large()
    found, _ = run_fit(config, tmp_path / "large")
    assert reproducible(found) == reproducible(small)
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("small", "large")] == ["examples"]


def test_other_processes_read_what_one_has_written(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: Large
) -> None:
    config = tiny.config("causal-lm", train_data=str(write_rows(tmp_path / "d.jsonl", [ROW] * 9)), split_seed=0)
    large()
    first = prepared(load_data(config, tmp_path / "examples"))
    rows_of = loading.rows_of
    monkeypatch.setattr(loading, "rows_of", None)
    large()
    assert prepared(load_data(config.model_copy(update={"rank": 3, "seed": 5}), tmp_path / "examples")) == first
    for changed in ({"max_length": 10}, {"split_seed": 1}, {"model_name_or_path": str(tiny.model("seq2seq-lm"))}):
        with pytest.raises(TypeError, match="not callable"):  # it would read
            load_data(config.model_copy(update=changed), tmp_path / "examples")
    monkeypatch.setattr(loading, "rows_of", rows_of)
    write_rows(tmp_path / "d.jsonl", [ROW] * 10)
    assert len(load_data(config, tmp_path / "examples").train) == 10


def test_an_evaluation_tokenizes_no_row_to_train_on(tiny: Tiny, large: Large) -> None:
    config = tiny.config("causal-lm")
    small = load_data(config)
    only = load_data(config, splits=("validation",))
    large()
    for found in (only, load_data(config, splits=("validation",))):
        assert list(found.validation) == small.validation
        assert not len(found.train)
        assert found.truncation == {"validation": small.truncation["validation"]}


def test_wrong_rows_leave_no_examples(tmp_path: Path, tiny: Tiny, large: Large) -> None:
    large()
    with pytest.raises(UserError, match="line 1: no column 'nothing'"):
        load_data(tiny.config("causal-lm", prompt_template="{nothing}"), tmp_path / "examples")
    assert [path.suffix for path in (tmp_path / "examples").iterdir()] == [".lock"]


def space(tiny: Tiny) -> Space:
    trial = tiny.config("causal-lm").model_dump(exclude_unset=True)
    return load_space(None, ["study.name=s", "study.num_trials=1", *(f"trial.{k}={v}" for k, v in trial.items())])


def test_the_end_of_a_study_frees_the_disk(tiny: Tiny, tmp_path: Path) -> None:
    study = open_study(space(tiny), Layout(tmp_path), {})
    (number,) = study.next_trials()
    examples = study.folder(number).examples
    examples.mkdir()
    silent: Any = SimpleNamespace(close=lambda *_: None)
    session = Session(study, silent, Future())
    session._close(silent)
    assert examples.is_dir()
    study.fail(number, "why", by_settings=False)
    session._close(silent)
    assert not examples.exists()


def test_examples_beside_the_trials_are_none(tiny: Tiny, tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    layout.make("s")
    examples = layout.trial("s", 0).examples
    assert examples.parent == layout.trials("s")
    examples.mkdir()
    check_study(space(tiny), layout, False, {})
    layout.trial("s", 0).path.mkdir()
    with pytest.raises(UserError, match="holds trials that the study database does not know"):
        check_study(space(tiny), layout, False, {})


# Files

ROW = {"prompt": "say red 1 times:", "completion": "red"}


@pytest.mark.parametrize("count", [0, 1, BATCH - 1, BATCH, 2 * BATCH + 1])
def test_what_is_written_is_read(count: int, tmp_path: Path) -> None:
    examples = [
        Example(
            array("i", range(i % 5)),
            array("i", [-100, i]),
            prompt_ids=array("i", [2**31 - 1]) if i % 2 else None,
            token_type_ids=None if i % 3 else array("i"),
            reference="é" * (i % 4),
        )
        for i in range(count)
    ]
    with Writer(tmp_path / "x.arrow", Example) as writer:
        for one in range(0, count, 700):
            writer.extend(examples[one : one + 700])
    found = Stored(tmp_path / "x.arrow", Example)
    (tmp_path / "x.arrow").unlink()
    assert list(found) == examples
    assert len(found) == count
    assert found[count // 2 :] == examples[count // 2 :]


@dataclass(frozen=True, slots=True)
class Picture:
    path: str
    data: bytes | None


@dataclass(frozen=True, slots=True)
class Other:
    numbers: array[Any]
    picture: Picture | None = None


def test_an_example_may_have_other_numbers_and_parts(tmp_path: Path) -> None:
    examples = [
        Other(array("f", [0.1, 1.5])),
        Other(array("i", [3]), Picture("a", None)),
        Other(array("d"), Picture("", b"\0\xff")),
    ]
    with Writer(tmp_path / "x.arrow", Other) as writer:
        writer.extend(examples)
    found = list(Stored(tmp_path / "x.arrow", Other))
    assert found == examples
    assert [one.numbers.typecode for one in found] == ["f", "i", "d"]


def test_one_of_several_makes_and_the_others_wait(tmp_path: Path) -> None:
    made = []

    def make(folder: Path) -> None:
        made.append(folder)
        threading.Event().wait(0.3)
        (folder / "x").write_text("whole")

    threads = [threading.Thread(target=cached, args=(tmp_path / "c", "key", make)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert (cached(tmp_path / "c", "key", make) / "x").read_text() == "whole"


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    code = (
        "import os, signal; from pathlib import Path; from bilora_ray.training.data.cache import cached\n"
        "def make(folder):\n"
        "    (folder / 'x').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        f"cached(Path({str(tmp_path)!r}), 'key', make)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob(".key.*"))) == 1
    found = cached(tmp_path, "key", lambda folder: (folder / "x").write_text("whole"))  # type: ignore[arg-type]
    assert (found / "x").read_text() == "whole"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key", "key.lock"]


def test_a_full_disk_is_an_error_of_the_machine(tmp_path: Path) -> None:
    def make(folder: Path) -> None:
        (folder / "x.arrow").symlink_to("/dev/full")
        with Writer(folder / "x.arrow", Example) as writer:
            writer.extend([Example(array("i", range(100_000)), array("i"))])

    with pytest.raises(OSError, match="No space left on device") as caught:
        cached(tmp_path, "key", make)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(tmp_path / "key")
    assert [path.name for path in tmp_path.iterdir()] == ["key.lock"]


def test_a_storage_that_is_away_is_not_made_anew(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        cached(tmp_path / "away" / "examples", "key", lambda _: None)
    assert not (tmp_path / "away").exists()


# A gigabyte

CHECK_ALL = """
from bilora_ray.config import TrialConfig
from bilora_ray.training.rows import about, load_rows, notes
config = TrialConfig(model_name_or_path="m", task="causal-lm", train_data="{path}")
rows = load_rows(config)
list(notes(rows, config, 1))
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(len(rows.train) + len(rows.validation), int(peak.split()[1]) / 2**10)
"""


@pytest.mark.slow
def test_the_rows_of_a_gigabyte_take_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    block = "".join(
        json.dumps({"prompt": f"{i}: " + "a b " * 120, "completion": "c " * 250}) + "\n" for i in range(1000)
    )
    with path.open("w") as file:
        file.writelines(block for _ in range(10**9 // len(block) + 1))
    code = CHECK_ALL.format(path=path)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    count, mebibytes = done.stdout.split()
    assert int(count) == 1000 * (10**9 // len(block) + 1)
    assert float(mebibytes) < 256


@pytest.mark.slow
def test_a_dry_run_of_a_gigabyte_takes_little_memory(tmp_path: Path) -> None:
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "large_data.py"
    options = ["--gigabytes=1", "--repeats=1", "--only=tune --dry-run", f"--folder={tmp_path}"]
    done = subprocess.run([sys.executable, script, *options], capture_output=True, text=True, check=True)
    mebibytes = done.stdout.splitlines()[-1].split(" | ")[-2]
    assert float(mebibytes) < 1024
