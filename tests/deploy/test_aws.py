"""deploy/ray-cluster.yaml, read by Ray's own launcher up to where it would call AWS."""

from __future__ import annotations

import ast
import itertools
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml


@pytest.fixture(scope="module")
def config(deploy: Path) -> dict[str, Any]:
    """The file."""
    return yaml.safe_load((deploy / "ray-cluster.yaml").read_text())


def test_rays_launcher_takes_it(config: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(config)
    validate_config(prepared)
    assert prepared["available_node_types"].keys() == {"head", "gpu"}
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config(config | {"idle_timeout": 5}))


def test_nothing_is_open_to_the_world_but_ssh(config: dict[str, Any]) -> None:
    assert config["provider"]["security_group"] == {"GroupName": "bilora-ray"}
    for node in config["available_node_types"].values():
        assert "SecurityGroupIds" not in node["node_config"]
        assert node["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
    (start,) = [line for line in config["head_start_ray_commands"] if "ray start" in line]
    assert "--dashboard-host=127.0.0.1" in start


def test_rays_own_rules_are_ssh_and_the_cluster_itself() -> None:
    """What the file relies on: a group of that name gets these two rules from Ray, and no other."""
    # Taken out of Ray's module because that imports boto3, which nothing else here needs.
    tree = ast.parse((Path(ray.__file__).parent / "autoscaler/_private/aws/config.py").read_text())
    tree.body = [item for item in tree.body if getattr(item, "name", "").startswith("_create_default_")]
    names: dict[str, Any] = {"itertools": itertools}
    exec(compile(tree, "config.py", "exec"), names)  # noqa: S102 # Ray's own code, cut to two functions
    rules = names["_create_default_inbound_rules"](["sg-1"])
    world = [rule for rule in rules if rule.get("IpRanges")]
    assert [(rule["FromPort"], rule["ToPort"]) for rule in world] == [(22, 22)]
    assert [rule["UserIdGroupPairs"] for rule in rules if rule not in world] == [[{"GroupId": "sg-1"}]]


def test_every_node_asks_for_the_token(config: dict[str, Any]) -> None:
    assert config["file_mounts"]["/home/ubuntu/.ray/auth_token"] == "~/.ray/auth_token"
    (profile,) = [line for line in config["setup_commands"] if "/etc/profile.d" in line]
    assert "RAY_AUTH_MODE=token" in profile
    for line in config["head_start_ray_commands"] + config["worker_start_ray_commands"]:
        assert line.startswith(". /etc/profile.d/bilora-ray.sh;")


def test_workers_are_spot_machines_with_a_gpu_and_the_head_is_not(config: dict[str, Any]) -> None:
    head, gpu = config["available_node_types"]["head"], config["available_node_types"]["gpu"]
    assert (head["resources"], gpu["resources"]) == ({"CPU": 0}, {"CPU": 8, "GPU": 1})
    assert "InstanceMarketOptions" not in head["node_config"]
    assert gpu["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert re.match(r"[gp]\d", gpu["node_config"]["InstanceType"])
    assert (gpu["min_workers"], gpu["max_workers"]) == (0, config["max_workers"]) == (0, 8)
    assert head["node_config"]["ImageId"] == gpu["node_config"]["ImageId"]


def test_storage_and_packages_are_the_same_everywhere(config: dict[str, Any]) -> None:
    setup = config["setup_commands"]
    (mount,) = [line for line in setup if "mount --types nfs4" in line]
    assert f".efs.{config['provider']['region']}.amazonaws.com:/ /shared" in mount
    assert any("--constraint ~/bilora-ray/constraints.txt" in line for line in setup)
    assert {".git", ".venv", "runs"} <= set(config["rsync_exclude"])
