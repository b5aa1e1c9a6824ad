"""Hosts of this machine, and texts without their passwords."""

from __future__ import annotations

import pytest

from bilora_ray.addresses import is_local, masked


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST", "127.0.0.1", "127.8.9.10", "::1"])
def test_loopback_is_local(host: str) -> None:
    assert is_local(host)


@pytest.mark.parametrize(
    "host",
    ["", "host", "0.0.0.0", "::", "10.0.0.1", "127.0.0.1.evil.org", "localhost.evil.org", "128.0.0.1", "fe80::1"],
)
def test_anything_else_is_not(host: str) -> None:
    assert not is_local(host)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://host:5000", "http://host:5000"),
        ("http://me:SECRET@host:5000", "http://me:***@host:5000"),
        ("http://:SECRET@host", "http://:***@host"),
        # Passwords that nobody has quoted.
        ("http://me:SEC@RET@host", "http://me:***@host"),
        ("http://me:SEC/RET@host", "http://me:***@host"),
        ("http://me:SEC:RET@host", "http://me:***@host"),
        ("--mlflow-uri=postgresql+psycopg://me:SECRET@host/runs", "--mlflow-uri=postgresql+psycopg://me:***@host/runs"),
        ("postgresql://host/runs?user=me&password=SECRET&x=1", "postgresql://host/runs?user=me&password=***&x=1"),
        ("mssql://host/runs?PWD_PASSWORD=SECRET", "mssql://host/runs?PWD_PASSWORD=***"),
        ("API request to http://me:SECRET@host/api failed", "API request to http://me:***@host/api failed"),
        ("rho=0.1 prompt_template={a}@{b}", "rho=0.1 prompt_template={a}@{b}"),
    ],
)
def test_passwords_are_masked(text: str, shown: str) -> None:
    assert masked(text) == shown
    assert "SEC" not in masked(text)
