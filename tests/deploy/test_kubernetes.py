"""The manifests of deploy/kubernetes: valid, unprivileged, without a secret in them, and agreeing with each other."""

from __future__ import annotations

import copy
import json
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from jsonschema.validators import Draft202012Validator

KUBERNETES = "1.34"
SECRETIVE = re.compile(r"TOKEN|PASSWORD|SECRET|USERNAME|KEY|CREDENTIAL")


@pytest.fixture(scope="module")
def manifests(deploy: Path) -> dict[str, dict[str, Any]]:
    """File name -> the one object in it."""
    return {path.name: yaml.safe_load(path.read_text()) for path in (deploy / "kubernetes").iterdir()}


@pytest.fixture(scope="module")
def clusters(manifests: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """File name -> the Ray cluster that it describes."""
    return {
        "raycluster.yaml": manifests["raycluster.yaml"]["spec"],
        "rayjob.yaml": manifests["rayjob.yaml"]["spec"]["rayClusterSpec"],
    }


def _custom(manifest: dict[str, Any]) -> None:
    schema = json.loads(Path(__file__).with_name("kuberay.schema.json").read_text())
    Draft202012Validator.check_schema(schema)
    jsonschema.validate(manifest, schema, cls=Draft202012Validator)
    for template in _templates(manifest):
        # The API server checks a pod template as it does a pod; "strict" refuses what it would prune.
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "any"}, "template": template}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def _templates(manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    spec = manifest["spec"]
    if manifest["kind"] == "RayJob":
        yield spec["submitterPodTemplate"]
        spec = spec["rayClusterSpec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        yield group["template"]


def _container(group: dict[str, Any]) -> dict[str, Any]:
    (container,) = group["template"]["spec"]["containers"]
    return container


def test_manifests_are_valid(manifests: dict[str, dict[str, Any]]) -> None:
    for manifest in manifests.values():
        if manifest["apiVersion"] == "ray.io/v1":
            _custom(manifest)
        else:
            kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda spec: spec["authOptions"].update(secretname="t"),
        lambda spec: spec["autoscalerOptions"].update(idleTimeoutSeconds="300"),
        lambda spec: spec["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
        lambda spec: spec["workerGroupSpecs"][0].update(maxReplica=8),
        lambda spec: spec["workerGroupSpecs"][0]["template"]["spec"].update(securitycontext={}),
        lambda spec: _container(spec["headGroupSpec"]).update(env=[{"value": "nameless"}]),
    ],
)
def test_a_wrong_manifest_is_not(manifests: dict[str, dict[str, Any]], spoil: Callable[[Any], None]) -> None:
    manifest = copy.deepcopy(manifests["raycluster.yaml"])
    spoil(manifest["spec"])
    with pytest.raises(jsonschema.ValidationError):
        _custom(manifest)


def test_every_pod_is_restricted(manifests: dict[str, dict[str, Any]]) -> None:
    """As Pod Security's level "restricted" has it, and with limits."""
    pods = [template["spec"] for name in ("rayjob.yaml", "raycluster.yaml") for template in _templates(manifests[name])]
    assert len(pods) == 5
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] == 1000
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        assert all("hostPath" not in volume for volume in pod.get("volumes", []))
        assert "initContainers" not in pod
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            for kind in ("requests", "limits"):
                assert {"cpu", "memory"} <= set(container["resources"][kind])
            assert re.fullmatch(r"registry\.example\.com/bilora-ray:\d+\.\d+\.\d+", container["image"])


def test_secrets_come_from_secrets(manifests: dict[str, dict[str, Any]], clusters: dict[str, dict[str, Any]]) -> None:
    assert not any(manifest["kind"] == "Secret" for manifest in manifests.values())
    for cluster in clusters.values():
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            for variable in _container(group)["env"]:
                if SECRETIVE.search(variable["name"]):
                    assert set(variable) == {"name", "valueFrom"}
                    assert set(variable["valueFrom"]) == {"secretKeyRef"}
        # KubeRay puts RAY_AUTH_MODE and RAY_AUTH_TOKEN, from this secret, into every container that it starts.
        assert cluster["authOptions"] == {"mode": "token", "secretName": "bilora-ray-token"}


def test_the_cluster_grows_from_nothing_and_shrinks(
    clusters: dict[str, dict[str, Any]], pinned: dict[str, str]
) -> None:
    for cluster in clusters.values():
        assert cluster["rayVersion"] == pinned["ray"]
        assert cluster["enableInTreeAutoscaling"] is True
        assert cluster["autoscalerOptions"]["idleTimeoutSeconds"] > 0
        assert cluster["autoscalerOptions"]["securityContext"]["allowPrivilegeEscalation"] is False
        assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
        (gpu,) = cluster["workerGroupSpecs"]
        assert 0 == gpu["minReplicas"] == gpu["replicas"] < gpu["maxReplicas"]
        assert _container(gpu)["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_all_nodes_share_the_volume(manifests: dict[str, dict[str, Any]], clusters: dict[str, dict[str, Any]]) -> None:
    claim = manifests["storage.yaml"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for cluster in clusters.values():
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            volumes = {volume["name"]: volume for volume in group["template"]["spec"]["volumes"]}
            assert volumes["shared"]["persistentVolumeClaim"] == {"claimName": claim["metadata"]["name"]}
            mounts = {mount["name"]: mount["mountPath"] for mount in _container(group)["volumeMounts"]}
            assert mounts["shared"] == "/shared"
            assert set(mounts) == set(volumes)


def test_job_and_cluster_differ_in_the_space_file_only(clusters: dict[str, dict[str, Any]]) -> None:
    job = copy.deepcopy(clusters["rayjob.yaml"])
    pod = job["headGroupSpec"]["template"]["spec"]
    assert pod["volumes"].pop() == {"name": "space", "configMap": {"name": "bilora-ray-space"}}
    assert pod["containers"][0]["volumeMounts"].pop()["mountPath"] == "/etc/bilora-ray"
    assert job == clusters["raycluster.yaml"]


def test_the_job_runs_the_ordinary_command(manifests: dict[str, dict[str, Any]]) -> None:
    spec = manifests["rayjob.yaml"]["spec"]
    (gpu,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    words = spec["entrypoint"].split()
    assert words[:4] == ["bilora-ray", "tune", "--space", "/etc/bilora-ray/space.yaml"]
    assert words[words.index("--max-concurrent") + 1] == str(gpu["maxReplicas"])
    head = {
        variable["name"]: variable.get("value")
        for variable in _container(spec["rayClusterSpec"]["headGroupSpec"])["env"]
    }
    assert head["MLFLOW_TRACKING_URI"]
    assert spec["backoffLimit"] == 0
    assert spec["shutdownAfterJobFinishes"] is True
    # KubeRay puts the entrypoint into a shell line of the submitter as it is: nothing there may need quotes.
    assert re.fullmatch(r"[\w /.-]+", spec["entrypoint"])


def test_the_readme_resumes_a_job(root: Path, deploy: Path, manifests: dict[str, dict[str, Any]]) -> None:
    (line,) = re.findall(r"^ *(sed .*rayjob\.yaml) \| kubectl", (deploy / "README.md").read_text(), re.M)
    done = subprocess.run(["bash", "-c", line], cwd=root, capture_output=True, text=True, check=True)
    resumed, before = yaml.safe_load(done.stdout), copy.deepcopy(manifests["rayjob.yaml"])
    before["spec"]["entrypoint"] = before["spec"]["entrypoint"].replace("auto ", "auto --resume ")
    assert resumed == before
    assert resumed != manifests["rayjob.yaml"]


def test_the_readme_makes_what_the_manifests_refer_to(deploy: Path) -> None:
    text = (deploy / "README.md").read_text()
    assert "create secret generic bilora-ray-token --from-literal=auth_token=" in text
    assert "create configmap bilora-ray-space --from-file=space.yaml=" in text
    for key in ("hf_token", "mlflow_username", "mlflow_password"):
        assert f"`{key}`" in text
        assert f"key: {key}" in (deploy / "kubernetes" / "rayjob.yaml").read_text()
