"""`bilora-ray doctor` on a machine where all is well, and on set-ups that are broken, each in one way."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from chaos.nodes import free_port
from click.testing import CliRunner
from huggingface_hub.errors import HfHubHTTPError

from bilora_ray.cli.main import main
from bilora_ray.search.readiness import machine, services
from bilora_ray.search.readiness.findings import Finding, Verdict

GIB = 2**30
VISIBLE = machine.VISIBLE
HUB = services.hub


@pytest.fixture(autouse=True)
def healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine like any other, and a Hub that answers."""
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "BILORA_RAY_STUDY_DATABASE", "BILORA_RAY_STORAGE_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(services, "hub", lambda: iter([Finding("Hub", Verdict.OK, "answers")]))
    monkeypatch.setattr(machine, "free_memory", lambda: 64 * GIB)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (65536, 65536))
    disk(monkeypatch, 500, 100)


def disk(monkeypatch: pytest.MonkeyPatch, total: float, free: float, where: str = "") -> None:
    """Every disk, or that of paths which begin with `where`, with so many GiB."""
    before = shutil.disk_usage
    found = SimpleNamespace(total=int(total * GIB), free=int(free * GIB), used=int((total - free) * GIB))

    def usage(path: Any) -> Any:
        return found if str(path).startswith(where) else before(path)

    monkeypatch.setattr(shutil, "disk_usage", usage)


def examined(path: Path, *options: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """The exit code, and the findings by what they are about."""
    done = CliRunner().invoke(main, ["doctor", "--storage-path", str(path), "--json", *options])
    return done.exit_code, {one["about"]: one for one in json.loads(done.stdout)}


def test_a_healthy_machine_has_no_fault_and_nothing_stays_written(tmp_path: Path) -> None:
    code, found = examined(tmp_path / "runs")
    assert code == 0
    assert {one["about"] for one in found.values() if one["verdict"] != "ok"} == set()
    assert set(found) >= {"packages", "GPUs", "memory", "open files", "storage path", "study database", "MLflow", "Ray"}
    assert list(tmp_path.iterdir()) == []


def test_a_person_reads_a_line_a_thing_and_how_it_is_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 65536))
    done = CliRunner().invoke(main, ["doctor", "--storage-path", str(tmp_path)])
    assert done.exit_code == 2
    assert "fault open files: a process may have 256 files open\n      ulimit -n 65536" in done.stdout


def old_package(patch: pytest.MonkeyPatch, path: Path) -> tuple[str, ...]:
    known = metadata.version
    patch.setattr(metadata, "version", lambda name: "4.1.0" if name == "optuna" else known(name))
    return ()


def few_files(patch: pytest.MonkeyPatch, path: Path) -> tuple[str, ...]:
    patch.setattr(resource, "getrlimit", lambda _: (256, 65536))
    return ()


def torch_without_cuda(patch: pytest.MonkeyPatch, path: Path) -> tuple[str, ...]:
    patch.setattr(machine, "_driver_sees", lambda: "NVIDIA H100 80GB HBM3")
    patch.setattr(torch.version, "cuda", None)
    return ()


def no_memory(patch: pytest.MonkeyPatch, path: Path) -> tuple[str, ...]:
    patch.setattr(machine, "free_memory", lambda: GIB // 2)
    return ()


def full_disk(patch: pytest.MonkeyPatch, path: Path) -> tuple[str, ...]:
    disk(patch, 500, 0.1, where=str(path))
    return ()


def no_locks(patch: pytest.MonkeyPatch, path: Path) -> tuple[str, ...]:
    patch.setattr(machine, "is_held", lambda _: False)
    return ()


def no_folder(patch: pytest.MonkeyPatch, path: Path) -> tuple[str, ...]:
    def denied(**_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    patch.setattr(machine.tempfile, "TemporaryDirectory", denied)
    return ()


def disk_that_ray_takes_for_full(patch: pytest.MonkeyPatch, path: Path) -> tuple[str, ...]:
    patch.setenv("RAY_TMPDIR", "/tmp/of its own/that Ray makes")
    disk(patch, 500, 24, where="/tmp")
    return ()


def sockets_too_long(patch: pytest.MonkeyPatch, path: Path) -> tuple[str, ...]:
    patch.setenv("RAY_TMPDIR", f"/tmp/{'x' * 60}")
    return ()


def other_database(patch: pytest.MonkeyPatch, path: Path) -> tuple[str, ...]:
    (path / "studies.db").write_text("not a database, but long enough to be taken for one")
    return ()


def dead_mlflow(patch: pytest.MonkeyPatch, path: Path) -> tuple[str, ...]:
    return ("--mlflow-uri", f"http://127.0.0.1:{free_port()}")


def open_mlflow(patch: pytest.MonkeyPatch, path: Path) -> tuple[str, ...]:
    return ("--mlflow-uri", "http://mlflow.invalid:5000")


def dead_ray(patch: pytest.MonkeyPatch, path: Path) -> tuple[str, ...]:
    return ("--ray-address", f"127.0.0.1:{free_port()}")


Broken = Callable[[pytest.MonkeyPatch, Path], tuple[str, ...]]
BROKEN: dict[Broken, tuple[str, str, str]] = {
    old_package: ("packages", "optuna 4.1.0; needs optuna", "pip install 'optuna"),
    few_files: ("open files", "256", "ulimit -n 65536"),
    torch_without_cuda: ("GPUs", "the driver has NVIDIA H100 80GB HBM3, and torch", "pytorch.org"),
    no_memory: ("memory", "0.5 GiB", "1.2 GiB"),
    full_disk: ("storage path", "0.1 GiB free", "--storage-path"),
    no_locks: ("storage path", "locks of files do not hold there", "two searches could run one trial"),
    no_folder: ("storage path", "cannot be written (Permission denied)", "--storage-path"),
    disk_that_ray_takes_for_full: ("temporary files", "that Ray makes has 24.0 GiB free, 5%", "95% full"),
    sockets_too_long: ("temporary files", "too long for Ray's sockets, by 2", "RAY_TMPDIR"),
    other_database: ("study database", "is not a database of studies", ""),
    dead_mlflow: ("MLflow", "MLflow does not answer", "start it"),
    open_mlflow: ("MLflow auth", "without credentials", "SECURITY.md"),
    dead_ray: ("Ray", "no Ray cluster answers", "ray status"),
}


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.__name__)
def test_each_fault_is_told_with_its_mend_and_no_other(
    broken: Broken, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about, line, mend = BROKEN[broken]
    code, found = examined(tmp_path, *broken(monkeypatch, tmp_path))
    faults = [one for one in found.values() if one["verdict"] == "fault"]
    assert code == 2
    assert line in found[about]["found"]
    assert mend in (found[about]["mend"] or "")
    # A server that may not be asked does not answer either.
    assert {one["about"] for one in faults} == {about, *(["MLflow"] if broken is open_mlflow else [])}


def test_what_could_be_better_is_a_note_and_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk(monkeypatch, 64 / 1024, 64 / 1024, where="/dev/shm")
    monkeypatch.setattr(machine, "free_memory", lambda: int(1.3 * GIB))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(machine, "_file_system", lambda _: "nfs4")
    code, found = examined(tmp_path)
    assert code == 0
    noted = {one["about"]: one["mend"] for one in found.values() if one["verdict"] == "note"}
    assert noted.keys() == {"/dev/shm", "memory", "storage path"}
    assert "--shm-size" in noted["/dev/shm"]
    assert "--max-concurrent 1" in noted["memory"]
    assert "--study-database" in noted["storage path"]


def test_what_cannot_be_looked_at_keeps_nothing_else_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks() -> Any:
        raise ImportError("libcudart.so.12: cannot open shared object file")

    monkeypatch.setattr(machine, "gpus", breaks)
    code, found = examined(tmp_path)
    assert code == 2
    assert "libcudart.so.12" in found["GPUs"]["found"]
    assert found["Ray"]["verdict"] == "ok"


@pytest.mark.parametrize("name", ["taken", "taken/runs"])
def test_a_file_is_no_storage_path(name: str, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    (found,) = machine.storage(tmp_path / name)
    assert (found.verdict, found.found) == (Verdict.FAULT, f"{tmp_path / 'taken'} cannot be written (Not a directory)")


@pytest.mark.parametrize("visible", ["", "-1"])
def test_gpus_that_are_hidden_on_purpose_are_a_note(visible: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(machine, "_driver_sees", lambda: "NVIDIA L4")
    (found,) = machine.gpus()
    assert (found.verdict, found.found) == (Verdict.NOTE, f"the driver has NVIDIA L4, which {VISIBLE}={visible} hides")


def test_a_driver_that_does_not_say_has_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/nvidia-smi")

    def fails(*_: Any, **__: Any) -> Any:
        raise subprocess.CalledProcessError(9, "nvidia-smi")

    monkeypatch.setattr(subprocess, "run", fails)
    (found,) = machine.gpus()
    assert (found.verdict, found.found[:28]) == (Verdict.NOTE, "none, and nvidia-smi fails (")


@pytest.mark.parametrize(
    ("code", "verdict"), [(401, Verdict.FAULT), (403, Verdict.FAULT), (429, Verdict.NOTE), (503, Verdict.NOTE)]
)
def test_a_hub_that_is_busy_refuses_nobody(code: int, verdict: Verdict, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: Any, **__: Any) -> Any:
        raise HfHubHTTPError("refused", response=SimpleNamespace(status_code=code, headers={}, request=None))  # type: ignore[arg-type]

    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_x")
    monkeypatch.setattr("huggingface_hub.HfApi.whoami", refuses)
    assert [one.verdict for one in HUB()] == [verdict]


@pytest.mark.parametrize(
    ("groups", "limits", "left"),
    [
        ("0::/\n", {"": (8, 6, 3)}, 5),  # six are taken, three of which only hold what was read
        ("0::/a/b\n", {"a": (8, 6, 0), "a/b": ("max", 2, 0)}, 2),
        ("0::/of/its/host\n", {"": (4, 1, 0)}, 3),
        ("0::/\n", {"": ("max", 6, 3)}, 64),
        ("0::/\n", {}, 64),
        ("9:cpu:/x\n4:hugetlb,memory:/slurm/job\n", {"memory/slurm/job": (9, 7, 1)}, 3),
        ("4:memory:/docker/1\n", {"memory": (2**33, 7, 1)}, 64),
    ],
)
def test_free_memory_is_what_the_nearest_limit_leaves(
    groups: str, limits: dict[str, tuple[Any, int, int]], left: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    (tmp_path / "groups").write_text(groups)
    (tmp_path / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable: {64 * 2**20} kB\n")
    for name, (most, used, cached) in limits.items():
        folder, first = tmp_path / "cgroup" / name, name.startswith("memory")
        folder.mkdir(parents=True, exist_ok=True)
        files = ("memory.limit_in_bytes", "memory.usage_in_bytes") if first else ("memory.max", "memory.current")
        for file, size in zip(files, (most, used), strict=True):
            (folder / file).write_text(f"{size if size == 'max' else size * GIB}\n")
        (folder / "memory.stat").write_text(f"anon 1\n{'total_' if first else ''}inactive_file {cached * GIB}\n")
    for name, file in (("MEMINFO", "meminfo"), ("OWN_GROUPS", "groups"), ("GROUPS", "cgroup")):
        monkeypatch.setattr(machine, name, tmp_path / file)
    assert machine.free_memory() == left * GIB


def test_the_driver_is_asked_for_its_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="NVIDIA L4\nNVIDIA L4\n"))
    assert machine._driver_sees() == "NVIDIA L4, NVIDIA L4"


def test_a_file_system_is_that_of_the_nearest_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/a / ext4 rw 0 0\nhost:/x {tmp_path}/my\\040runs nfs4 rw 0 0\n")
    monkeypatch.setattr(machine, "MOUNTS", mounts)
    (tmp_path / "my runs" / "a").mkdir(parents=True)
    assert machine._file_system(tmp_path / "my runs" / "a") == "nfs4"
    assert machine._file_system(tmp_path) == "ext4"
