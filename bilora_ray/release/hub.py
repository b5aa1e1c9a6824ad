"""What is exported, on the Hugging Face Hub. The token is huggingface_hub's business, and neither read nor shown."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from bilora_ray.errors import UserError, first_line, refusal
from bilora_ray.paths import kind_by_name
from bilora_ray.recipe import read_recipe

OPTION = "--push-to-hub"


def check_push(repository: str) -> None:
    """Look whether `repository` could be pushed to: its name, and that somebody is logged in. Nothing is sent.

    Raises:
        UserError: it is no name, nobody is logged in, or the Hub is not to be asked.
        MachineError: the Hub does not answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"{OPTION} {repository}: is no name of a repository ({first_line(error)})") from None
    if HF_HUB_OFFLINE:
        raise UserError(f"{OPTION} {repository}: HF_HUB_OFFLINE is set, so that the Hub is not asked")
    try:
        HfApi().whoami()
    except LocalTokenNotFoundError:
        login = "`hf auth login` does that, or a token in HF_TOKEN"
        raise UserError(f"{OPTION} {repository}: nobody is logged in on the Hub; {login}") from None
    except Exception as error:  # its type depends on the HTTP library beneath
        raise refusal(f"{OPTION} {repository}: the Hub says no ({first_line(error)})", error) from None


def fetch_card(adapter: Path) -> None:
    """Have the card of the base model of `adapter` in the Hub's cache, where its licence is read; or do without."""
    from huggingface_hub import hf_hub_download

    settings = read_recipe(adapter)["settings"]
    name, revision = settings["model_name_or_path"], settings["model_revision"]
    if kind_by_name(name, is_data=False) == "hub":
        with suppress(Exception):  # a base has no card as often as a Hub does not answer; who pushes learns the latter
            hf_hub_download(name, "README.md", revision=revision)


def push(folder: Path, repository: str, private: bool) -> str:
    """Put the files of `folder` into `repository` in one commit; it is made if it is not there. Its address.

    Args:
        folder: what was exported.
        repository: its name, with or without its owner's.
        private: whether a new one is for its owner only.

    Raises:
        UserError: the Hub refuses it.
        MachineError: the Hub does not answer, or fails.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    api = HfApi()
    try:
        made = api.create_repo(repository, private=private or None, exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message="Upload with bilora-ray")
    except Exception as error:  # its type depends on the HTTP library beneath
        raise refusal(
            f"{OPTION} {repository}: the Hub says no ({first_line(error)}); what was exported is in {folder}", error
        ) from None
    return str(made)
