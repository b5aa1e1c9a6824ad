"""Every kind of file loads right, or one line says what to add: the cases are in `file_cases.py`."""

from pathlib import Path
from typing import Any

import pytest
from training.file_cases import CASES, Case, Loads

from bilora_ray.config import TrialConfig
from bilora_ray.errors import UserError
from bilora_ray.training.data.sources import first_records, notes, read_file


def config(train_data: str = "d", **settings: Any) -> TrialConfig:
    return TrialConfig(**{"model_name_or_path": "m", "task": "causal-lm", "train_data": train_data, **settings})


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_file_loads_or_one_line_says_what_to_add(case: Case, tmp_path: Path) -> None:
    name = case.make(tmp_path)
    settings = config(name, **case.settings)
    if isinstance(case.outcome, Loads):
        source = read_file(name, settings, "train_data")
        assert [dict(record.columns) for record in source.records] == case.outcome.rows
        assert list(notes(settings)) == [note.format(name) for note in case.outcome.notes]
        assert first_records(settings, 1) == {"train_data": source.records[:1]}
    else:
        with pytest.raises(UserError) as caught:
            read_file(name, settings, "train_data")
        assert str(caught.value) == case.outcome.line.replace("{here}", str(tmp_path)).replace("{}", name).replace(
            "{{", "{"
        ).replace("}}", "}")


def test_no_two_cases_have_one_name() -> None:
    assert len({case.id for case in CASES}) == len(CASES)
