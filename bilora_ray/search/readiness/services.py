"""What a search needs of others: Ray, MLflow, the study database, the Hub."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from bilora_ray.errors import first_line
from bilora_ray.search.cluster.protection import check_mlflow, check_ray
from bilora_ray.search.readiness.findings import Finding, Verdict, told
from bilora_ray.search.study.layout import Layout

HUB_TIMEOUT_S = 10.0
SECRETS = "SECURITY.md says how to give them; or --insecure, where nobody else is in that network"


def ray_cluster(address: str | None, storage_path: Path) -> Iterator[Finding]:
    """Whether a cluster of our own would start, or the one at `address` answers and sees the storage path."""
    from bilora_ray.search.cluster.cluster import check_address, cluster, is_own, total
    from bilora_ray.search.cluster.own_ray import check_room
    from bilora_ray.search.cluster.shared_storage import check_shared

    found: list[Finding] = []
    if is_own(address):
        with told(found, "Ray", "free some disk, or name another folder in TMPDIR"):
            check_room()
            found.append(Finding("Ray", Verdict.OK, "a search starts a cluster of its own on this machine"))
    else:
        with told(found, "Ray auth", SECRETS):
            check_ray(address, "--ray-address")
        with told(found, "Ray", "`ray status` on its head says how it is; all nodes need the same versions as here"):
            check_address(address)
            with cluster(address):
                has = total()
                line = f"{address}: nodes: {has['nodes']:g}, CPUs: {has['CPU']:g}, GPUs: {has['GPU']:g}"
                found.append(Finding("Ray", Verdict.OK, line))
                with told(found, "storage path", "mount one folder on all nodes, and name it"):
                    check_shared(storage_path)
    yield from found


def mlflow(uri: str) -> Iterator[Finding]:
    """Whether MLflow would take runs at `uri`, and nobody else would read the password."""
    from bilora_ray.tracking.store import seen

    found: list[Finding] = []
    with told(found, "MLflow auth", SECRETS):
        check_mlflow(uri)
    with told(found, "MLflow", "the search would go on without it; start it, or leave --mlflow-uri out"):
        found.append(Finding("MLflow", Verdict.OK, seen(uri)))
    yield from found


def studies(layout: Layout) -> Iterator[Finding]:
    """Whether the study database can be read."""
    from bilora_ray.search.study.storage import naming_the_database, study_names

    found: list[Finding] = []
    with told(found, "study database"), naming_the_database(layout, then=""):
        found.append(Finding("study database", Verdict.OK, f"{layout.database}: studies: {len(study_names(layout))}"))
    yield from found


def hub() -> Iterator[Finding]:
    """Whether the Hub answers, and to whom."""
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HfHubHTTPError

    if constants.is_offline_mode():
        cache = constants.HF_HUB_CACHE
        yield Finding("Hub", Verdict.NOTE, f"offline, as HF_HUB_OFFLINE says: only what is in {cache}")
        return
    try:
        if get_token() is None:
            HfApi().model_info("google-bert/bert-base-uncased", timeout=HUB_TIMEOUT_S)
            found, mend = "answers; no token, so that nothing private or gated is had", "hf auth login"
            yield Finding("Hub", Verdict.NOTE, found, mend)
        else:
            yield Finding("Hub", Verdict.OK, f"answers, to {HfApi().whoami()['name']}")
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            where = "HF_TOKEN" if os.environ.get("HF_TOKEN") else "the stored token"
            yield Finding("Hub", Verdict.FAULT, f"refuses {where} ({first_line(error)})", "hf auth login")
        else:
            mend = "it is busy, or something before it is: what is in the cache needs no answer"
            yield Finding("Hub", Verdict.NOTE, f"does not answer as it should ({first_line(error)})", mend)
    except Exception as error:  # which one it is depends on the HTTP library beneath
        mend = "local models and data need none; a proxy is named in HTTPS_PROXY"
        yield Finding("Hub", Verdict.NOTE, f"cannot be reached ({first_line(error)})", mend)
