"""Whether strangers could use what a search is about to use on other machines. Nothing here imports Ray or MLflow."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlsplit

from bilora_ray.addresses import is_local, masked
from bilora_ray.errors import UserError
from bilora_ray.tracking.store import unprotected

TOKEN_FILE = "~/.ray/auth_token"
# Ray sets it in the processes of a job.
IN_A_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"


def check_mlflow(uri: str | None) -> None:
    """Refuse an MLflow server on another machine that is to be used without credentials.

    Raises:
        UserError: that is so.
    """
    if uri is not None and unprotected(uri):
        raise UserError(
            f"--mlflow-uri {masked(uri)}: on another machine and without credentials; set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, or give --insecure"
        )


def check_ray(address: str | None, option: str) -> None:
    """Refuse a Ray cluster on another machine that is to be used without a token.

    Args:
        address: of the cluster, or the URL of its dashboard; None: one on this machine.
        option: that gave the address, for the error.

    Raises:
        UserError: Ray will show no token, or one from a file that other users can read.
    """
    if address == "auto":
        # Ray itself reads it so.
        address = os.environ.get("RAY_ADDRESS") or "auto"
    # A job is on the cluster already, whatever its address is.
    if address is None or IN_A_JOB in os.environ or _is_of_this_machine(address):
        return
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    file = Path(named or TOKEN_FILE).expanduser()
    in_environment = bool(os.environ.get("RAY_AUTH_TOKEN"))
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token" or not (in_environment or file.is_file()):
        raise UserError(
            f"{option} {address}: on another machine and without a token; start it with Ray's token authentication "
            "and set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN here, or give --insecure"
        )
    if not in_environment and file.stat().st_mode & 0o077:
        raise UserError(f"{option} {address}: other users may read its token: chmod 600 {file}, or give --insecure")


def _is_of_this_machine(address: str) -> bool:
    if address in ("auto", "local"):
        return True
    try:
        host = urlsplit(address if "://" in address else f"//{address}").hostname
    except ValueError:  # no address, which is said when it is used
        return True
    return host is None or is_local(host)
