"""Examples on the disk: written as they come, read through a memory map, and kept for all who would make the same.

An example is a dataclass of ids and texts. Nothing here imports torch, and pyarrow only when it is needed.
"""

from __future__ import annotations

import math
import shutil
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, fields
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

from bilora_ray.files import atomic_folder, locked
from bilora_ray.training.data.files.images import StoredImage

if TYPE_CHECKING:
    import pyarrow

T = TypeVar("T")

# Examples of one record batch: of all batches but the last, so that a row's batch follows from its number.
BATCH = 1000


class Writer(Generic[T]):
    """Writes an Arrow file of examples, in a `with` block; no more than a batch of them is in memory.

    Args:
        path: of the file.
        kind: the dataclass; each field is an array of 32-bit numbers, a text, or an image that is not decoded, or None.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path, kind: type[T]) -> None:
        self._names = [field.name for field in fields(kind)]
        self._waiting: list[T] = []
        self._count = 0
        self._file = path.open("wb")
        self._arrow: pyarrow.RecordBatchFileWriter | None = None

    def extend(self, examples: Iterable[T]) -> None:
        """Add `examples`."""
        before = len(self._waiting)
        self._waiting.extend(examples)
        self._count += len(self._waiting) - before
        while len(self._waiting) >= BATCH:
            self._write(BATCH)

    def __len__(self) -> int:
        return self._count

    def __enter__(self) -> Writer[T]:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with self._file:
            if kind is None:
                self._write(len(self._waiting))
                assert self._arrow is not None
                self._arrow.close()

    def _write(self, count: int) -> None:
        import pyarrow

        batch, self._waiting = self._waiting[:count], self._waiting[count:]
        columns = [_column([getattr(one, name) for one in batch]) for name in self._names]
        found = pyarrow.record_batch(columns, names=self._names)
        if self._arrow is None:  # of what the first examples are the others are too
            self._arrow = pyarrow.ipc.new_file(self._file, found.schema)
        self._arrow.write_batch(found)


class Stored(Sequence[T]):
    """The examples of a file that a `Writer` wrote. What of it is in memory is the system's to give back.

    Args:
        path: of the file. It may be removed, but not changed, while this is in use.
        kind: the dataclass.
    """

    def __init__(self, path: Path, kind: type[T]) -> None:
        import pyarrow

        self._kind = kind
        self._arrow = pyarrow.ipc.open_file(pyarrow.memory_map(str(path)))
        self._batch = lru_cache(maxsize=1)(self._arrow.get_batch)  # who goes through all comes again for the next row
        last = self._arrow.num_record_batches - 1
        self._count = last * BATCH + self._batch(last).num_rows

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> list[T]: ...

    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self[row] for row in range(len(self))[index]]
        batch, row = divmod(range(len(self))[index], BATCH)
        return self._kind(*(_value(column, row) for column in self._batch(batch).columns))


def cached(folder: Path, key: str, make: Callable[[Path], None]) -> Path:
    """The folder that `make` has filled for `key`, now or before, here or in another process: the others wait.

    Args:
        folder: where such folders are; made if it is missing, and what it lies in is not.
        key: decides all that `make` does.
        make: fills the folder that it is given. If it raises, or its process ends, there is none.

    Raises:
        OSError: that cannot be read or written; the error names a file.
    """
    folder.mkdir(exist_ok=True)
    path = folder / key
    if not path.is_dir():
        with locked(folder / f"{key}.lock", math.inf):
            for unfinished in folder.glob(f".{key}.*"):  # of a process that was killed
                shutil.rmtree(unfinished, ignore_errors=True)
            if not path.is_dir():
                with atomic_folder(path) as made:
                    make(made)
    return path


def _column(values: list[Any]) -> pyarrow.Array:
    import pyarrow

    first = next((value for value in values if value is not None), None)
    if isinstance(first, str):
        return pyarrow.array(values, pyarrow.string())
    if isinstance(first, StoredImage):
        kinds = {"path": pyarrow.string(), "data": pyarrow.large_binary(), "where": pyarrow.string()}
        return pyarrow.array([None if value is None else asdict(value) for value in values], pyarrow.struct(kinds))
    return _arrays(values, "i" if first is None else first.typecode)


def _arrays(values: list[Any], code: str) -> pyarrow.Array:
    import pyarrow

    kind = {"i": pyarrow.int32(), "f": pyarrow.float32()}[code]
    numbers, offsets = array(code), array("i", [0])
    for value in values:
        numbers.extend(value or ())
        offsets.append(len(numbers))
    flat = pyarrow.Array.from_buffers(kind, len(numbers), [None, pyarrow.py_buffer(numbers)])
    ends = pyarrow.Array.from_buffers(pyarrow.int32(), len(offsets), [None, pyarrow.py_buffer(offsets)])
    absent = pyarrow.array([value is None for value in values], pyarrow.bool_())
    return pyarrow.ListArray.from_arrays(ends, flat, mask=absent)


def _value(column: pyarrow.Array, row: int) -> array[Any] | StoredImage | str | None:
    import pyarrow

    value = column[row]
    if not value.is_valid:
        return None
    if pyarrow.types.is_string(column.type):
        return str(value.as_py())
    if pyarrow.types.is_struct(column.type):
        return StoredImage(**value.as_py())
    code = "f" if pyarrow.types.is_floating(column.type.value_type) else "i"
    return array(code, value.values.to_numpy().tobytes())
