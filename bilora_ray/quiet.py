"""Silences what libraries print while a person watches ours."""

from __future__ import annotations

import logging
import os
import sys
import warnings

import huggingface_hub
import transformers


def quiet() -> None:
    """No progress bars, no load reports, no warnings of the libraries beneath in this process.

    To be called before PEFT is imported, which imports bitsandbytes wherever it is installed.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # It reads this at its import, which takes long, and only who reads the Hub's data comes to it.
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if (datasets := sys.modules.get("datasets")) is not None:
        datasets.disable_progress_bars()
    huggingface_hub.logging.set_verbosity_error()
    # It says at its import which kernels it does without.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
