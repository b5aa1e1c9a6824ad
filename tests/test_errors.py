"""What an error says in a line, and whose fault it was: the user's file, or the machine that could not read it."""

from __future__ import annotations

import errno
import os
from types import SimpleNamespace

import pytest
import requests
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    Response,
)

from bilora_ray.errors import MachineError, UserError, first_line, refusal


def hub_says(status: int) -> HfHubHTTPError:
    answer = Response(status)
    answer.request = SimpleNamespace()
    return HfHubHTTPError("no", response=answer)


PASSES = {
    "input/output error": OSError(errno.EIO, "Input/output error"),
    "stale file handle": OSError(errno.ESTALE, "Stale file handle"),
    "full disk": OSError(errno.ENOSPC, "No space left on device"),
    "time out": TimeoutError("timed out"),
    "refused connection": ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"),
    "no memory": MemoryError(),
    "network of requests": requests.exceptions.ConnectionError("no route"),
    "network of the Hub's library": HTTPError("timed out"),
    "no Hub": OfflineModeIsEnabled("offline"),
    "no Hub and not in its cache": LocalEntryNotFoundError("not in the cache"),
    "broken Hub": hub_says(503),
    "Hub that is asked too much": hub_says(429),
}
STAYS = {
    "missing file": FileNotFoundError(errno.ENOENT, "No such file or directory"),
    "folder in the place of a file": IsADirectoryError(errno.EISDIR, "Is a directory"),
    "forbidden file": PermissionError(errno.EACCES, "Permission denied"),
    "what transformers says of a missing file": OSError("m does not appear to have a file named model.safetensors"),
    "malformed file": ValueError("not JSON"),
    "unknown repository": hub_says(404),
    "gated repository": hub_says(403),
}


def handed_on(cause: Exception) -> Exception:
    """`cause` as the reason of another error."""
    try:
        raise OSError("cannot load it") from cause
    except OSError as error:
        return error


def met_amid(cause: Exception) -> Exception:
    """`cause` as what was being handled when another error was raised."""
    try:
        try:
            raise cause
        except Exception:
            raise ValueError("no tokenizer")  # noqa: B904
    except ValueError as error:
        return error


@pytest.mark.parametrize("how", [lambda cause: cause, handed_on, met_amid], ids=["itself", "handed on", "met amid"])
@pytest.mark.parametrize("name", [*PASSES, *STAYS])
def test_what_a_resume_can_mend_is_the_machines_and_all_else_is_bad_input(name: str, how: object) -> None:
    assert callable(how)
    found = refusal("cannot load 'm'", how({**PASSES, **STAYS}[name]))
    assert type(found) is (MachineError if name in PASSES else UserError)
    assert str(found) == "cannot load 'm'"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError(errno.ENOSPC, "No space left on device", "/a"), "No space left on device: /a"),
        (OSError(errno.ENOSPC, "No space left on device", "/a", None, "/b"), "No space left on device: /b"),
        (OSError("as a library words it\nat length"), "as a library words it"),
        (ValueError(), "ValueError"),
    ],
)
def test_a_line_says_what_happened_and_to_which_file(error: Exception, line: str) -> None:
    assert first_line(error) == line


def test_the_systems_words_are_those_of_python() -> None:
    with pytest.raises(FileNotFoundError) as caught:
        os.open("/nowhere/at/all", os.O_RDONLY)
    assert first_line(caught.value) == "No such file or directory: /nowhere/at/all"
