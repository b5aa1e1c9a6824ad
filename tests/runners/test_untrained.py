"""The process that compares a winner with its base model, on a real cluster of this machine."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_trials import Tiny, evaluate_adapter, run_fit

from bilora_ray.errors import MachineError
from bilora_ray.records import Status, TrialRecord
from bilora_ray.runners import untrained
from bilora_ray.runners.untrained import BesideBase
from bilora_ray.search.cluster.cluster import cluster
from bilora_ray.search.space import ResourceConfig
from bilora_ray.training.folder import TrialFolder

pytestmark = pytest.mark.slow


def test_the_winner_is_compared_in_a_process_of_the_cluster_which_begins_beside_the_last_trial(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.config("causal-lm", predict_with_generate=True, max_new_tokens=8)
    run_fit(config, tmp_path)
    folder = TrialFolder(tmp_path)
    adapter = folder.best_adapter()
    assert adapter is not None
    with cluster(None):
        process = BesideBase(ResourceConfig().model_dump(), num_trials=2)
        for number in (0, 1):
            assert process._process is None
            process.trial_started(TrialRecord(number, Status.RUNNING, {}, {}))
        assert process._process is not None
        found = process.compare(config.model_dump(), tmp_path, adapter, {}, measured=True)
        assert found.baseline == {"kind": "base-model", **evaluate_adapter(None, config)}
        assert len(found.examples) == 8
        # What is wrong comes back in one line.
        with pytest.raises(MachineError, match="validation_data"):
            process.compare(config.model_dump(), tmp_path, adapter, {"validation_data": "sha256:other"}, measured=True)
        monkeypatch.setattr(untrained, "ROOM_S", 1.0)
        without_room = BesideBase({**ResourceConfig().model_dump(), "gpus_per_worker": 0.5}, num_trials=1)
        without_room.trial_started(TrialRecord(0, Status.RUNNING, {}, {}))
        assert without_room._process is None  # a trial might need the GPU
        with pytest.raises(MachineError, match="no room"):
            without_room.compare(config.model_dump(), tmp_path, adapter, {}, measured=True)
