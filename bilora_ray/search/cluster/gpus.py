"""Which precision a study gets that leaves it to the machines: it is decided once, when the study begins."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from bilora_ray.errors import UserError
from bilora_ray.search.cluster.shared_storage import ANSWER_TIMEOUT_S
from bilora_ray.search.space import Space

# A process of its own: one that has asked a GPU holds memory of it for as long as it lives.
QUESTION = "from bilora_ray.training.compute.precision import of_machine; print(of_machine())"
# How much of a GPU a question takes of what Ray hands out.
SHARE = 0.001


def decided(space: Space, own: bool) -> Space:
    """`space` with the precision that its trials will compute in: bf16 if they have GPUs, all of which have it.

    Args:
        space: the space.
        own: whether trials run on this machine; else Ray is connected to the cluster where they do.

    Raises:
        UserError: a machine with GPUs does not say what they are.
    """
    found = {"fp32"}
    if space.resources.gpus_per_worker:
        found = {_of_machine()} if own else _of_cluster()
    return replace(space, fixed={**space.fixed, "precision": "bf16" if found == {"bf16"} else "fp32"})


def _of_machine() -> str:
    said = subprocess.run([sys.executable, "-c", QUESTION], capture_output=True, text=True, check=False)
    lines = said.stdout.split()
    return lines[-1] if lines else "fp32"  # a trial will say what is wrong there


def _of_cluster() -> set[str]:
    nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU")}
    asked = {_ask(node): described["NodeManagerAddress"] for node, described in nodes.items()}
    answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_TIMEOUT_S) if asked else ([], [])
    try:
        if not silent:
            return set(ray.get(answered))
        which = ", ".join(sorted(asked[task] for task in silent))
        problem = f"nodes did not answer in {ANSWER_TIMEOUT_S:g} s, as busy ones do not: {which}"
    except RayError as error:
        problem = f"a node did not answer ({type(error).__name__})"
    raise UserError(f"precision: auto asks the GPUs, and {problem}; give precision: bf16, or fp32")


def _ask(node: str) -> ray.ObjectRef:
    there = NodeAffinitySchedulingStrategy(node, soft=False)
    task = ray.remote(_of_machine).options(num_cpus=0, num_gpus=SHARE, max_retries=0, scheduling_strategy=there)
    return task.remote()
