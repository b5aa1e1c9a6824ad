"""The errors that a user can cause, and how a wrong name finds its nearest right one."""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

# So many names are listed in a line.
MOST_NAMES = 20
# So many names that end with the one that was typed are all offered.
MOST_LONGER = 3
# What is said to whom a machine has stopped amid a study.
GO_ON = "; mend that and go on with --resume"
# What the system says of a path that is not as a user named it. All else that it says is the machine's.
WRONG_PATH = frozenset(
    {
        errno.EACCES,
        errno.EISDIR,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EPERM,
    }
)
# Whose errors are a connection's; what a server refuses has the server's response.
NETWORK = frozenset({"aiohttp", "httpcore", "httpx", "httpx2", "requests", "urllib3"})
# A server that is asked too much, or fails, may answer the same another time.
BUSY = frozenset({408, 429})
# The Hub has not answered, and its cache here has not what was asked for.
UNREACHED = "LocalEntryNotFoundError"
# What code raises again, however often it is started: it is wrong itself, or what it was given is.
SAME_AGAIN = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    NotImplementedError,
    RecursionError,
    SyntaxError,
    TypeError,
    ValueError,
)
# As torch says it of tensors that do not go together, and of what cannot be computed or has no gradient. Else its
# RuntimeErrors may be of a device or of another worker.
MISFIT = re.compile(
    r"\b(dimensions?|dtypes?|scalar type|shapes?|sizes?)\b|not implemented for|on the (same|expected) device"
    r"|does not require grad|inplace operation|through the graph a second time",
    re.IGNORECASE,
)
OF_A_DEVICE = re.compile(r"\b(CUDA|CUBLAS|cuDNN|NCCL|HIP|gloo|DefaultCPUAllocator)\b", re.IGNORECASE)


class UserError(Exception):
    """Bad input. Its text is one line: what is wrong, where, and what is allowed.

    The command line prints the line and exits with code 2; a library caller catches it.
    """


class MachineError(UserError):
    """What stopped a search is the machine's or the network's, as a full disk is: it can go on once that is mended."""


class CommonCause(MachineError):
    """So many trials in a row have failed for one cause that a search was halted: who goes on with it has looked."""


class TrialFailure(Exception):
    """A trial that cannot go on although its input is right: the search records it and goes on.

    Attributes:
        by_settings: whether its own settings are why, so that a search is to keep away from them.
    """

    by_settings = False


class OutOfMemory(TrialFailure):
    """The trial's settings want more memory than there is, even for one row."""

    by_settings = True


class NonFiniteLoss(TrialFailure):
    """The loss became NaN or infinite."""

    by_settings = True

    def __init__(self, step: int, loss: float) -> None:
        super().__init__(f"loss is {loss} at step {step}")
        self.step = step
        self.loss = loss

    def __reduce__(self) -> tuple[type[NonFiniteLoss], tuple[int, float]]:
        return type(self), (self.step, self.loss)


def nearest(name: str, allowed: Iterable[str], otherwise: str = "none has a name like it") -> str:
    """A hint for a misspelt `name`.

    That is the nearest of `allowed`, or those that end with it, or their list; `otherwise` if a line cannot
    hold that.
    """
    names = sorted(allowed)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    longer = [one for one in names if one.endswith(f"_{name}")]
    if close or 0 < len(longer) <= MOST_LONGER:
        return f"did you mean {' or '.join(repr(one) for one in close or longer)}?"
    if len(names) > MOST_NAMES:
        return otherwise
    return f"allowed: {', '.join(names)}"


def first_line(error: BaseException) -> str:
    """The first line of what `error` says, or its type's name if it says nothing.

    Of the system's errors that is what happened, and to which file: of two the one that was to be written.
    """
    if isinstance(error, OSError) and error.strerror:
        file = error.filename2 or error.filename
        return error.strerror if file is None else f"{error.strerror}: {file}"
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def refusal(line: str, cause: BaseException) -> UserError:
    """`line` about what could not be read because of `cause`, as the error to raise.

    It is bad input if a file is missing or malformed, and a MachineError if the same file may be read another time: the
    disk, the network or the Hub failed.
    """
    return MachineError(line) if any(map(_may_pass, _chain(cause))) else UserError(line)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """`error`, and what it came of: a library seldom hands on what the system said."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _may_pass(error: BaseException) -> bool:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return status >= 500 or status in BUSY
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno not in WRONG_PATH
    library = type(error).__module__.partition(".")[0]
    return isinstance(error, ConnectionError | MemoryError | TimeoutError) or (
        library in NETWORK or type(error).__name__ == UNREACHED
    )


@contextmanager
def not_again() -> Iterator[None]:
    """Turn what the block would raise in each of several starts into a TrialFailure, after which there is no other."""
    try:
        yield
    except (TrialFailure, UserError, OSError):
        raise
    except Exception as error:  # a model's own code may raise any; what another start may mend is raised again
        if not comes_again(error):
            raise
        raise TrialFailure(f"{type(error).__name__}: {first_line(error)}") from error


def comes_again(error: Exception) -> bool:
    """Whether `error` is of the code or of what it was given, so that a second start would raise it too."""
    return isinstance(error, SAME_AGAIN) or _is_misfit(error)


def is_of_device(error: Exception) -> bool:
    """Whether torch says what a device could not do, or another worker: it may do it another time."""
    return isinstance(error, RuntimeError) and bool(OF_A_DEVICE.search(str(error)))


def _is_misfit(error: Exception) -> bool:
    """Whether what torch, or the `tokenizers` library, says is of what it was given."""
    if type(error) is Exception:  # as what is written in Rust raises it
        return True
    return type(error) is RuntimeError and bool(MISFIT.search(str(error))) and not is_of_device(error)
