"""Examples on the disk: written as they come, read through a memory map, and kept for all who would make the same.

An example is a dataclass of arrays and texts. Nothing here imports torch, and pyarrow only when it is needed.
"""

from __future__ import annotations

import math
import shutil
import sys
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast, overload

from bilora_ray.files import atomic_folder, locked

if TYPE_CHECKING:
    import pyarrow

T = TypeVar("T")

# Examples of one record batch: of all batches but the last, so that a row's batch follows from its number.
BATCH = 1000


class Writer(Generic[T]):
    """Writes an Arrow file of examples, in a `with` block; no more than a batch of them is in memory.

    Args:
        path: of the file.
        kind: the dataclass; a field is an array, `str`, `bytes` or a dataclass of such, perhaps None.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path, kind: type[T]) -> None:
        import pyarrow

        self._schema = pyarrow.schema(list(_arrow_type(kind)))
        self._waiting: list[T] = []
        self._count = 0
        self._file = path.open("wb")
        self._arrow = pyarrow.ipc.new_file(self._file, self._schema)

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
                self._arrow.close()

    def _write(self, count: int) -> None:
        import pyarrow

        batch, self._waiting = self._waiting[:count], self._waiting[count:]
        self._arrow.write_batch(pyarrow.RecordBatch.from_pylist([_plain(one) for one in batch], schema=self._schema))


class Stored(Sequence[T]):
    """The examples of a file that a `Writer` wrote. What of it is in memory is the system's to give back.

    Args:
        path: of the file. It may be removed, but not changed, while this is in use.
        kind: the dataclass.
    """

    def __init__(self, path: Path, kind: type[T]) -> None:
        import pyarrow

        self._kind, self._types = kind, _types(kind).values()
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
        values = (column[row].as_py() for column in self._batch(batch).columns)
        return self._kind(*map(_made, self._types, values))


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


def _types(kind: type[Any]) -> dict[str, Any]:
    """What the fields of a dataclass are, None apart; `array[int]` is no type yet when Python runs it."""
    names = {field.name: str(field.type).removesuffix(" | None").partition("[")[0] for field in fields(kind)}
    known = {"str": str, "bytes": bytes, **vars(sys.modules[kind.__module__])}
    return {field: known[name] for field, name in names.items()}


def _arrow_type(kind: Any) -> pyarrow.DataType:
    import pyarrow

    if is_dataclass(kind):
        return pyarrow.struct([(name, _arrow_type(one)) for name, one in _types(cast(type, kind)).items()])
    return pyarrow.string() if kind is str else pyarrow.large_binary()


def _plain(value: Any) -> Any:
    """What Arrow takes for `value`: of an array the letter of its type, and its bytes."""
    if isinstance(value, array):
        return value.typecode.encode() + value.tobytes()
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    return value


def _made(kind: Any, value: Any) -> Any:
    """What `_plain` was given."""
    if value is None:
        return None
    if is_dataclass(kind):
        return cast(type, kind)(**{name: _made(one, value[name]) for name, one in _types(cast(type, kind)).items()})
    return array(chr(value[0]), value[1:]) if kind is array else value
