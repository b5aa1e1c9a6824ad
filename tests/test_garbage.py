"""When Python looks for rings of garbage."""

import gc
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

from bilora_ray.garbage import SELDOM, importing, seldom_collected


@pytest.fixture
def frozen() -> Iterator[None]:
    """What was frozen before, which stays so."""
    before = gc.get_freeze_count()
    yield
    if not before:
        gc.unfreeze()


def test_a_command_looks_seldom_and_leaves_all_as_it_was() -> None:
    before = gc.get_threshold()
    with seldom_collected():
        assert gc.get_threshold() == (SELDOM, *before[1:])
    assert gc.get_threshold() == before


@pytest.mark.usefixtures("frozen")
def test_what_was_imported_is_not_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    before = gc.get_freeze_count()
    with importing():
        assert not gc.isenabled()
        monkeypatch.setitem(sys.modules, "new", ModuleType("new"))
    assert gc.isenabled()
    assert gc.get_freeze_count() > before


@pytest.mark.usefixtures("frozen")
def test_a_block_that_imports_nothing_new_freezes_nothing() -> None:
    """Or the next trial of a process would keep the garbage of the last one for ever."""
    before = gc.get_freeze_count()
    with pytest.raises(ImportError), importing():
        raise ImportError
    assert gc.isenabled()
    assert gc.get_freeze_count() <= before
