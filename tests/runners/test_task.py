"""How a trial's end is told: what another start would end with too, what the machine did, what the input was."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import distributed

from bilora_ray.errors import MachineError, NonFiniteLoss, OutOfMemory, TrialFailure, UserError, not_again
from bilora_ray.runners import own_process
from bilora_ray.runners.task import (
    BAD_INPUT,
    BROKEN,
    BY_SETTINGS,
    FAILURE,
    FOLDER,
    NUMBER,
    RESOURCES,
    TRIALS,
    explained,
)


def misfit() -> None:
    torch.zeros(2, 3) @ torch.zeros(2, 3)


def other_dtype() -> None:
    torch.zeros(2, 2) @ torch.zeros(2, 2, dtype=torch.bfloat16)


def no_such_package() -> None:
    import no_such_package  # noqa: F401


def no_kernel() -> None:
    torch.zeros(2, dtype=torch.bool).softmax(0)


def no_gradient() -> None:
    torch.zeros(2).sum().backward()


def changed_in_place() -> None:
    x = torch.ones(2, requires_grad=True)
    y = x.exp()
    y.add_(1)
    y.sum().backward()


def backward_twice() -> None:
    y = torch.ones(2, requires_grad=True).exp().sum()
    y.backward()
    y.backward()


def other_device() -> None:
    torch.zeros(2, 2).add(torch.zeros(2, 2, device="meta"))


def behind_the_embedding() -> None:
    torch.nn.Embedding(2, 2)(torch.tensor([5]))


def no_tokenizer() -> None:
    from tokenizers import Tokenizer

    Tokenizer.from_str("{}")


def no_python() -> None:
    compile("def", "modeling.py", "exec")


def without_end() -> None:
    without_end()


def raising(error: Exception) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    "run",
    [
        misfit,
        other_dtype,
        other_device,
        no_kernel,
        no_gradient,
        changed_in_place,
        backward_twice,
        behind_the_embedding,
        no_tokenizer,
        no_such_package,
        no_python,
        without_end,
        raising(TypeError("no argument 'x'")),
    ],
)
def test_what_would_be_the_same_again_is_not_started_again(run: Callable[[], None]) -> None:
    with pytest.raises(TrialFailure) as caught, not_again():
        run()
    cause = caught.value.__cause__
    assert str(caught.value).startswith(f"{type(cause).__name__}: {str(cause)[:20]}")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: unspecified launch failure"),
        RuntimeError("CUDA error: invalid argument of some size"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED at some shape"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
        MemoryError(),
        RuntimeError("[../gloo/transport/tcp/pair.cc:525] Connection closed by peer [127.0.0.1]:1234"),
        torch.AcceleratorError("CUDA error: invalid argument of some size"),
        distributed.DistBackendError("NCCL error: remote process exited, message size 8"),
        OSError(errno.EIO, "Input/output error"),
        MachineError("the Hub does not answer"),
        UserError("target_modules: none"),
        NonFiniteLoss(3, float("nan")),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_another_start_may_mend_or_what_is_told_already_stays(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, not_again():
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (NonFiniteLoss(3, float("inf")), {FAILURE: "loss is inf at step 3", BY_SETTINGS: True}),
        (OutOfMemory("out"), {FAILURE: "out", BY_SETTINGS: True}),
        # A node without a package must not teach the sampler.
        (TrialFailure("ImportError: no"), {FAILURE: "ImportError: no", BY_SETTINGS: False}),
        (UserError("rank: no"), {BAD_INPUT: "rank: no"}),
        (MachineError("the Hub does not answer"), {BROKEN: "the Hub does not answer"}),
        (OSError(errno.ENOSPC, "No space left on device", "/a"), {BROKEN: "No space left on device: /a"}),
    ],
)
def test_a_trial_says_whose_fault_its_end_was(error: Exception, told: dict[str, object]) -> None:
    assert explained({NUMBER: 7}, error) == {NUMBER: 7, **told}


@pytest.mark.parametrize("error", [ImportError("no peft"), SyntaxError("torn"), UserError("rank: no")])
def test_a_process_that_cannot_begin_says_so_once(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is imported in the trial's process is in it too."""

    def fail(*_: object) -> None:
        raise error

    told: list[dict[str, object]] = []
    monkeypatch.setattr("bilora_ray.quiet.quiet", fail)
    monkeypatch.setattr("ray.tune.report", told.append)
    own_process.run_trial({TRIALS: [{NUMBER: 7, FOLDER: str(tmp_path)}], RESOURCES: {}})
    (report,) = told
    if isinstance(error, UserError):
        assert report == {NUMBER: 7, BAD_INPUT: "rank: no"}
    else:
        assert report == {NUMBER: 7, FAILURE: f"{type(error).__name__}: {error}", BY_SETTINGS: False}
