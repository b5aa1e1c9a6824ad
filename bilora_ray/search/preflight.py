"""What can be known to be wrong before a search starts: the data's rows and the model's name."""

from __future__ import annotations

from pathlib import Path

from bilora_ray import builtin
from bilora_ray.config import TrialConfig
from bilora_ray.errors import UserError, first_line
from bilora_ray.paths import BUILTIN
from bilora_ray.search.space import Space
from bilora_ray.training.rows import load_rows


def preflight(space: Space) -> dict[str, str]:
    """Read and check the data and look for the model, with the space's first settings.

    Returns:
        The data: source -> digest of its content.

    Raises:
        UserError: a file, row, column, label or model is not as the space says.
    """
    config = space.first_config()
    check_model(config)
    digests = load_rows(config).digests
    return {_source(config, setting): digest for setting, digest in digests.items()}


def _source(config: TrialConfig, setting: str) -> str:
    """What a person calls the data of `setting`: a file, or a Hub dataset with its configuration and split."""
    name = str(getattr(config, setting) or config.train_data)
    if name.startswith(BUILTIN) or Path(name).exists():
        return name
    split = config.train_split if setting == "train_data" else config.validation_split
    return "/".join(filter(None, (name, config.dataset_config_name, split)))


def check_model(config: TrialConfig) -> None:
    """Look for the base model: built in, in a local folder, in the Hub's cache, or on the Hub.

    Raises:
        UserError: it is nowhere. A Hub that does not answer is asked once, where transformers tries for a minute.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    name, where = config.model_name_or_path, "model_name_or_path"
    if name.startswith(BUILTIN):
        try:
            builtin.path(name.removeprefix(BUILTIN))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        return
    if Path(name).is_dir():
        if not Path(name, "config.json").is_file():
            raise UserError(f"{where}: {name} holds no model: config.json is missing")
        return
    try:
        if isinstance(try_to_load_from_cache(name, "config.json", revision=config.model_revision), str):
            return
        HfApi().model_info(name, revision=config.model_revision, timeout=10)
    except HfHubHTTPError as error:
        raise UserError(f"{where}: the Hub has no model '{name}' that can be read ({first_line(error)})") from None
    except Exception:  # which one it is depends on the HTTP library beneath
        raise UserError(f"{where}: no folder '{name}' here, and the Hub, where it may be, cannot be reached") from None
