"""Whether all that a search needs is there: each thing with how it is, and how it is mended."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from bilora_ray.errors import first_line
from bilora_ray.search.readiness import machine, services
from bilora_ray.search.readiness.findings import Finding, Verdict
from bilora_ray.search.study.layout import Layout


def examine(layout: Layout, ray_address: str | None, mlflow_uri: str) -> Iterator[Finding]:
    """Look at one thing after the other; what is wrong with one keeps none of the others from being looked at.

    Nothing is begun, and nothing stays written.

    Args:
        layout: where studies are, or shall be.
        ray_address: Ray cluster; None: one on this machine.
        mlflow_uri: MLflow server or database.
    """
    looks: tuple[tuple[str, Callable[[], Iterator[Finding]]], ...] = (
        ("packages", machine.packages),
        ("GPUs", machine.gpus),
        ("memory", machine.memory),
        (str(machine.SHARED_MEMORY), machine.shared_memory),
        ("open files", machine.open_files),
        ("temporary files", machine.temporary),
        ("storage path", partial(machine.storage, layout.storage_path)),
        ("study database", partial(services.studies, layout)),
        ("MLflow", partial(services.mlflow, mlflow_uri)),
        ("Hub", services.hub),
        ("Ray", partial(services.ray_cluster, ray_address, layout.storage_path)),
    )
    for about, look in looks:
        try:
            yield from look()
        except Exception as error:  # what is wrong with a machine is of any kind, a library that cannot be imported too
            yield Finding(about, Verdict.FAULT, f"cannot be looked at ({type(error).__name__}: {first_line(error)})")
