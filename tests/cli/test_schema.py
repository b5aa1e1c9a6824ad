"""The JSON Schema of space files: it is what the code makes now, takes what ships, and refuses what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from jsonschema import Draft7Validator

from bilora_ray.cli.main import main
from bilora_ray.cli.schema import schema
from bilora_ray.config import TrialConfig
from bilora_ray.search.space import ResourceConfig, StudyConfig

SPACES = Path(__file__).resolve().parents[2] / "search_spaces"
VALIDATOR = Draft7Validator(schema())
RIGHT = {"model_name_or_path": "org/model", "task": "causal-lm", "train_data": "org/data"}


def takes(trial: dict[str, Any], study: dict[str, Any] | None = None) -> bool:
    return VALIDATOR.is_valid({"study": {"name": "s", **(study or {})}, "trial": {**RIGHT, **trial}})


def test_what_ships_is_what_the_code_makes_now() -> None:
    printed = CliRunner().invoke(main, ["settings", "--schema"]).output
    assert json.loads(printed) == schema()
    assert (SPACES / "schema.json").read_text(encoding="utf-8") == printed, "write it anew with `make schema`"


def test_it_is_a_schema_and_has_every_key_with_its_description() -> None:
    Draft7Validator.check_schema(schema())
    for section, kind in (("study", StudyConfig), ("trial", TrialConfig), ("resources", ResourceConfig)):
        properties = schema()["properties"][section]["properties"]
        assert properties.keys() == kind.model_fields.keys()
        for key, field in kind.model_fields.items():
            assert properties[key]["description"].startswith(field.description)


@pytest.mark.parametrize("path", sorted(SPACES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_file_names_it_and_is_right_by_it(path: Path) -> None:
    assert path.read_text(encoding="utf-8").startswith("# yaml-language-server: $schema=schema.json\n")
    assert [error.message for error in VALIDATOR.iter_errors(yaml.safe_load(path.read_text(encoding="utf-8")))] == []


@pytest.mark.parametrize(
    "trial",
    [
        {},
        {"rank": 8},
        {"learning_rate": "3e-4"},
        {"rank": {"choice": [4, "8"]}},
        {"learning_rate": {"low": "1e-5", "high": 1e-3, "log": True}},
        {"lora_alpha": "2 * rank", "auxiliary_rank": "rank"},
        {"rho": {"low": 0.1, "high": 1, "when": {"method": "bilora", "rank": [4, 8]}}},
        {"rho": [{"value": 0.1, "when": {"method": "bilora"}}, {"value": "rank / 100", "when": {"method": "lora"}}]},
        {"label_names": [0, 1], "target_modules": {"value": ["q", "v"], "when": {"method": "lora"}}},
        {"eval_steps": {"value": 0.1}, "predict_with_generate": "true", "rank": "8.0", "learning_rate": " 1_0e-3"},
        {"precision": "auto", "rho": {"low": 0.1, "high": 1, "log": True, "prior": {"mean": "0.2", "sigma": "2x"}}},
        {"chat_template_kwargs": {"enable_thinking": False}, "quantization": None},
    ],
)
def test_it_takes_what_a_space_file_may_say(trial: dict[str, Any]) -> None:
    assert takes(trial)


@pytest.mark.parametrize(
    "trial",
    [
        {"rnak": 8},
        {"rank": "eight"},
        {"rank": 0},
        {"rank": 4.5},
        {"rank": True},
        {"rank": [4, 8]},
        {"rank": "8.5"},
        {"rank": {"choice": [8, 8]}},
        {"rank": "-8"},
        {"learning_rate": "-1e-3"},
        {"precision": {"choice": ["auto", "bf16"]}},
        {"target_modules": {"choice": [["q"], "all-linear"]}},
        {"rank": {"value": 8, "when": {"target_modules": [["q"]]}}},
        {"rho": {"low": 0.1, "high": 1, "prior": {"mean": 0.2, "sigma": "x"}}},
        {"lora_alpha": "()"},
        {"predict_with_generate": "maybe"},
        {"eval_steps": {"choice": [0.1]}},
        {"eval_steps": {"value": 0.1, "when": {"method": "lora"}}},
        {"rank": {"choice": []}},
        {"rank": {"choice": [4], "low": 2}},
        {"rank": {"choice": ["four"]}},
        {"rank": {"low": 2}},
        {"rank": {"low": 2, "high": 8, "step": 0}},
        {"rank": {"low": 2, "high": 8, "logarithmic": True}},
        {"rank": {"when": {"method": "lora"}}},
        {"rank": {"value": 4, "when": {"metod": "lora"}}},
        {"rank": {"value": 4, "when": {"method": "sam"}}},
        {"rank": [{"value": 4, "when": {"method": "lora"}}, 8]},
        {"method": "sam"},
        {"method": {"low": 1, "high": 2}},
        {"method": "2 * rank"},
        {"task": {"choice": ["causal-lm", "regression"]}},
        {"max_length": {"low": 16, "high": 64}},
        {"lora_dropout": 1},
        {"model_name_or_path": None},
    ],
)
def test_it_refuses_what_is_wrong(trial: dict[str, Any]) -> None:
    assert not takes(trial)


@pytest.mark.parametrize(
    "study",
    [{"num_trials": 0}, {"sampler": "oracle"}, {"nmae": "s"}, {"points_to_evaluate": [{"rnak": 4}]}, {"name": True}],
)
def test_it_refuses_a_wrong_study(study: dict[str, Any]) -> None:
    assert not takes({}, study)


def test_it_refuses_other_sections_and_a_file_without_a_study() -> None:
    whole = {"study": {"name": "s"}, "trial": RIGHT}
    assert VALIDATOR.is_valid(whole)
    for wrong in ({**whole, "trail": {}}, {"trial": RIGHT}, {**whole, "resources": {"cpus": 1}}, {}, []):
        assert not VALIDATOR.is_valid(wrong)


@pytest.mark.parametrize("word", ["rho", "--json"])
def test_the_schema_is_of_all_keys(word: str) -> None:
    result = CliRunner().invoke(main, ["settings", "--schema", word])
    assert (result.exit_code, "--schema: is of all keys" in result.output) == (2, True)
