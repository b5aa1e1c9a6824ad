"""Comparison files: what each entry is tuned over, and one line for each mistake."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from bilora_ray.config import TEST_SETTINGS
from bilora_ray.errors import UserError
from bilora_ray.search.comparing.file import Comparison, load_comparison, tuned_without_test
from bilora_ray.search.space.order import check_settings
from bilora_ray.search.space.shipped import comparison_file, comparisons

FILE = """
comparison: {name: c, tune: 4, seeds: 5, baseline: lora}
trial:
  model_name_or_path: org/model
  task: causal-lm
  train_data: org/data
  validation_data: org/validation
  test_data: org/test
  learning_rate: {low: 1.0e-4, high: 1.0e-2, log: true}
  rho: {low: 0.01, high: 0.1, log: true}
methods:
  bilora: {rho: {low: 0.005, high: 1.0, log: true}}
  lora: {}
  wide: {method: lora, rank: 32}
  halved: {method: bilora, rank: {choice: [4, 8]}, auxiliary_rank: rank / 2}
"""


def read(folder: Path, *overrides: str, **replaced: str) -> Comparison:
    text = FILE
    for old, new in replaced.items():
        assert old in text
        text = text.replace(old, new)
    file = folder / "c.yaml"
    file.write_text(text, encoding="utf-8")
    return load_comparison(file, overrides)


def refused(folder: Path, *overrides: str, old: str = "", new: str = "") -> str:
    with pytest.raises(UserError) as error:
        read(folder, *overrides, **({old: new} if old else {}))
    line = str(error.value)
    assert "\n" not in line
    return line.replace(f"{folder / 'c.yaml'}: ", "FILE: ")


def test_each_entry_has_its_own_space_and_the_baseline_is_first(tmp_path: Path) -> None:
    found = read(tmp_path)
    assert list(found.spaces) == ["lora", "bilora", "wide", "halved"]
    assert found.baseline == "lora"
    names = {entry: space.study.name for entry, space in found.spaces.items()}
    assert names == {entry: f"c-tune-{entry}" for entry in found.spaces}
    assert found.runs == "c-runs"
    searched = {entry: set(space.distributions) for entry, space in found.spaces.items()}
    assert searched["lora"] == searched["wide"] == {"learning_rate"}  # which reads no radius
    assert searched["bilora"] == {"learning_rate", "rho"}
    assert searched["halved"] == {"learning_rate", "rho", "rank"}
    assert found.spaces["bilora"].distributions["rho"].ends() == (0.005, 1.0)  # its own, before that of all
    assert found.spaces["halved"].distributions["rho"].ends() == (0.01, 0.1)
    for space in found.spaces.values():
        assert (space.study.num_trials, space.study.scheduler, space.study.sampler) == (4, "none", "qmc")
        check_settings(space)


def test_the_test_rows_are_known_and_no_trial_has_them(tmp_path: Path) -> None:
    found = read(tmp_path)
    assert all(space.first_config().test_data == "org/test" for space in found.spaces.values())
    without = [tuned_without_test(space).first_config() for space in found.spaces.values()]
    assert all(getattr(config, key) is None for config in without for key in TEST_SETTINGS)


def test_overrides_are_of_all_or_of_one_entry(tmp_path: Path) -> None:
    found = read(tmp_path, "rank=4", "methods.bilora.rho=0.5", "comparison.seeds=7", "resources.cpus_per_worker=2")
    assert found.spaces["lora"].first_config().rank == 4
    assert found.spaces["wide"].first_config().rank == 32
    assert found.spaces["bilora"].first_config().rho == 0.5
    assert found.config.seeds == 7
    assert all(space.resources.cpus_per_worker == 2 for space in found.spaces.values())


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("methods.bilora.rhoo=1", "FILE: methods.bilora: unknown key 'rhoo'; did you mean 'rho'?"),
        ("methods.bilora.rho=-1", "--set methods.bilora: rho: should be greater than 0, got -1"),
        ("methods.lora.rho=1", "FILE: methods.lora.rho: method lora does not read it"),
        ("methods.lroa.rank=1", "unknown section 'methods.lroa'; did you mean 'lora'?"),
        ("method.lora.rank=1", "unknown section 'method.lora'; did you mean 'methods'?"),
        (
            "methods.lroa=1",
            "--set methods.lroa=1: write methods.ENTRY.KEY=VALUE, of the entries bilora, lora, wide, halved",
        ),
        ("tune=2", "--set tune=2: write comparison.tune"),
        ("comparison.tune=0", "--set comparison: tune: should be greater than or equal to 1, got 0"),
        ("comparison.seeds=1", "seeds: should be greater than or equal to 2, got 1"),
        ("comparison.seed_count=1", "unknown key 'seed_count'"),
        ("comparison.budget=hours", "budget: should be 'steps' or 'seconds', got 'hours'"),
        ("comparison.baseline=lorra", "comparison.baseline: 'lorra' is no entry of methods; did you mean 'lora'?"),
        ("comparison.name=a b", "name: must be up to 100 letters"),
        ("learning_rate=1e-3", "FILE: methods.lora.learning_rate: has no range"),
        ("seed={choice: [1, 2]}", "FILE: trial.seed: must have one value"),
        ("max_steps={choice: [1, 2]}", "FILE: trial.max_steps: must have one value"),
        ("per_device_train_batch_size={choice: [1, 2]}", "needs trial.max_steps"),
        ("methods.lora.gradient_accumulation_steps=2", "needs trial.max_steps"),
        ("methods.lora.early_stopping_patience=2", "methods.lora.early_stopping_patience: is for all entries alike"),
        ("early_stopping_patience={choice: [1, 2]}", "FILE: trial.early_stopping_patience: must have one value"),
        ("metric=sharpness", "FILE: trial.metric: sharpness is of validation rows, which choose"),
        ("test_data=null", "FILE: trial: test_data is missing"),
        ("methods.bilora.method=bilra", "FILE: methods.bilora.method: 'bilra' is no method; did you mean 'bilora'?"),
        ("methods.bilora.method={choice: [lora, bilora]}", "must be one method; of several make an entry each"),
        ("methods.bilora.max_steps=4", "FILE: methods.bilora.max_steps: is for all entries alike"),
        ("methods.bilora.eval_steps=3", "FILE: methods.bilora.eval_steps: is for all entries alike"),
        ("methods.bilora.train_data=org/other", "FILE: methods.bilora.train_data: is for all entries alike"),
        ("method=lora", "FILE: trial.method: each entry of methods has its own"),
        ("variant=x", "FILE: trial.variant: the entries of methods name it"),
        ("bar_alpha=0.1", "trial.bar_alpha: no method that is compared reads it"),
        ("rank=-2", "--set trial: rank: should be greater than or equal to 1, got -2"),
        ("rho=0.3 # much", "a text with # needs quotes"),
    ],
)
def test_a_wrong_override_is_one_line(tmp_path: Path, override: str, line: str) -> None:
    assert line in refused(tmp_path, override)


def test_a_batch_of_an_entry_needs_the_steps_that_are_asked_for_in_the_end(tmp_path: Path) -> None:
    batch = "methods.bilora.per_device_train_batch_size=4"
    found = read(tmp_path, batch, "max_steps=60")
    assert found.spaces["bilora"].first_config().per_device_train_batch_size == 4
    line = refused(tmp_path, batch, "max_steps=null", old="trial:", new="trial:\n  max_steps: 60")
    assert line.startswith("FILE: methods.bilora.per_device_train_batch_size: needs trial.max_steps")


@pytest.mark.parametrize("key", ["precision", "quantization"])
def test_other_numbers_than_an_entry_s_are_noted(key: str, tmp_path: Path) -> None:
    value = {"precision": "bf16", "quantization": "nf4"}[key]
    line = f"{key}: entries differ in it, so that a difference is one of that too, as are step time and memory"
    assert line in read(tmp_path, f"methods.bilora.{key}={value}").notes
    assert not any(note.startswith(key) for note in read(tmp_path, f"{key}={value}").notes)


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("comparison: {", "study: {", "FILE: unknown section 'study'; `bilora-ray tune` takes a space file"),
        ("methods:", "mehtods:", "FILE: unknown section 'mehtods'; did you mean 'methods'?"),
        ("  lora: {}\n", "", "comparison.baseline: 'lora' is no entry of methods"),
        ("  lora: {}", "  lora: 3", "FILE: methods.lora: must hold `key: value` lines, got 3"),
        (
            "  bilora: {rho",
            "  bilroa: {rho",
            "'bilroa' is no method, and the entry says no other; did you mean",
        ),
        ("  wide:", "  lora:", "'lora' is given twice"),
        ("  wide:", "  a/b:", "FILE: methods: 'a/b' must be letters"),
        ("name: c", f"name: {'c' * 96}", "name: is too long for the study of its runs, NAME-runs"),
        ("name: c", f"name: {'c' * 93}", "methods.bilora: is too long for the study of its tuning"),
        ("{low: 0.005, high: 1.0", "{low: 0.005, high: 0.001", "FILE: methods.bilora.rho: low must be below high"),
        ("rank: 32", "rank: 0", "FILE: methods.wide: rank: should be greater than or equal to 1, got 0"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path: Path, old: str, new: str, line: str) -> None:
    assert line in refused(tmp_path, old=old, new=new)


def test_a_file_of_one_entry_compares_nothing(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(FILE.partition("methods:")[0] + "methods: {lora: {}}\n", encoding="utf-8")
    with pytest.raises(UserError, match="methods: has 1 entries, and a comparison is of two or more"):
        load_comparison(file)


def test_what_is_set_for_all_where_all_have_their_own_is_refused() -> None:
    with pytest.raises(UserError, match=r"lora-sam, flat-lora, bilora, .* have their own; write methods.lora-sam.rho"):
        load_comparison(comparison_file("quickstart"), ["rho=0.3"])


def test_validation_rows_are_no_test() -> None:
    with pytest.raises(UserError, match=r"trial.test_data: is validation_data, and a test is"):
        load_comparison(comparison_file("quickstart"), ["test_data=builtin:quickstart/validation.jsonl"])


@pytest.mark.parametrize(
    ("overrides", "noted"),
    [
        (["methods.bilora.target_modules=[q_proj]"], True),
        (["target_modules=[q_proj, v_proj]", "methods.bilora.target_modules=[v_proj, q_proj]"], False),
        (["methods.bilora.target_modules=[q_proj]", "comparison.sharpness_radius=null"], False),
        (["target_modules=[q_proj]"], False),
        (["target_modules={choice: [all-linear, q_proj]}"], True),
    ],
)
def test_sharpness_in_other_weights_is_noted(overrides: list[str], noted: bool, tmp_path: Path) -> None:
    line = "target_modules: entries differ in them, so the sharpness of each is in other weights: do not compare it"
    assert (line in read(tmp_path, *overrides).notes) is noted


def test_few_seeds_are_noted(tmp_path: Path) -> None:
    assert any("of 3 little can be told" in note for note in read(tmp_path, "comparison.seeds=3").notes)
    assert read(tmp_path).notes == ()


@pytest.mark.parametrize("name", comparisons())
def test_what_ships_is_right(name: str, tmp_path: Path) -> None:
    file = shutil.copy(comparison_file(name), tmp_path)
    for data in ("train", "validation", "test", "wiki"):  # those that a script writes beside a file
        (tmp_path / f"{data}.jsonl").touch()
    found = load_comparison(Path(file))
    assert found.baseline == "lora"
    assert {"lora", "nbar", "flat-lora", "bilora"} <= found.spaces.keys()
    assert found.notes == ()


def test_a_word_is_the_name_of_one_that_ships() -> None:
    assert comparison_file("quickstart") == comparisons()["quickstart"]
    assert comparison_file("quickstart.yaml") == Path("quickstart.yaml")
    with pytest.raises(UserError, match=r"no comparison 'quikstart' ships with bilora-ray.*did you mean 'quickstart'"):
        comparison_file("quikstart")
