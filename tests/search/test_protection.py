"""A Ray cluster or MLflow server of another machine is used with a secret or with --insecure."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from bilora_ray.cli.main import main
from bilora_ray.errors import UserError
from bilora_ray.search.cluster.protection import IN_A_JOB, check_mlflow, check_ray
from bilora_ray.tracking.store import CREDENTIALS

FAR = [
    "head:6379",
    "10.0.0.5:6379",
    "ray://head:10001",
    "ray://10.0.0.5",
    "http://head:8265",
    "127.0.0.1.evil.org:6379",
]
NEAR = [
    None,
    "auto",
    "local",
    "127.0.0.1:6379",
    "localhost:6379",
    "ray://127.0.0.1:10001",
    "ray://localhost",
    "[::1]:1",
]


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    names = {name for names in CREDENTIALS for name in names}
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", IN_A_JOB, *names):
        monkeypatch.delenv(name, raising=False)


def refused(check: Callable[..., None], *arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        check(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("address", NEAR)
def test_a_cluster_of_this_machine_needs_nothing(address: str | None) -> None:
    check_ray(address, "--ray-address")


@pytest.mark.parametrize("address", FAR)
def test_another_machines_cluster_needs_a_token(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refused(check_ray, address, "--ray-address") == (
        f"--ray-address {address}: on another machine and without a token; start it with Ray's token authentication "
        "and set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN here, or give --insecure"
    )
    monkeypatch.setenv("RAY_AUTH_TOKEN", "x")  # which Ray does not show as long as the mode is another
    assert "without a token" in refused(check_ray, address, "--ray-address")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    check_ray(address, "--ray-address")


def test_a_mode_without_a_token_is_not_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert "without a token" in refused(check_ray, "head:6379", "--ray-address")


def test_auto_is_what_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert "--ray-address head:6379: on another machine" in refused(check_ray, "auto", "--ray-address")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    check_ray("auto", "--ray-address")


def test_a_job_is_on_its_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.5:6379")
    monkeypatch.setenv(IN_A_JOB, "{}")
    check_ray("auto", "--ray-address")
    check_ray("10.0.0.5:6379", "--ray-address")


@pytest.mark.parametrize("named", [True, False])
def test_a_token_file_must_be_private(named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    file = tmp_path / ("elsewhere" if named else ".ray/auth_token")
    file.parent.mkdir(exist_ok=True)
    file.write_text("x")
    if named:
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    for mode in (0o644, 0o640, 0o604):
        file.chmod(mode)
        assert refused(check_ray, "head:6379", "--ray-address") == (
            f"--ray-address head:6379: other users may read its token: chmod 600 {file}, or give --insecure"
        )
        assert file.stat().st_mode & 0o777 == mode
    file.chmod(0o600)
    check_ray("head:6379", "--ray-address")


def test_another_machines_mlflow_needs_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    assert refused(check_mlflow, "http://host:5000") == (
        "--mlflow-uri http://host:5000: on another machine and without credentials; set MLFLOW_TRACKING_USERNAME and "
        "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, or give --insecure"
    )
    check_mlflow("http://me:secret@host:5000")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "x")
    check_mlflow("http://host:5000")


@pytest.mark.parametrize("broken", ["http://[::1", "http://", "[::1"])
def test_what_is_no_address_is_left_to_who_uses_it(broken: str) -> None:
    check_mlflow(broken)
    check_ray(broken, "--ray-address")


COMMANDS = [
    ("tune --space s.yaml --ray-address head:6379", "--ray-address head:6379: on another machine"),
    ("tune --space s.yaml --mlflow-uri http://host:5000", "--mlflow-uri http://host:5000: on another machine"),
    ("submit --space s.yaml --storage-path /runs --address http://head:8265", "--address http://head:8265: on another"),
    ("train --space s.yaml --mlflow-uri http://host:5000", "--mlflow-uri http://host:5000: on another machine"),
]


@pytest.mark.parametrize(("typed", "line"), COMMANDS)
def test_the_commands_refuse_in_one_line_and_insecure_lets_them_go_on(typed: str, line: str) -> None:
    result = CliRunner().invoke(main, typed.split())
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"Error: {line}")
    assert result.stderr.count("\n") == 1
    # With it, the next mistake is the one that is told.
    assert CliRunner().invoke(main, [*typed.split(), "--insecure"]).stderr == "Error: s.yaml: no such file\n"
