"""What a search changes in its process, put back as it was: a notebook goes on after it."""

from __future__ import annotations

import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def left_as_found() -> Iterator[None]:
    """After the block, environment, signal handlers, warnings, levels of logs, progress bars and draws are as before.

    Libraries that set themselves up as they are imported are imported first, so that what they set is theirs.
    """
    with importing():
        import bilora_ray.quiet
        import bilora_ray.search.run  # noqa: F401

    with _environment(), _signals(), _logs(), _progress_bars(), _draws(), warnings.catch_warnings():
        yield


@contextmanager
def importing() -> Iterator[None]:
    """What is imported in the block says nothing: in a notebook tqdm and Ray ask for widgets, which nothing shows."""
    rays = logging.getLogger("ray.widgets.util")
    level = rays.level
    rays.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        rays.setLevel(level)


@contextmanager
def _environment() -> Iterator[None]:
    before = dict(os.environ)
    try:
        yield
    finally:
        for key in os.environ.keys() - before.keys():
            del os.environ[key]
        os.environ.update({key: value for key, value in before.items() if os.environ.get(key) != value})


@contextmanager
def _signals() -> Iterator[None]:
    """Only the main thread has signals to itself."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # of which Python knows nothing
                signal.signal(number, handler)


@contextmanager
def _logs() -> Iterator[None]:
    before = {logger: (logger.level, logger.disabled, logger.propagate) for logger in _loggers()}
    try:
        yield
    finally:
        for logger, (level, disabled, propagate) in before.items():
            logger.setLevel(level)
            logger.disabled, logger.propagate = disabled, propagate


def _loggers() -> list[logging.Logger]:
    known = logging.root.manager.loggerDict.values()
    return [logging.root, *(logger for logger in known if isinstance(logger, logging.Logger))]


@contextmanager
def _progress_bars() -> Iterator[None]:
    import transformers

    datasets = sys.modules.get("datasets")
    shown = transformers.logging.is_progress_bar_enabled()
    shown_of_data = datasets is None or not datasets.are_progress_bars_disabled()
    try:
        yield
    finally:
        if shown:
            transformers.logging.enable_progress_bar()
        if shown_of_data and (datasets := sys.modules.get("datasets")) is not None:
            datasets.enable_progress_bars()


@contextmanager
def _draws() -> Iterator[None]:
    """The states of the random numbers that anyone in the process may draw."""
    import numpy as np
    import torch

    python, numpy, state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(state)
