"""Adapters as MLflow's models: kept once, loaded by name, registered, and gone with their study."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities import LoggedModel

from bilora_ray.errors import UserError
from bilora_ray.records import Served, Status, TrialRecord
from bilora_ray.tracking.models import candidate
from bilora_ray.tracking.registry import Registered, register
from bilora_ray.tracking.removal import remove_runs

from .tracked import STUDY, Project, record, study_info

FACTS = {"base_model": "builtin:tiny", "license": "apache-2.0"}


def served_as(adapter: Path, **changes: Any) -> Served:
    def write(folder: Path) -> None:
        folder.mkdir()
        for file in adapter.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())

    fields: dict[str, Any] = {
        "loader": "bilora_ray.release.served",
        "inputs": ("question",),
        "texts": True,
        "config": {"model_name_or_path": "builtin:tiny", "trust_remote_code": False},
        "facts": FACTS,
        "example": {"question": "How many?"},
        "write": write,
    }
    return Served(**{**fields, **changes})


@pytest.fixture
def best(adapter: Path) -> TrialRecord:
    return record(5, Status.COMPLETE, steps=3, value=0.01, values={"eval_loss": 0.01}, adapter=adapter)


def closed(project: Project, best: TrialRecord) -> list[LoggedModel]:
    assert best.adapter is not None
    project.open().close([best], best.number, interrupted=False, served=served_as(best.adapter))
    assert project.said == []
    return list(project.client.search_logged_models([project.parent().info.experiment_id]))


def test_the_best_adapter_is_a_model_of_the_study_and_of_its_trial(project: Project, best: TrialRecord) -> None:
    (model,) = closed(project, best)
    parent, trial = project.parent(), project.trials()[5]
    assert (model.name, model.status, model.source_run_id) == ("fish-0005", "READY", parent.info.run_id)
    assert model.params == {"rho": "0.05"}
    assert FACTS.items() <= model.tags.items()
    assert [(metric.key, metric.value) for metric in model.metrics or ()] == [("eval_loss", 0.01)]
    for run in (parent, trial):
        outputs = project.client.get_run(run.info.run_id).outputs
        assert [output.model_id for output in outputs.model_outputs] == [model.model_id]
    folder = Path(model.artifact_location)
    kept = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    assert {"MLmodel", "input_example.json", "data/adapter/adapter_model.safetensors"} <= kept
    assert not [name for name in kept if name.endswith((".pkl", ".py"))]
    required = (folder / "requirements.txt").read_text().splitlines()
    assert {line.partition("==")[0] for line in required} == {"mlflow", "bilora-ray", "torch", "transformers", "peft"}
    assert "+" not in "".join(required)


def test_a_model_is_made_once_and_what_a_kill_left_of_one_is_made_again(
    project: Project, best: TrialRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model,) = closed(project, best)
    assert [other.model_id for other in closed(project, best)] == [model.model_id]
    project.client.delete_logged_model(model.model_id)
    tags = {"bilora_ray.trial": "5", "bilora_ray.adapter": "step-00000030"}
    parent = project.parent().info
    half = project.client.create_logged_model(parent.experiment_id, "fish-0005", parent.run_id, tags)
    # Another process may be making it.
    assert half.model_id in [found.model_id for found in closed(project, best)]
    (again,) = (found for found in closed(project, best) if found.status == "READY")
    project.client.delete_logged_model(again.model_id)
    monkeypatch.setattr("bilora_ray.tracking.models.UPLOAD_S", 0.0)
    (again,) = closed(project, best)
    assert again.model_id not in (model.model_id, half.model_id)
    assert again.status == "READY"


def test_a_study_that_goes_on_makes_no_model(project: Project, best: TrialRecord) -> None:
    project.open().close([best], 5, interrupted=True)
    assert project.client.search_logged_models([project.parent().info.experiment_id]) == []


def test_a_disk_that_is_full_costs_the_model_and_not_the_study(project: Project, best: TrialRecord) -> None:
    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    assert best.adapter is not None
    project.open().close([best], 5, interrupted=False, served=served_as(best.adapter, write=full))
    assert len(project.said) == 1
    assert "no space left on device" in project.said[0]
    assert project.parent().info.status == "FINISHED"
    project.said.clear()
    (model,) = closed(project, best)
    assert model.status == "READY"


def registered(project: Project, best: TrialRecord, **changes: Any) -> Registered:
    assert best.adapter is not None
    wanted = candidate(STUDY, best, served_as(best.adapter))
    info = study_info(project.artifact_root.parent)
    arguments: dict[str, Any] = {"name": project.name, "alias": "champion", "description": "of a test", **changes}
    return register(project.uri, project.name, project.artifact_root, info, wanted, **arguments)


def test_registered_twice_it_is_one_version_and_the_alias_names_it(project: Project, best: TrialRecord) -> None:
    (model,) = closed(project, best)
    first = registered(project, best)
    assert first == Registered(project.name, 1, model.model_id, is_new=True)
    assert registered(project, best, alias="other") == Registered(project.name, 1, model.model_id, is_new=False)
    version = project.client.get_model_version_by_alias(project.name, "champion")
    assert version.source == f"models:/{model.model_id}"
    assert version.description == "of a test"
    assert FACTS.items() <= version.tags.items()
    assert version.tags["bilora_ray.study"] == STUDY
    tags = project.client.get_logged_model(model.model_id).tags
    assert json.loads(tags["mlflow.modelVersions"]) == [{"name": project.name, "version": 1}]
    assert tags["mlflow.note.content"].startswith(
        "LoRA adapter of `builtin:tiny`, whose weights are not copied: [trial 5]("
    )


def test_another_trial_gets_a_model_as_it_is_registered(project: Project, best: TrialRecord, adapter: Path) -> None:
    other = record(2, Status.COMPLETE, steps=3, value=0.02, adapter=adapter)
    project.open().close([best, other], 5, interrupted=False)
    made = registered(project, other)
    assert project.client.get_logged_model(made.model_id).name == "fish-0002"
    assert registered(project, best).version == 2


def test_what_has_no_run_there_is_said_and_nothing_is_made(project: Project, best: TrialRecord) -> None:
    project.open()
    with pytest.raises(UserError, match="trial 5 of study 'fish' has no run there; `bilora-ray tune --resume` sends"):
        registered(project, best)
    assert project.client.search_registered_models(f"name = '{project.name}'") == []


def test_a_model_goes_with_its_study_and_nothing_of_others_does(project: Project, best: TrialRecord) -> None:
    (model,) = closed(project, best)
    deleted = project.client.create_experiment(f"{project.name} of others")
    project.client.delete_experiment(deleted)
    assert remove_runs(project.uri, project.name, project.artifact_root, STUDY, {}) == 2
    assert not Path(model.artifact_location).exists()
    experiment = project.client.get_experiment_by_name(project.name)
    assert experiment is not None
    assert project.client.search_logged_models([experiment.experiment_id]) == []
    assert not [key for key in experiment.tags if key.startswith("mlflow.sharedViewState.")]
    # `mlflow gc` would have taken what others have deleted, and can restore.
    project.client.restore_experiment(deleted)


def test_a_registered_model_outlives_its_study(project: Project, best: TrialRecord) -> None:
    (model,) = closed(project, best)
    registered(project, best)
    assert remove_runs(project.uri, project.name, project.artifact_root, STUDY, {}) == 2
    assert (Path(model.artifact_location) / "MLmodel").is_file()
    assert project.client.get_model_version_by_alias(project.name, "champion").source == f"models:/{model.model_id}"


LOAD = """
import json, sys
import mlflow
model = mlflow.pyfunc.load_model(sys.argv[1])
asked = model.input_example.to_dict("records")
found = model.predict(model.input_example).to_dict("records")
logits = model.get_raw_model()(input_ids=__import__("torch").tensor([[1, 2, 3]])).logits.flatten().tolist()
loaded = [name for name in ("ray", "optuna") if name in sys.modules]
print(json.dumps({"asked": asked, "found": found, "logits": logits, "loaded": loaded}))
"""


@pytest.mark.slow
def test_mlflow_loads_it_in_a_process_of_its_own_and_it_computes_what_peft_does(
    project: Project, tmp_path: Path
) -> None:
    import torch
    from peft import PeftModel
    from tiny_trials import build
    from transformers import AutoModelForCausalLM

    from bilora_ray.release.served import served
    from bilora_ray.training.folder import TrialFolder
    from bilora_ray.training.loop import fit

    tiny = build(tmp_path)
    folder, config = TrialFolder(tmp_path / "trial"), tiny.config("causal-lm", max_steps=2)
    fit(config, folder, lambda metrics: True)
    adapter = folder.best_adapter()
    assert adapter is not None
    done = record(0, Status.COMPLETE, steps=3, value=0.01, adapter=adapter)
    project.open().close([done], 0, interrupted=False, served=served(adapter, {"study": STUDY, "trial": 0}))
    assert project.said == []
    (model,) = project.client.search_logged_models([project.parent().info.experiment_id])
    command = [sys.executable, "-c", LOAD, model.artifact_location]
    told = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    assert set(told["asked"][0]) == {"prompt"}
    assert isinstance(told["found"][0]["prediction"], str)
    assert told["loaded"] == []
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(config.model_name_or_path), adapter)
    with torch.no_grad():
        wanted = plain(input_ids=torch.tensor([[1, 2, 3]])).logits.flatten().tolist()
    assert told["logits"] == pytest.approx(wanted, abs=1e-5)
