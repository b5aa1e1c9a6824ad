"""Silences what libraries print while a person watches ours."""

from __future__ import annotations

import warnings

import datasets
import transformers


def quiet() -> None:
    """No progress bars, no load reports, no warnings of transformers and datasets in this process."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore")
