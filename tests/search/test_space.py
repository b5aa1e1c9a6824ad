"""A space file: what is read from it, what `--set` changes, and one line for whatever is wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from bilora_ray.errors import UserError
from bilora_ray.facts import METHOD_NAMES
from bilora_ray.search.space import Choice, Distribution, Range, Space
from bilora_ray.search.space_file import check_draw, load_space, parse_override

REPOSITORY = Path(__file__).resolve().parents[2]
SHIPPED = sorted((REPOSITORY / "search_spaces").glob("*.yaml"))

Load = Callable[..., Space]
Refuse = Callable[..., str]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the space file goes: beside a model and data, and not where the process is."""
    folder = tmp_path / "spaces"
    (folder / "model").mkdir(parents=True)
    for name in ("a.jsonl", "b.jsonl"):
        (folder / name).write_text("{}\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return folder / "space.yaml"


@pytest.fixture
def load(file: Path) -> Load:
    """Load a space file that is right but for what is given."""

    def load(
        trial: dict[str, Any] | None = None, study: dict[str, Any] | None = None, overrides: tuple[str, ...] = ()
    ) -> Space:
        right = {"model_name_or_path": "model", "task": "causal-lm", "train_data": "a.jsonl"}
        content = {"study": {"name": "s", **(study or {})}, "trial": {**right, **(trial or {})}}
        file.write_text(yaml.safe_dump(content, sort_keys=False))
        return load_space(file, overrides)

    return load


@pytest.fixture
def refused(load: Load, file: Path) -> Refuse:
    """As `load`, for a space that is wrong: the error's text after the file's name."""

    def refused(*args: Any, **kwargs: Any) -> str:
        with pytest.raises(UserError) as caught:
            load(*args, **kwargs)
        assert "\n" not in str(caught.value)
        return str(caught.value).removeprefix(str(file))

    return refused


@pytest.fixture
def refused_text(file: Path) -> Callable[[str | bytes], str]:
    """The error on a file with this content, after the file's name."""

    def refused_text(content: str | bytes) -> str:
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        with pytest.raises(UserError) as caught:
            load_space(file)
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith(str(file))
        return str(caught.value).removeprefix(str(file))

    return refused_text


# The files that ship


METHOD_WORDS = f"{', '.join(map(repr, METHOD_NAMES[:-1]))} or {METHOD_NAMES[-1]!r}"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_space_is_right_and_can_be_searched_from_its_points(path: Path) -> None:
    space = load_space(path)
    assert space.distributions
    for point in ({}, *space.points_to_evaluate):
        config = space.trial_config(space.first(point))
        assert {key: getattr(config, key) for key in point} == point


def test_the_repository_ships_spaces() -> None:
    assert SHIPPED


def test_shipped_spaces_have_names_of_their_own() -> None:
    names = [load_space(path).study.name for path in SHIPPED]
    assert len(set(names)) == len(names)


# What is read


def test_a_space_is_settings_distributions_and_where_it_runs(file: Path) -> None:
    file.write_text(
        "study: {name: s, num_trials: 5, sampler: random, scheduler: none, project: team}\n"
        "trial:\n"
        "  model_name_or_path: model\n"
        "  train_data: a.jsonl\n"
        "  task: causal-lm\n"
        "  learning_rate: {low: 1e-5, high: 1e-3, log: true}\n"
        "  rank: {low: 2, high: 16, step: 2}\n"
        "  method: {choice: [lora, bilora]}\n"
        "  max_grad_norm: {choice: [null, 1]}\n"
        "resources: {cpus_per_worker: 2, gpus_per_worker: 0.5}\n"
    )
    space = load_space(file)
    assert (space.study.name, space.study.num_trials, space.study.project) == ("s", 5, "team")
    assert (space.study.sampler, space.study.scheduler) == ("random", "none")
    assert (space.resources.cpus_per_worker, space.resources.gpus_per_worker) == (2, 0.5)
    assert space.fixed == {
        "model_name_or_path": str(file.parent / "model"),
        "train_data": str(file.parent / "a.jsonl"),
        "task": "causal-lm",
    }
    # Which settings are asked for depends on the method, so it is drawn first.
    assert list(space.distributions.items()) == [
        ("method", Choice(choice=("lora", "bilora"))),
        ("learning_rate", Range(low=1e-5, high=1e-3, log=True)),
        ("rank", Range(low=2, high=16, step=2)),
        ("max_grad_norm", Choice(choice=(None, 1.0))),
    ]


def test_a_space_needs_no_distribution_and_no_resources(load: Load) -> None:
    space = load()
    assert space.distributions == {}
    assert space.points_to_evaluate == ()
    assert (space.resources.cpus_per_worker, space.resources.gpus_per_worker) == (1, 0)
    assert space.trial_config({}).method == "bilora"


def test_numbers_that_yaml_reads_as_text_become_numbers(file: Path) -> None:
    file.write_text(
        "study:\n"
        "  name: s\n"
        "  points_to_evaluate: [{learning_rate: 3e-4, rho: 5e-2, weight_decay: 1e-2}]\n"
        "trial:\n"
        "  {model_name_or_path: model, task: causal-lm, train_data: a.jsonl, auxiliary_learning_rate: 2e-4,\n"
        "  learning_rate: {choice: [1e-4, 3e-4]}, rho: {low: 1e-3, high: 1e-1}, \n"
        "  weight_decay: {low: 0, high: 2e-2, step: 1e-2}}\n"
    )
    assert yaml.safe_load(file.read_text())["trial"]["learning_rate"] == {"choice": ["1e-4", "3e-4"]}
    space = load_space(file)
    assert space.distributions == {
        "learning_rate": Choice(choice=(1e-4, 3e-4)),
        "rho": Range(low=1e-3, high=1e-1),
        "weight_decay": Range(low=0, high=2e-2, step=1e-2),
    }
    assert space.points_to_evaluate == ({"learning_rate": 3e-4, "rho": 5e-2, "weight_decay": 1e-2},)
    assert space.trial_config(space.points_to_evaluate[0]).auxiliary_learning_rate == 2e-4


def test_a_choice_takes_the_type_of_its_setting(load: Load) -> None:
    trial = {"rank": {"choice": ["4", 8.0]}, "lora_alpha": {"choice": [16, "32"]}, "target_modules": {"choice": ["v"]}}
    distributions = load(trial).distributions
    values = [choice.choice for choice in distributions.values() if isinstance(choice, Choice)]
    assert [[(value, type(value)) for value in choice] for choice in values] == [
        [(4, int), (8, int)],
        [(16.0, float), (32.0, float)],
        [("v", str)],
    ]


def test_a_trials_settings_are_the_fixed_and_the_sampled_ones(load: Load) -> None:
    space = load({"rank": {"choice": [4, 8]}, "learning_rate": "1e-3"})
    config = space.trial_config({"rank": 4})
    assert (config.rank, config.learning_rate) == (4, 1e-3)


def test_sampled_settings_that_do_not_go_together_are_refused_with_the_file(load: Load, file: Path) -> None:
    space = load({"rank": {"choice": [4, 8]}})
    with pytest.raises(UserError) as caught:
        space.trial_config({"rank": 0})
    assert str(caught.value) == f"{file}: trial: rank: should be greater than or equal to 1, got 0"


# Settings that only some methods read


def test_a_setting_of_bilora_is_not_asked_of_a_lora_trial(load: Load) -> None:
    ranges = {"rho": {"low": 0.01, "high": 0.1}, "rank": {"choice": [4, 8]}}
    space = load({**ranges, "method": {"choice": ["lora", "bilora"]}})
    assert space.asked("rho", {"method": "bilora"})
    assert not space.asked("rho", {"method": "lora"})
    assert space.asked("rank", {"method": "lora"})


@pytest.mark.parametrize("fixed", [{"method": "bilora"}, {}])
def test_what_the_method_of_all_trials_reads_is_asked(load: Load, fixed: dict[str, Any]) -> None:
    assert load({"auxiliary_rank": {"choice": [4, 8]}, **fixed}).asked("auxiliary_rank", {})


# Overrides


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("study.name=other", "study", "name", "other"),
        ("study.num_trials=7", "study", "num_trials", 7),
        ("study.grace_period=null", "study", "grace_period", None),
        ("resources.gpus_per_worker=0.25", "resources", "gpus_per_worker", 0.25),
        ("resources.cpus_per_worker=3", "resources", "cpus_per_worker", 3.0),
    ],
)
def test_an_override_reaches_every_section(load: Load, override: str, section: str, key: str, value: Any) -> None:
    study = {"num_trials": 3, "grace_period": 10}
    assert getattr(getattr(load(study=study, overrides=(override,)), section), key) == value


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("rank=16", "rank", 16),
        ("trial.rank=16", "rank", 16),
        ("rho=3e-2", "rho", 0.03),
        ("max_grad_norm=null", "max_grad_norm", None),
        ("gradient_checkpointing=true", "gradient_checkpointing", True),
        ("target_modules=[q_proj, v_proj]", "target_modules", ("q_proj", "v_proj")),
        ("prompt_template='{question}'", "prompt_template", "{question}"),
        ("prompt_template=Q = {prompt}", "prompt_template", "Q = {prompt}"),
        ("model_revision=", "model_revision", None),
    ],
)
def test_an_override_is_yaml(load: Load, override: str, key: str, value: Any) -> None:
    assert getattr(load(overrides=(override,)).trial_config({}), key) == value


def test_the_last_override_of_a_key_counts(load: Load) -> None:
    assert load(overrides=("rank=2", "rank=4")).fixed["rank"] == 4


def test_an_override_can_be_a_distribution_and_can_end_one(load: Load) -> None:
    space = load(
        {"rank": {"choice": [4, 8]}, "rho": 0.1},
        overrides=("rank=8", "rho={low: 1e-2, high: 0.5, log: true}"),
    )
    assert space.distributions == {"rho": Range(low=0.01, high=0.5, log=True)}
    assert space.fixed["rank"] == 8


def test_an_override_replaces_a_path_of_the_file_that_does_not_exist(load: Load, refused: Refuse, file: Path) -> None:
    assert refused({"train_data": "gone.jsonl"}) == f": trial.train_data: no such file: {file.parent / 'gone.jsonl'}"
    here = Path.cwd() / "here.jsonl"
    here.write_text("{}\n")
    # A path of the command line starts where the command is given.
    space = load({"train_data": "gone.jsonl"}, overrides=("train_data=here.jsonl",))
    assert space.fixed["train_data"] == str(here)


def test_overrides_alone_make_a_space(file: Path) -> None:
    space = load_space(
        None, ("study.name=s", f"model_name_or_path={file.parent}/model", "task=causal-lm", "train_data=owner/data")
    )
    assert space.trial_config({}).train_data == "owner/data"


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        ((), "--set: study: 'name' is missing"),
        (("study.name=s",), "--set: trial: 'model_name_or_path' is missing"),
        (("study.name=s", "rnak=8"), "--set trial: unknown key 'rnak'; did you mean 'rank'?"),
    ],
)
def test_overrides_alone_must_say_all(overrides: tuple[str, ...], problem: str) -> None:
    with pytest.raises(UserError) as caught:
        load_space(None, overrides)
    assert str(caught.value) == problem


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("rank", "--set rank: must be key=value"),
        ("=8", "--set =8: must be key=value"),
        ("stduy.seed=1", "--set stduy.seed=1: unknown section 'stduy'; did you mean 'study'?"),
        ("rank.x=1", "--set rank.x=1: unknown section 'rank'; allowed: resources, study, trial"),
        ("rank=[4", "--set rank=[4: the value is not valid YAML"),
        ("seed=2024-02-30", "--set seed=2024-02-30: the value is not valid YAML"),
        ("rnak=8", "--set trial: unknown key 'rnak'; did you mean 'rank'?"),
        (
            "rank=eight",
            "--set trial: rank: should be a valid integer, unable to parse string as an integer, got 'eight'",
        ),
        ("study.seed=true", "--set study: seed: must be a number, not true or false, got True"),
        ("study.num_trial=3", "--set study: unknown key 'num_trial'; did you mean 'num_trials'?"),
        (
            "resources.gpus_per_worker=1.5",
            "--set resources: gpus_per_worker: must be a part of one GPU, below 1, or whole GPUs, got 1.5",
        ),
        (
            "resources.gpu=1",
            "--set resources: unknown key 'gpu'; "
            "allowed: cpus_per_worker, gpus_per_worker, min_workers, parallelism, workers",
        ),
        (
            "prompt_template={question}",
            '--set trial.prompt_template: a text that starts with a brace needs quotes: "{question}"',
        ),
    ],
)
def test_a_wrong_override_is_refused(refused: Refuse, override: str, problem: str) -> None:
    assert refused(overrides=(override,)) == problem


def test_workers_of_one_trial_share_no_gpu(refused: Refuse) -> None:
    problem = refused(overrides=("resources.workers=2", "resources.gpus_per_worker=0.5"))
    assert problem.endswith("gpus_per_worker: workers of one trial cannot share a GPU; give each 1")


def test_a_missing_path_of_an_override_is_told_as_one(refused: Refuse) -> None:
    assert refused(overrides=("train_data=./gone.jsonl",)) == (
        f"--set trial.train_data: no such file: {Path.cwd() / 'gone.jsonl'}"
    )


def test_a_file_may_merge_mappings(tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(
        "study: {name: s}\n"
        "trial:\n"
        "  <<: &base {model_name_or_path: org/model, task: causal-lm, train_data: org/data, rank: 4}\n"
        "  rank: 8\n"
    )
    assert load_space(tmp_path / "space.yaml").fixed["rank"] == 8


@pytest.mark.parametrize("value", [r"#### (-?\d+)", "Q #1: {q}", "# x"])
def test_an_override_loses_nothing_to_a_comment(refused: Refuse, value: str) -> None:
    override = f"prompt_template={value}"
    quoted = f"prompt_template={json.dumps(value)}"
    assert refused(overrides=(override,)) == f"--set {override}: a text with # needs quotes: {quoted}"
    assert parse_override(quoted) == ("trial", "prompt_template", value)
    assert parse_override("prompt_template=a#b") == ("trial", "prompt_template", "a#b")
    assert parse_override("validation_data=") == ("trial", "validation_data", None)


def test_a_key_that_an_override_gives_twice_is_refused(refused: Refuse) -> None:
    override = "rank={choice: [4], choice: [8]}"
    assert refused(overrides=(override,)) == f"--set {override}: the value is not valid YAML"


# Points to evaluate first

RANGES: dict[str, Any] = {"rank": {"choice": [4, 8]}, "rho": {"low": 0.01, "high": 0.1}}
STEPS: dict[str, Any] = {
    "rank": {"low": 4, "high": 12, "step": 4},
    "lora_dropout": {"low": 0, "high": 0.3, "step": 0.1},
}


@pytest.mark.parametrize("point", [{"rank": 4, "rho": 0.01}, {"rank": 8, "rho": 0.1}, {"rho": 0.05}])
def test_a_point_on_the_border_or_for_some_settings_is_inside(load: Load, point: dict[str, Any]) -> None:
    assert load(RANGES, {"points_to_evaluate": [point]}).points_to_evaluate == (point,)


@pytest.mark.parametrize("point", [{"rank": 12, "lora_dropout": 0.3}, {"rank": 4, "lora_dropout": 0.2}])
def test_a_point_on_a_step_is_inside(load: Load, point: dict[str, Any]) -> None:
    assert load(STEPS, {"points_to_evaluate": [point]}).points_to_evaluate == (point,)


@pytest.mark.parametrize(
    ("trial", "point", "problem"),
    [
        (RANGES, {"rank": 16}, ".rank: 16 is outside its distribution"),
        (RANGES, {"rho": 0.2}, ".rho: 0.2 is outside its distribution"),
        (RANGES, {"rho": "9e-3"}, ".rho: 0.009 is outside its distribution"),
        (RANGES, {"rank": 4.5}, ".rank: should be a valid integer, got a number with a fractional part, got 4.5"),
        (RANGES, {"rho": float("nan")}, ".rho: should be a finite number, got 'nan'"),
        (RANGES, {"rho": True}, ".rho: must be a number, not true or false"),
        (RANGES, {"rnak": 4}, ": 'rnak' has no distribution; did you mean 'rank'?"),
        (RANGES, {"learning_rate": 1e-3}, ": 'learning_rate' has no distribution; allowed: rank, rho"),
        (STEPS, {"rank": 6}, ".rank: 6 is outside its distribution"),
        (STEPS, {"lora_dropout": 0.15}, ".lora_dropout: 0.15 is outside its distribution"),
    ],
)
def test_a_point_outside_is_refused(
    refused: Refuse, trial: dict[str, Any], point: dict[str, Any], problem: str
) -> None:
    assert refused(trial, {"points_to_evaluate": [{}, point]}) == f": study.points_to_evaluate[1]{problem}"


def test_a_point_is_one_value_a_setting(refused: Refuse) -> None:
    assert refused(RANGES, {"points_to_evaluate": [{"rank": [4]}]}) == (
        ": study: points_to_evaluate.0.rank: must be one number, text, true, false or null, got [4]"
    )
    assert refused(RANGES, {"points_to_evaluate": {"rank": 4}}) == (
        ": study: points_to_evaluate: should be a valid tuple, got {'rank': 4}"
    )


def test_a_path_in_a_point_is_the_one_in_the_choice(load: Load, file: Path) -> None:
    choice = {"train_data": {"choice": ["a.jsonl", "b.jsonl"]}, "validation_data": "a.jsonl"}
    space = load(choice, {"points_to_evaluate": [{"train_data": "b.jsonl"}]})
    assert space.points_to_evaluate == ({"train_data": str(file.parent / "b.jsonl")},)


@pytest.mark.parametrize(
    ("overrides", "left"),
    [
        (("rho=0.02",), ({"rank": 4}, {"rank": 8})),
        (("rank={choice: [8, 16]}",), ({"rho": 0.05}, {"rank": 8, "rho": 0.1})),
        (("rho={low: 0.001, high: 0.05}",), ({"rank": 4, "rho": 0.05}, {"rank": 8})),
        (("rank=16", "rho=0.02"), ()),
    ],
)
def test_a_point_gives_way_to_an_override(load: Load, overrides: tuple[str, ...], left: tuple[Any, ...]) -> None:
    trial = {**RANGES, "learning_rate": {"low": 1e-4, "high": 1e-3}}
    points = [{"rank": 4, "rho": 0.05}, {"rank": 8, "rho": 0.1}]
    assert load(trial, {"points_to_evaluate": points}, overrides).points_to_evaluate == left


def test_a_point_that_is_itself_an_override_gives_way_to_nothing(refused: Refuse) -> None:
    assert refused(RANGES, overrides=("rank=8", "study.points_to_evaluate=[{rank: 8}]")) == (
        "--set: study.points_to_evaluate[0]: 'rank' has no distribution; allowed: rho"
    )


# Distributions


@pytest.mark.parametrize(
    ("setting", "distribution", "problem"),
    [
        ("rho", {"low": 0.1, "high": 0.1}, ".rho: low must be below high, got low 0.1 and high 0.1"),
        ("rho", {"low": 0.5, "high": 0.1}, ".rho: low must be below high, got low 0.5 and high 0.1"),
        (
            "weight_decay",
            {"low": 0, "high": 0.1, "log": True},
            ".weight_decay: a log range must start above 0, got low 0",
        ),
        ("rho", {"low": 0.1, "high": 0.5, "log": True, "step": 0.1}, ".rho: log and step exclude each other"),
        ("rho", {"low": 0.1, "high": 0.5, "step": 0}, ".rho: step: should be greater than 0, got 0"),
        (
            "rank",
            {"low": 2, "high": 9, "step": 4},
            ".rank: high must be a whole number of steps above low, got low 2, high 9 and step 4",
        ),
        (
            "rho",
            {"low": 0.1, "high": 0.2, "step": 1},
            ".rho: high must be a whole number of steps above low, got low 0.1, high 0.2 and step 1",
        ),
        ("rank", {"low": 2, "high": 8, "step": 0.5}, ".rank: step must be a whole number, got 0.5"),
        ("rho", {"low": 0.1}, ".rho: 'high' is missing"),
        ("rho", {"high": 0.1}, ".rho: 'low' is missing"),
        ("rho", {"low": 0.1, "high": 1, "steps": 0.1}, ".rho: unknown key 'steps'; did you mean 'step'?"),
        (
            "rho",
            {"low": 0.1, "high": 1, "log": 3},
            ".rho: log: should be a valid boolean, unable to interpret input, got 3",
        ),
        ("rho", {"low": float("nan"), "high": 1}, ".rho: low: should be a finite number, got nan"),
        ("rho", {"low": 0.1, "high": float("inf")}, ".rho: high: should be a finite number, got inf"),
        ("rho", {"low": 0.1, "high": True}, ".rho: high: must be a number, not true or false, got True"),
        (
            "rho",
            {"low": "tiny", "high": 1},
            ".rho: low: should be a valid number, unable to parse string as a number, got 'tiny'",
        ),
        ("rank", {"choice": []}, ".rank: choice: should have at least 1 item after validation, not 0, got []"),
        ("rank", {"choice": 4}, ".rank: choice: should be a valid tuple, got 4"),
        ("rank", {"choice": [4], "low": 2}, ".rank: unknown key 'low'; allowed: choice, when"),
        ("rank", {"choice": [4], 2: 3}, ".rank: 2: Keys should be strings, got 2"),
        (
            "target_modules",
            {"choice": ["all-linear", ["q_proj"]]},
            ".target_modules: choice.1: must be one number, text, true, false or null, got ['q_proj']",
        ),
        ("method", {"choice": ["lora", "sam"]}, f".method: should be {METHOD_WORDS}, got 'sam'"),
        (
            "rank",
            {"log": True},
            ".rank: a distribution is {choice: [...]} or {low: ..., high: ...}, got {'log': True}",
        ),
        (
            "train_data",
            {"low": 1, "high": 2},
            ".train_data: takes no numbers, so its distribution is {choice: [...]}, got {'low': 1, 'high': 2}",
        ),
        (
            "gradient_checkpointing",
            {"low": 0, "high": 1},
            ".gradient_checkpointing: takes no numbers, so its distribution is {choice: [...]}, "
            "got {'low': 0, 'high': 1}",
        ),
        ("rnak", {"choice": [4]}, ": unknown key 'rnak'; did you mean 'rank'?"),
    ],
)
def test_a_wrong_distribution_is_refused(
    refused: Refuse, setting: str, distribution: dict[Any, Any], problem: str
) -> None:
    assert refused({setting: distribution}) == f": trial{problem}"


@pytest.mark.parametrize(
    ("setting", "distribution", "problem"),
    [
        ("lora_dropout", {"low": -0.1, "high": 0.5}, "should be greater than or equal to 0, got -0.1"),
        ("lora_dropout", {"low": 0, "high": 1}, "should be less than 1, got 1.0"),
        ("rho", {"low": 0, "high": 0.5}, "should be greater than 0, got 0.0"),
        ("rank", {"low": 0, "high": 8}, "should be greater than or equal to 1, got 0.0"),
        ("rank", {"low": 1.5, "high": 8}, "should be a valid integer, got a number with a fractional part, got 1.5"),
        ("rank", {"low": 1, "high": 8.5}, "should be a valid integer, got a number with a fractional part, got 8.5"),
        ("seed", {"low": 0, "high": 2**32}, "should be less than 4294967296, got 4294967296.0"),
        ("prompt_template", {"choice": ["{a}", "{"]}, "Single '{' encountered in format string, got '{'"),
    ],
)
def test_both_ends_of_a_range_and_every_choice_are_within_the_settings_limits(
    refused: Refuse, setting: str, distribution: dict[str, Any], problem: str
) -> None:
    assert refused({setting: distribution}) == f": trial: {setting}: {problem}"


@pytest.mark.parametrize("value", [0, "x", None, 1.5])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_wrong_value_is_found_anywhere_in_a_choice(refused: Refuse, value: Any, index: int) -> None:
    choice = [4, 8]
    choice.insert(index, value)
    problem = refused({"rank": {"choice": choice}})
    assert problem.startswith(": trial.rank: should be ")
    assert problem.endswith(f", got {value!r}")


@pytest.mark.parametrize(
    ("distribution", "inside", "outside"),
    [
        (Range(low=1, high=2), [1, 1.5, 2], [0.999, 2.001]),
        (Range(low=1, high=100, log=True), [1, 7.3, 100], [0.5, 101]),
        (Range(low=0, high=0.3, step=0.1), [0, 0.1, 0.2, 0.1 + 0.1, 0.3], [0.05, 0.31, -0.1]),
    ],
)
def test_a_range_holds_what_can_be_drawn_from_it(
    distribution: Range, inside: list[float], outside: list[float]
) -> None:
    assert [distribution.holds(value) for value in inside] == [True] * len(inside)
    assert [distribution.holds(value) for value in outside] == [False] * len(outside)


@pytest.mark.parametrize(
    ("distribution", "ends"),
    [(Choice(choice=("a", None, 3)), ("a", None, 3)), (Range(low=1, high=8, log=True), (1, 8))],
)
def test_the_ends_are_the_values_to_check(distribution: Distribution, ends: tuple[Any, ...]) -> None:
    assert tuple(distribution.ends()) == ends


# The file


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", ": is empty; a space file has the sections study, trial, resources"),
        ("# only a comment\n", ": is empty; a space file has the sections study, trial, resources"),
        ("- study\n- trial\n", ": must hold the sections study, trial, resources, not a list"),
        ("study", ": must hold the sections study, trial, resources, not a str"),
        (
            "study:\n  name: s\n trial: {}\n",
            ", line 3: not valid YAML (expected <block end>, but found '<block mapping start>')",
        ),
        ("study:\n  name: [s,\n", ", line 3: not valid YAML (expected the node content, but found '<stream end>')"),
        ("study:\n\tname: s\n", ", line 2: not valid YAML (found character '\\t' that cannot start any token)"),
        ("study: {}\n---\ntrial: {}\n", ", line 2: not valid YAML (but found another document)"),
        (
            "study: {}\ntrial: !!python/object/apply:os.system [true]\n",
            ", line 2: not valid YAML (could not determine a constructor for the tag "
            "'tag:yaml.org,2002:python/object/apply:os.system')",
        ),
        ("study: {name: 2024-02-30}\n", ": not valid YAML (day is out of range for month)"),
        (
            "study: {name: \x01}\n",
            ": not valid YAML (unacceptable character #x0001: special characters are not allowed "
            'in "<unicode string>", position 14)',
        ),
        (b"study: \xff\n", ": cannot be read (not UTF-8 text)"),
        ("study: {}\n".encode("utf-16"), ": cannot be read (not UTF-8 text)"),
        ("trial: {}\n", ": section 'study' is missing"),
        ("study: {name: s}\n", ": section 'trial' is missing"),
        ("study: {name: s}\ntrial:\n", ": section 'trial' must hold `key: value` lines, got None"),
        ("study: [name]\n", ": section 'study' must hold `key: value` lines, got ['name']"),
        ("study: {name: s}\ntrail: {}\n", ": unknown section 'trail'; did you mean 'trial'?"),
        ("study: {name: s}\nrank: 8\n", ": unknown section 'rank'; 'rank' belongs under 'trial:'"),
        ("1: {}\n", ": unknown section '1'; allowed: resources, study, trial"),
        (
            "comparison: {name: c}\ntrial: {}\n",
            ": unknown section 'comparison'; `bilora-ray compare FILE` takes a comparison file, and checks it with "
            "--dry-run",
        ),
        ("study: {}\ntrial: {}\n", ": study: 'name' is missing"),
        ("study: {name: s}\ntrial: {}\n", ": trial: 'model_name_or_path' is missing"),
        ("study: {name: s}\ntrial: {8: rank}\n", ": trial: unknown key '8'; "),
    ],
)
def test_a_broken_file_is_told_with_its_place(
    refused_text: Callable[[str | bytes], str], content: str | bytes, problem: str
) -> None:
    text = refused_text(content)
    # Of the last one only the beginning: the list of all settings follows.
    assert text == problem or (problem.endswith("; ") and text.startswith(problem))


def test_nesting_without_an_end_is_no_crash(refused_text: Callable[[str | bytes], str]) -> None:
    assert refused_text("[" * 2000).startswith(": not valid YAML (maximum recursion depth exceeded")


def test_a_byte_order_mark_is_no_content(load: Load, file: Path) -> None:
    before = load()
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert load_space(file) == before


def test_a_missing_file_and_a_folder_are_told(file: Path) -> None:
    for path, problem in ((file, "no such file"), (file.parent, "cannot be read (Is a directory)")):
        with pytest.raises(UserError) as caught:
            load_space(path)
        assert str(caught.value) == f"{path}: {problem}"


@pytest.mark.parametrize("name", ["a/b", "..", "../up", ".hidden", "a b", "a\\b", "", "-x", "a\n", "é", "x" * 101])
def test_a_study_name_cannot_lead_out_of_its_folder(refused: Refuse, name: str) -> None:
    assert refused(study={"name": name}) == (
        ": study: name: must be up to 100 letters, digits, '.', '_' or '-', the first a letter or a digit, "
        f"got {name!r}"
    )


@pytest.mark.parametrize("name", ["a", "llama-3.1_8B", "2024", "x" * 100, "a..b"])
def test_a_study_name_is_letters_digits_and_some_signs(load: Load, name: str) -> None:
    assert load(study={"name": name}).study.name == name


@pytest.mark.parametrize(
    ("setting", "distribution"),
    [
        ("metric", {"choice": ["eval_loss", "eval_perplexity"]}),
        ("eval_steps", {"low": 0.1, "high": 0.5}),
        ("validation_fraction", {"low": 0.1, "high": 0.5}),
        ("max_eval_samples", {"choice": [10, 20]}),
    ],
)
def test_what_trials_are_judged_by_is_not_searched(refused: Refuse, setting: str, distribution: dict[str, Any]) -> None:
    line = f": trial.{setting}: must have one value: trials that differ in it cannot be compared"
    assert refused({setting: distribution}) == line


@pytest.mark.parametrize(
    ("setting", "distribution", "needed"),
    [
        ("seed", {"choice": [0, 1]}, "split_seed or validation_data"),
        ("split_seed", {"low": 0, "high": 9}, "validation_data"),
        ("train_data", {"choice": ["a.jsonl", "b.jsonl"]}, "validation_data"),
    ],
)
def test_what_decides_the_held_out_rows_is_searched_only_beside_named_validation_data(
    load: Load, refused: Refuse, setting: str, distribution: dict[str, Any], needed: str
) -> None:
    line = f": trial.{setting}: needs {needed}, or trials would hold out other rows"
    assert refused({setting: distribution}) == line
    assert refused({setting: distribution, "validation_data": None}) == line
    assert setting in load({setting: distribution, "validation_data": "a.jsonl"}).distributions
    assert setting in load({setting: distribution, "validation_split": "test"}).distributions


@pytest.mark.parametrize(
    ("setting", "needed"), [("seed", "split_seed or stratify: false"), ("split_seed", "stratify: false")]
)
def test_what_decides_the_measured_rows_is_not_searched(load: Load, setting: str, needed: str) -> None:
    settings = {setting: {"choice": [0, 1]}, "validation_data": "a.jsonl", "max_eval_samples": 5}
    space = load(settings)
    with pytest.raises(UserError) as caught:
        check_draw(space)
    line = f"{space.path}: trial.{setting}: needs {needed}, or max_eval_samples would draw other rows"
    assert str(caught.value) == line
    check_draw(load({**settings, "stratify": False}))
    check_draw(load({**settings, "seed": {"choice": [0, 1]}, "split_seed": 3}))


@pytest.mark.parametrize("written", [{"enable_thinking": False}, {"low": 1, "high": 2}, {}])
def test_a_mapping_is_the_value_of_a_setting_that_takes_one(load: Load, written: dict[str, Any]) -> None:
    space = load({"messages_column": "m", "chat_template_kwargs": written})
    assert space.distributions == {}
    assert dict(space.first_config().chat_template_kwargs or ()) == written
    assert space.first_config().model_dump()["chat_template_kwargs"] == written
    given = load({"messages_column": "m"}, overrides=(f"chat_template_kwargs={json.dumps(written)}",))
    assert given.first_config() == space.first_config()


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        (
            {"choice": [True, False]},
            "'choice' must be one number, text, true, false or null, got {'choice': [True, False]}",
        ),
        ({"tools": "x"}, "'tools' is not for a user to give, got {'tools': 'x'}"),
        (True, "must be a mapping of names to values, got True"),
    ],
)
def test_what_a_template_cannot_be_told(refused: Refuse, written: Any, problem: str) -> None:
    line = f": trial: chat_template_kwargs: {problem}"
    assert refused({"messages_column": "m", "chat_template_kwargs": written}) == line


def test_a_chat_template_is_a_file_beside_the_space(load: Load, refused: Refuse, file: Path) -> None:
    (file.parent / "own.jinja").write_text("")
    named = load({"messages_column": "m", "chat_template": "own.jinja"}).first_config()
    assert named.chat_template == str(file.parent / "own.jinja")
    missing = refused({"messages_column": "m", "chat_template": "gone.jinja"})
    assert missing == f": trial.chat_template: no such file: {file.parent / 'gone.jinja'}"
    other = refused({"messages_column": "m", "chat_template": "a.jsonl"})
    assert other.startswith(": trial: chat_template: must be a file whose name ends with .jinja")


def test_the_seed_is_searched_beside_a_split_seed(load: Load, refused: Refuse) -> None:
    seeds = {"choice": [0, 1]}
    configs = [load({"seed": seeds, "split_seed": 0}).trial_config({"seed": seed}) for seed in (0, 1)]
    assert [config.resolved_split_seed for config in configs] == [0, 0]
    for other in (None, seeds):
        assert ": needs " in refused({"seed": seeds, "split_seed": other})
