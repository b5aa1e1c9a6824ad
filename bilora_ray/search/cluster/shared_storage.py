"""Whether every node of a cluster sees the storage path: a trial writes there on one node and is read on another."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from bilora_ray.errors import UserError

# A node may have to start a process first, and a network file system takes some seconds to show a file elsewhere.
ANSWER_TIMEOUT_S = 60.0
SIGHT_TIMEOUT_S = 10.0
QUESTION, ANSWER = "question", "answer"


def check_shared(storage_path: Path) -> None:
    """Ask every node of the connected cluster whether it reads, and writes, the same files in `storage_path`.

    A cluster of one node is not asked.

    Raises:
        UserError: some do not, each by its address; or this process cannot write there.
    """
    nodes = _nodes()
    if len(nodes) < 2:
        return
    try:
        storage_path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".shared-", dir=storage_path) as name:
            blind = _blind(nodes, Path(name))
    except OSError as error:
        raise UserError(f"--storage-path {storage_path}: cannot be written ({error.strerror})") from None
    if blind:
        raise UserError(
            f"--storage-path {storage_path}: must be a folder that all nodes of the cluster share; "
            f"these do not see it: {', '.join(sorted(blind))}"
        )


def _nodes() -> dict[str, str]:
    """Id -> address of the nodes that are there."""
    return {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}


def _blind(nodes: dict[str, str], folder: Path) -> list[str]:
    """The addresses of the nodes that do not find the question in `folder`, or whose answer is not found here.

    A node that is lost while it is asked is none of them: whatever it saw, no trial will run there.
    """
    (folder / QUESTION).write_text(folder.name)
    asked = {node: _ask(node, folder) for node in nodes}
    tasks = list(asked.values())
    answered, _ = ray.wait(tasks, num_returns=len(tasks), timeout=ANSWER_TIMEOUT_S)
    blind = {}
    for node, address in nodes.items():
        said = _said(asked[node]) if asked[node] in answered else None
        if said is None:
            blind[node] = f"{address} (no answer)"
        elif not (said and _reads(folder / f"{ANSWER}-{node}", folder.name)):
            blind[node] = address
    there = _nodes() if blind else {}
    return [address for node, address in blind.items() if node in there]


def _ask(node: str, folder: Path) -> ray.ObjectRef:
    there = NodeAffinitySchedulingStrategy(node, soft=False)
    task = ray.remote(_answer).options(num_cpus=0, max_retries=0, scheduling_strategy=there)
    return task.remote(str(folder), f"{ANSWER}-{node}")


def _answer(folder: str, answer: str) -> bool:
    """Runs on a node: answer in `folder` if the question is there. A folder that is not there is not made."""
    question = Path(folder, QUESTION)
    seen = _reads(question, question.parent.name)
    if seen:
        Path(folder, answer).write_text(question.parent.name)
    return seen


def _said(task: ray.ObjectRef) -> bool | None:
    """What a node answered; None if its process or the node itself was lost."""
    try:
        return bool(ray.get(task))
    except RayTaskError:  # it may not write there
        return False
    except RayError:
        return None


def _reads(file: Path, content: str) -> bool:
    """Whether `file` holds `content`, at once or within SIGHT_TIMEOUT_S."""
    deadline = time.monotonic() + SIGHT_TIMEOUT_S
    while True:
        try:
            if file.read_text() == content:
                return True
        except OSError:
            pass
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.1)
