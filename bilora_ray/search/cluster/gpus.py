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
KERNEL = "import sys; from bilora_ray.training.compute.precision import missing; print(missing(*sys.argv[1:]) or '')"
# How much of a GPU a question takes of what Ray hands out.
SHARE = 0.001
# What asks sees all GPUs that the node has for Ray, and not only the one that it has its share of.
ALL_VISIBLE = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
REFUSAL = "precision: auto asks the GPUs, and {}; give precision: bf16, or fp32"


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


def missing_here(kernel: str, precision: str) -> str | None:
    """What an attention `kernel` needs that trials on this machine have not: see `varlen.missing`.

    Raises:
        UserError: this machine's GPUs do not say what they are.
    """
    try:
        return _answer(KERNEL, kernel, precision) or None
    except _Unanswered as error:
        raise UserError(f"attn_implementation: {kernel} needs a GPU, and {error}") from None


def _of_machine() -> str:
    try:
        found = _answer(QUESTION)
        if found not in ("bf16", "fp32"):
            raise _Unanswered(f"they say {repr(found) if found else 'nothing'}")
    except _Unanswered as error:
        raise UserError(REFUSAL.format(error)) from None
    return found


class _Unanswered(Exception):
    """In words."""


def _answer(question: str, *arguments: str) -> str:
    """The last line that a process prints which asks the GPUs."""
    command = [sys.executable, "-c", question, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise _Unanswered(f"they cannot be asked ({lines[-1] if lines else f'exit code {done.returncode}'})")
    lines = done.stdout.strip().splitlines()
    return lines[-1] if lines else ""


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
        if isinstance(cause := getattr(error, "cause", None), UserError):
            raise cause from None
        problem = f"a node did not answer ({type(error).__name__})"
    raise UserError(REFUSAL.format(problem))


def _ask(node: str) -> ray.ObjectRef:
    there = NodeAffinitySchedulingStrategy(node, soft=False)
    options = {"num_cpus": 0, "num_gpus": SHARE, "max_retries": 0, "runtime_env": {"env_vars": ALL_VISIBLE}}
    return ray.remote(_of_machine).options(scheduling_strategy=there, **options).remote()
