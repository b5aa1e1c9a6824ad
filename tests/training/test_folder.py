"""A trial's folder: the lock, what counts as complete, and that exactly the best adapter is kept."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_trials import Tiny

from bilora_ray.errors import MachineError
from bilora_ray.files import locked
from bilora_ray.training import loop
from bilora_ray.training.folder import STATE, TENSORS, TrialFolder

HOLD = """
import sys, time
from pathlib import Path
from bilora_ray.training.folder import TrialFolder
with TrialFolder(Path(sys.argv[1])).lock(0):
    print("held", flush=True)
    time.sleep(60)
"""


def checkpoint(folder: TrialFolder, step: int, **state: Any) -> None:
    path = folder.checkpoint_at(step)
    path.mkdir(parents=True)
    (path / TENSORS).write_bytes(b"")
    (path / STATE).write_text(json.dumps({"step": step, **state}))


def test_an_empty_folder_has_no_state(tmp_path: Path) -> None:
    folder = TrialFolder(tmp_path / "nowhere")
    assert folder.latest() is None
    assert folder.state() == {}
    assert folder.best_adapter() is None
    folder.discard_tensors()
    assert not folder.path.exists()


def test_the_newest_complete_checkpoint_counts(tmp_path: Path) -> None:
    folder = TrialFolder(tmp_path)
    for step in (90, 1000, 200):
        checkpoint(folder, step, best_step=90)
    for name in (".step-00002000.17", "step-9999", "step-000020000", "step-00002000.tmp"):
        (folder.checkpoints / name).mkdir()
    assert folder.latest() == folder.checkpoint_at(1000)
    assert folder.state() == {"step": 1000, "best_step": 90}
    assert folder.best_adapter() == tmp_path / "adapters" / "step-00000090"


def test_keep_only_removes_all_else(tmp_path: Path) -> None:
    folder = TrialFolder(tmp_path)
    for step in (1, 2, 3):
        checkpoint(folder, step)
        folder.adapter_at(step).mkdir(parents=True)
    (folder.checkpoints / ".step-00000004.17").mkdir()
    (tmp_path / "adapters" / ".step-00000004.17").mkdir()
    folder.keep_only(3, 2)
    assert [path.name for path in folder.checkpoints.iterdir()] == ["step-00000003"]
    assert [path.name for path in (tmp_path / "adapters").iterdir()] == ["step-00000002"]


def test_the_folder_module_is_light() -> None:
    code = "import sys, bilora_ray.training.folder; print(sorted({'torch', 'transformers', 'ray'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_one_process_at_a_time_holds_the_folder_and_a_kill_frees_it(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(TimeoutError) as caught, TrialFolder(tmp_path).lock(0):
            raise AssertionError("two processes hold the lock")
        assert str(caught.value) == f"{tmp_path / 'lock'} is held by another process"
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    with TrialFolder(tmp_path).lock(0):
        pass


def test_a_folder_is_made_for_its_lock_and_nothing_above_it(tmp_path: Path) -> None:
    with TrialFolder(tmp_path / "0000").lock(0):
        pass
    assert (tmp_path / "0000").is_dir()
    with pytest.raises(FileNotFoundError), TrialFolder(tmp_path / "away" / "0000").lock(0):
        raise AssertionError("a folder was made in the place of one that is away")
    assert not (tmp_path / "away").exists()


def test_a_lock_is_freed_when_its_block_raises(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), locked(tmp_path / "lock", 0):
        raise RuntimeError
    with locked(tmp_path / "lock", 0):
        pass


def values_at_evaluations(values: list[float], metric: str, evaluate: Any) -> Any:
    """`evaluate`, with `metric` taken from `values` in turn."""
    remaining, losses = list(values), iter([2.0, 3.0, 2.0, 1.0])

    def scripted(*args: Any) -> dict[str, float]:
        return evaluate(*args) | {"eval_loss": next(losses), metric: remaining.pop(0)}

    return scripted


@pytest.mark.parametrize(
    ("metric", "values", "best"),
    [
        ("eval_loss", [3.0, 1.0, 2.0, 1.0], [1, 2, 2, 2]),
        ("eval_loss", [1.0, 2.0, 3.0, 4.0], [1, 1, 1, 1]),
        ("eval_perplexity", [float("inf"), 9.0, 9.0, 8.0], [1, 2, 3, 4]),
        ("eval_token_accuracy", [0.5, 0.25, 0.75, 0.75], [1, 1, 3, 4]),
        ("eval_token_accuracy", [0.0, 0.0, 0.0, 0.5], [1, 1, 1, 4]),
    ],
)
def test_exactly_the_adapter_of_the_best_evaluation_is_kept(
    metric: str, values: list[float], best: list[int], tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "evaluate", values_at_evaluations(values, metric, loop.evaluate))
    config = tiny.config("causal-lm", metric=metric, max_steps=4, eval_steps=1)
    folder, kept, known = TrialFolder(tmp_path), [], []

    def report(_: dict[str, float]) -> bool:
        kept.append([path.name for path in (tmp_path / "adapters").iterdir()])
        known.append(folder.best_adapter())
        return True

    progress = loop.fit(config, folder, report)
    assert kept == [[f"step-{step:08d}"] for step in best]
    assert known == [folder.adapter_at(step) for step in best]
    assert (progress.best_step, progress.best_value) == (best[-1], values[best[-1] - 1])
    recipe = json.loads((folder.adapter_at(best[-1]) / "bilora_ray.json").read_text())
    assert recipe["step"] == best[-1]


@pytest.mark.parametrize("content", [b"", b'{"step": 4', b"[]", b"\xff\xfe\x00"])
def test_a_torn_state_is_one_line(content: bytes, tmp_path: Path) -> None:
    folder = TrialFolder(tmp_path / "trial")
    checkpoint(folder, 4)
    file = folder.checkpoint_at(4) / STATE
    file.write_bytes(content)
    with pytest.raises(MachineError) as caught:
        folder.state()
    assert str(caught.value) == f"{file}: is torn; without the folder step-00000004 its trial begins anew"
