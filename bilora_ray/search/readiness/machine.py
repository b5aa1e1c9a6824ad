"""What a search needs of this machine: packages, GPUs, memory, disk."""

from __future__ import annotations

import errno
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from bilora_ray.errors import first_line
from bilora_ray.files import is_held, locked
from bilora_ray.search.readiness.findings import Finding, Verdict

PACKAGE = "bilora-ray"
# Those whose version is told, whatever it is: what others ask first.
TOLD = ("torch", "transformers", "peft", "ray", "optuna", "mlflow")
GIB = 2**30
# Of the storage path: below the first no checkpoint of a small model has room, below the second none of a large one.
LEAST_DISK, LITTLE_DISK = GIB, 20 * GIB
# Ray takes a disk for full from here on, and starts nothing (its `local_fs_capacity_threshold`).
FULL = 0.95
# Docker gives 64 MiB of /dev/shm; Ray goes to the disk then, and NCCL fails between the workers of a trial.
LEAST_SHARED = 2 * GIB
# Ray wants some hundred files a process; its documentation asks for 65,536.
LEAST_FILES, FEW_FILES = 1024, 4096
# What a process of a trial takes with all that it imports, measured.
PROCESS = int(1.2 * GIB)
# File systems of other machines, as Linux names them; those where locks are known to fail now and then.
REMOTE = ("nfs", "nfs4", "cifs", "smb3", "fuse.sshfs", "fuse.s3fs", "fuse.gcsfuse", "lustre", "ceph", "9p")
SHARED_MEMORY, MOUNTS = Path("/dev/shm"), Path("/proc/mounts")
MEMINFO, OWN_GROUPS, GROUPS = Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
ON_CPU = "trials run on the CPU: resources.gpus_per_worker is 0"
VISIBLE = "CUDA_VISIBLE_DEVICES"
# The longest of Ray's sockets, in its folder of temporary files; and how many bytes the path of a socket may have.
SOCKET, MOST_OF_SOCKET = "ray/session_2000-01-01_00-00-00_000000_{}/sockets/plasma_store", 107


def packages() -> Iterator[Finding]:
    """Whether the versions of what this package needs are those that it was tested with."""
    wrong = False
    for line in metadata.requires(PACKAGE) or ():
        needed = Requirement(line)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        version = _version(needed.name)
        if version is None or not needed.specifier.contains(version, prereleases=True):
            wrong = True
            found = f"{needed.name} {version or 'is missing'}; needs {needed.name}{needed.specifier}"
            yield Finding("packages", Verdict.FAULT, found, f"pip install '{needed.name}{needed.specifier}'")
    if not wrong:
        versions = ", ".join(f"{name} {_version(name)}" for name in (PACKAGE, *TOLD))
        yield Finding("packages", Verdict.OK, f"Python {platform.python_version()}, {versions}")


def gpu_count() -> int:
    """How many GPUs torch has."""
    import torch

    return torch.cuda.device_count()


def gpus() -> Iterator[Finding]:
    """Which GPUs torch has, and why none where the machine has some."""
    import torch

    if not torch.cuda.is_available():
        try:
            seen = _driver_sees()
        except (OSError, subprocess.SubprocessError) as error:
            yield Finding("GPUs", Verdict.NOTE, f"none, and nvidia-smi fails ({first_line(error)})", ON_CPU)
            return
        if not seen:
            yield Finding("GPUs", Verdict.OK, f"none; {ON_CPU}")
            return
        if (visible := os.environ.get(VISIBLE)) in ("", "-1"):
            found = f"the driver has {seen}, which {VISIBLE}={visible} hides"
            yield Finding("GPUs", Verdict.NOTE, found, f"unset {VISIBLE}, unless that is meant")
            return
        built = "is built without CUDA" if torch.version.cuda is None else f"is built for CUDA {torch.version.cuda}"
        mend = "install the build of torch that fits the driver: https://pytorch.org/get-started/locally"
        yield Finding("GPUs", Verdict.FAULT, f"the driver has {seen}, and torch {torch.__version__} {built}", mend)
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        bf16 = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bf16"
        found = f"{torch.cuda.get_device_name(index)}, {free / GIB:.1f} of {total / GIB:.1f} GiB free, {bf16}"
        if free < 0.8 * total:
            yield Finding("GPUs", Verdict.NOTE, found, "other processes use it: nvidia-smi says which")
        else:
            yield Finding("GPUs", Verdict.OK, found)


def memory() -> Iterator[Finding]:
    """Whether the memory holds a process of a trial for every core."""
    cores, free = _cores(), free_memory()
    found = f"{free / GIB:.1f} GiB of memory free, {cores} cores"
    held = int(free / PROCESS)
    if held < 1:
        mend = f"a trial's process takes {PROCESS / GIB:.1f} GiB before its model"
        yield Finding("memory", Verdict.FAULT, found, mend)
    elif held < cores:
        mend = (
            f"it holds {held} processes of trials, less their models: --max-concurrent {held}, or more cpus_per_worker"
        )
        yield Finding("memory", Verdict.NOTE, found, mend)
    else:
        yield Finding("memory", Verdict.OK, found)


def open_files() -> Iterator[Finding]:
    """How many files a process may open."""
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = most == resource.RLIM_INFINITY
    verdict = Verdict.OK if unlimited or most >= FEW_FILES else Verdict.NOTE
    if not unlimited and most < LEAST_FILES:
        verdict = Verdict.FAULT
    found = "any number of" if unlimited else f"{most:,}"
    mend = None if verdict is Verdict.OK else "ulimit -n 65536, in the shell that starts the search"
    yield Finding("open files", verdict, f"a process may have {found} files open", mend)


def shared_memory() -> Iterator[Finding]:
    """How large /dev/shm is, where there is one."""
    if not SHARED_MEMORY.is_dir():
        return
    size = shutil.disk_usage(SHARED_MEMORY).total
    verdict, mend = Verdict.OK, None
    if size < LEAST_SHARED:
        verdict = Verdict.NOTE
        mend = "Ray keeps its objects on the disk, and workers of a trial may fail: docker run --shm-size=8g"
    yield Finding(str(SHARED_MEMORY), verdict, f"{size / GIB:.2f} GiB", mend)


def temporary() -> Iterator[Finding]:
    """Whether Ray's own files have a place: a disk that Ray does not take for full, and a path of which sockets can be.

    It looks as Ray does, which makes the folder where it is missing.
    """
    on_linux = os.environ.get("TMPDIR") if sys.platform.startswith("linux") else None
    folder = Path(os.environ.get("RAY_TMPDIR") or on_linux or "/tmp")
    about, longest = "temporary files", len(os.fsencode(folder / SOCKET.format(os.getpid())))
    usage = shutil.disk_usage(_there(folder))
    found = f"{folder} has {usage.free / GIB:.1f} GiB free, {usage.free / usage.total:.0%}"
    if longest > MOST_OF_SOCKET:
        found = f"{folder} is too long for Ray's sockets, by {longest - MOST_OF_SOCKET} bytes"
        yield Finding(about, Verdict.FAULT, found, "name a shorter folder in RAY_TMPDIR")
    elif usage.free < (1 - FULL) * usage.total:
        mend = f"Ray takes a disk that is {FULL:.0%} full for full: free some, or name another folder in TMPDIR"
        yield Finding(about, Verdict.FAULT, found, mend)
    else:
        yield Finding(about, Verdict.OK, found)


def storage(path: Path) -> Iterator[Finding]:
    """Whether studies can be kept in `path`, which need not be there yet: written, locked, with room."""
    place = _there(path)
    about, option = "storage path", f"--storage-path {path}"
    try:
        if not place.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=place) as name:
            lock = Path(name, "lock")
            with locked(lock, wait_s=0):
                holds = is_held(lock)
    except OSError as error:
        mend = f"{option}: name a folder that you may write"
        yield Finding(about, Verdict.FAULT, f"{place} cannot be written ({error.strerror})", mend)
        return
    kind, free = _file_system(place), shutil.disk_usage(place).free
    found = f"{place} ({kind}), {free / GIB:.1f} GiB free"
    if not holds:
        mend = "two searches could run one trial: mount it with locks, as NFS 4 has them"
        yield Finding(about, Verdict.FAULT, f"{found}; locks of files do not hold there", mend)
    elif free < LEAST_DISK:
        yield Finding(about, Verdict.FAULT, found, f"free some, or name another: {option}")
    elif free < LITTLE_DISK:
        yield Finding(about, Verdict.NOTE, found, "study.max_disk_gb keeps a study below a size")
    elif kind in REMOTE:
        mend = "SQLite may be slow or fail there: keep the studies in PostgreSQL, --study-database"
        yield Finding(about, Verdict.NOTE, found, mend)
    else:
        yield Finding(about, Verdict.OK, found)


def in_words() -> dict[str, str]:
    """What this machine is, by name: to tell where a study was searched."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    found = {"Python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    found["machine"] = f"{_cores()} cores, {memory / GIB:.0f} GiB of memory"
    with suppress(OSError, subprocess.SubprocessError):
        found["GPUs"] = _driver_sees() or "none"
    return found


def _cores() -> int:
    """Those that this process may use, where the system says which."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _there(path: Path) -> Path:
    """`path`, or of what is above it the nearest that exists."""
    return next(each for each in (path, *path.absolute().parents) if each.exists())


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _driver_sees() -> str:
    """The GPUs that NVIDIA's driver has, in words; nothing where there is none.

    Raises:
        OSError, SubprocessError: it does not say.
    """
    if shutil.which("nvidia-smi") is None:
        return ""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    return ", ".join(line for line in done.stdout.splitlines() if line and line != "No devices were found")


def free_memory() -> int:
    """Bytes that processes here could have more, of the machine and of the control groups that this one is in."""
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # where the system tells no more than that
    for line in _lines(MEMINFO):
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    return min([free, *_left_to_groups()])


def _left_to_groups() -> Iterator[int]:
    """What its limit leaves to each control group of this process, those above its own too.

    In a container the path of its own may be one that only its host has: then what is above it is the container's.
    https://docs.kernel.org/admin-guide/cgroup-v2.html, https://docs.kernel.org/admin-guide/cgroup-v1/memory.html
    """
    for line in _lines(OWN_GROUPS):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, limit, used, cached = GROUPS, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, cached = GROUPS / "memory", "total_inactive_file"
            limit, used = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        own = root / path.lstrip("/")
        for group in (own, *own.parents[: len(own.parts) - len(root.parts)]):
            most, taken = _lines(group / limit), _lines(group / used)
            if most and taken and most[0] != "max":
                told = dict(line.split() for line in _lines(group / "memory.stat"))
                # The files that were read and are not in use go before anything else has to.
                yield int(most[0]) - int(taken[0]) + int(told.get(cached, 0))


def _file_system(folder: Path) -> str:
    """What kind of file system `folder` is on, as Linux names it."""
    kinds = {}
    for line in _lines(MOUNTS):
        _, place, kind, *_ = line.split()
        kinds[Path(place.replace("\\040", " "))] = kind
    real = folder.resolve()
    return next((kinds[place] for place in (real, *real.parents) if place in kinds), "unknown")


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
