"""What the tracker writes into a SQLite store, read back with MLflow's own client."""

from __future__ import annotations

import json
import math
import pickle
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest_tracking import SETTINGS, STUDY, Project, evaluation, record
from mlflow import MlflowClient

from bilora_ray.tracking.mlflow_tracker import MlflowTracker
from bilora_ray.tracking.records import Status, TrialRecord
