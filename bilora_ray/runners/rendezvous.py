"""Where the workers of one trial meet: as Ray Train does it, but not open to every network.

torch's own meeting place listens on all interfaces of the first worker's machine. This one listens on the address that
the node has in its cluster, which is 127.0.0.1 where the cluster is of one machine.
"""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any

import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend


class PrivateTorchConfig(TorchConfig):
    """A TorchConfig whose rendezvous listens on the node's own address only."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        """What sets up the workers' process group."""
        return _PrivateBackend


class _PrivateBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        address = worker_group.execute_single(0, _open_store)
        backend = "nccl" if worker_group.get_resources_per_worker().get("GPU", 0) > 0 else "gloo"
        timeout = timedelta(seconds=backend_config.timeout_s)
        ranks = range(len(worker_group))
        ray.get([worker_group.execute_single_async(r, _join, backend, address, r, len(ranks), timeout) for r in ranks])


_stores: list[Any] = []


def _open_store() -> tuple[str, int]:
    """Runs on the first worker: host the store for as long as the process lives; its address."""
    from torch.distributed import TCPStore

    host = ray.util.get_node_ip_address()
    listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    port = listener.getsockname()[1]
    store = TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    _stores.append(store)
    return host, port


def _join(backend: str, address: tuple[str, int], rank: int, world_size: int, timeout: timedelta) -> None:
    """Runs on each worker: meet the others."""
    from torch import distributed as dist

    store = dist.TCPStore(*address, is_master=False, timeout=timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
