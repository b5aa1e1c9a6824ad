"""deploy/compose.yaml, .env.example and .gitignore: valid, closed to other machines, no password of their own."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema.validators import validator_for

VARIABLE = re.compile(r"\$\{(\w+)(:[?-])?([^}]*)\}")


@pytest.fixture(scope="module")
def services(deploy: Path) -> dict[str, Any]:
    """The services of the file."""
    return yaml.safe_load((deploy / "compose.yaml").read_text())["services"]


def test_it_follows_the_compose_specification(deploy: Path) -> None:
    schema = json.loads((resources.files("check_jsonschema.builtin_schemas") / "vendor/compose-spec.json").read_text())
    validator = validator_for(schema)(schema)
    text = (deploy / "compose.yaml").read_text()
    validator.validate(yaml.safe_load(text))
    assert not validator.is_valid(yaml.safe_load(text.replace("healthcheck:", "healthchecks:", 1)))


def test_docker_compose_takes_it(deploy: Path, tool: Callable[[str], str], tmp_path: Path) -> None:
    docker = tool("docker")
    if subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode:
        pytest.skip("docker has no compose plugin")
    command = [docker, "compose", "--file", str(deploy / "compose.yaml"), "--env-file", str(tmp_path / "env"), "config"]
    (tmp_path / "env").write_text((deploy / ".env.example").read_text())
    assert subprocess.run(command, capture_output=True, check=False).returncode, "empty passwords must be refused"
    (tmp_path / "env").write_text("POSTGRES_PASSWORD=a\nS3_ACCESS_KEY=b\nS3_SECRET_KEY=c\n")
    subprocess.run([*command, "--quiet"], check=True)


def test_images_are_pinned(services: dict[str, Any], pinned: dict[str, str]) -> None:
    for name, service in services.items():
        assert "build" not in service
        if service["image"].startswith("ghcr.io/mlflow/"):
            assert service["image"] == f"ghcr.io/mlflow/mlflow:v{pinned['mlflow']}-full", "the clients' version"
        else:
            assert re.fullmatch(r"[\w./-]+:[\w.]+@sha256:[0-9a-f]{64}", service["image"]), name


def test_only_mlflow_listens_and_only_here(deploy: Path, services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert service.get("network_mode") is None
        assert service["networks"] == (["stores", "outside"] if name == "mlflow" else ["stores"])
        assert [port.partition(":")[0] for port in service.get("ports", [])] == ["127.0.0.1"] * (name == "mlflow")
    assert yaml.safe_load((deploy / "compose.yaml").read_text())["networks"]["stores"] == {"internal": True}


def test_nobody_has_privileges(services: dict[str, Any]) -> None:
    for service in services.values():
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert not {"privileged", "cap_add", "devices"} & set(service)
        assert not any(volume.startswith(("/", ".")) for volume in service.get("volumes", []))


def test_passwords_come_from_the_environment(deploy: Path, services: dict[str, Any]) -> None:
    text = (deploy / "compose.yaml").read_text()
    used = {name: (mode, rest) for name, mode, rest in VARIABLE.findall(text)}
    example = dict(
        line.split("=") for line in (deploy / ".env.example").read_text().splitlines() if line[:1] not in "#"
    )
    assert set(used) == set(example)
    assert set(example.values()) == {""}
    for name, (mode, _) in used.items():
        assert mode == (":-" if name == "MLFLOW_PORT" else ":?"), name
    for service in services.values():
        for variable, value in service.get("environment", {}).items():
            if re.search("PASSWORD|KEY|SECRET", variable):
                assert VARIABLE.fullmatch(value), variable
    assert ".env" in (deploy / ".gitignore").read_text().splitlines()


def test_each_service_waits_for_what_it_needs(services: dict[str, Any]) -> None:
    for name, service in services.items():
        if name != "bucket":
            assert service["healthcheck"]["test"][0] == "CMD"
            assert service["restart"] == "unless-stopped"
    conditions = {name: needs["condition"] for name, needs in services["mlflow"]["depends_on"].items()}
    assert conditions == {
        "postgres": "service_healthy",
        "s3": "service_healthy",
        "bucket": "service_completed_successfully",
    }


def test_the_bucket_script_is_python(services: dict[str, Any]) -> None:
    program, flag, script = services["bucket"]["command"]
    assert (program, flag) == ("python", "-c")
    compile(script, "bucket", "exec")
    assert 'Bucket="mlflow"' in script
    assert services["mlflow"]["environment"]["MLFLOW_ARTIFACTS_DESTINATION"] == "s3://mlflow"


def test_mlflow_reads_its_settings_from_these_variables(services: dict[str, Any]) -> None:
    from mlflow.cli import cli

    command = cli.commands["server"]
    known = {option.envvar for option in command.params}
    assert {"MLFLOW_BACKEND_STORE_URI", "MLFLOW_ARTIFACTS_DESTINATION"} <= known
    command.make_context("server", services["mlflow"]["command"][2:])
