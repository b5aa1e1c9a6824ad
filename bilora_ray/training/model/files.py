"""What transformers reads of a model: of files that are here first, with what is wrong in one line."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from bilora_ray.config import TrialConfig
from bilora_ray.errors import UserError, first_line, is_of_device, refusal
from bilora_ray.measures import TASK_FACTS
from bilora_ray.paths import is_cached, kind_of, loadable

T = TypeVar("T")


def source(config: TrialConfig) -> str:
    """What `from_pretrained` takes for `model_name_or_path`."""
    return loadable(config.model_name_or_path)


def from_pretrained(kind: Any, config: TrialConfig, arguments: dict[str, Any], *optional: str) -> Any:
    """`kind.from_pretrained` of the settings' model; `optional` as in `is_cached`."""
    return here_first(config, partial(kind.from_pretrained, source(config), **arguments), *optional)


def here_first(config: TrialConfig, read: Callable[..., T], *optional: str) -> T:
    """What `read` gives. transformers would ask the Hub even of a commit that is here."""
    reads_images = TASK_FACTS[config.task].reads_images
    if is_cached(config.model_name_or_path, config.model_revision, *optional, reads_images=reads_images):
        with suppress(OSError, ValueError):  # something is missing after all
            return read(local_files_only=True)
    return read()


def hub_arguments(config: TrialConfig) -> dict[str, Any]:
    """What `from_pretrained` is told of the Hub."""
    arguments: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if config.model_revision is not None:
        arguments["revision"] = config.model_revision
    return arguments


@contextmanager
def naming_the_model(config: TrialConfig) -> Iterator[None]:
    """Turns what a wrong model, a missing package or a failing disk raises into one line that names the setting."""
    name = config.model_name_or_path
    if kind_of(name, is_data=False) == "local" and not Path(name).is_dir():
        named = "" if Path(name).is_absolute() else "; it is named from the current folder, as an export does"
        raise UserError(f"model_name_or_path: no such folder: {name}{named}")
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        raise UserError(_missing(error, config)) from error
    except Exception as error:  # of which type depends on the library, and on the model's own code
        if is_of_device(error):
            raise
        if "Unrecognized configuration class" in str(error):  # the class's name would follow, and all that are known
            raise UserError(f"task: '{name}' is no model for {config.task}") from error
        raise refusal(f"model_name_or_path: cannot load '{name}' ({first_line(error)})", error) from error


def _missing(error: ImportError, config: TrialConfig) -> str:
    """What `error` misses, and which setting asks for that."""
    name, attention, reason = config.model_name_or_path, config.attn_implementation, first_line(error)
    if "FlashAttention" in reason:
        if importlib.util.find_spec("flash_attn") is None:
            return f"attn_implementation: {attention} needs the package flash-attn: pip install flash-attn"
        return f"attn_implementation: {attention} cannot be used here ({reason})"
    if config.trust_remote_code:
        return f"trust_remote_code: the code of '{name}' cannot be imported ({reason})"
    return f"model_name_or_path: '{name}' needs a package that is not here ({reason})"
