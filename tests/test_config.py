"""Settings: the paper's defaults, strict types, and one line for whatever is wrong."""

from collections.abc import Collection
from typing import Any, get_args

import pytest
from pydantic import Field

from bilora_ray.checking import Settings, build
from bilora_ray.config import TrialConfig, template_columns
from bilora_ray.errors import UserError
from bilora_ray.facts import METHOD_NAMES, STARTING, Primary, facts_of, setting
from bilora_ray.measures import TASK_FACTS
from bilora_ray.search.space import ResourceConfig, StudyConfig
from bilora_ray.search.space_file import NOT_SEARCHED
from bilora_ray.settings import (
    FACTS,
    SOURCES,
    TRAINING_SETTINGS,
    applies,
    coerce,
    deciding_the_split,
    is_integer,
    is_number,
    shown,
)

NEEDED = {"model_name_or_path": "m", "task": "causal-lm", "train_data": "d"}
LABELLED = {"task": "sequence-classification"}
NUMBERS = [key for key in TrialConfig.model_fields if is_number(key)]
INTEGERS = [key for key in TrialConfig.model_fields if is_integer(key)]


def config(**settings: Any) -> TrialConfig:
    return build(TrialConfig, {**NEEDED, **settings}, "W")


*SOME, LAST = (repr(task) for task in TASK_FACTS)
TASK_WORDS = f"{', '.join(SOME)} or {LAST}"
METHOD_WORDS = f"{', '.join(map(repr, METHOD_NAMES[:-1]))} or {METHOD_NAMES[-1]!r}"
UNQUOTED = 'yes, no, on and off are true or false to YAML: a text needs quotes, as in "no"'


def refused(**settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        config(**settings)
    return str(caught.value)


def coercion_refused(setting: str, value: Any) -> str:
    with pytest.raises(UserError) as caught:
        coerce(setting, value, "W")
    return str(caught.value)


def test_the_defaults_are_what_the_paper_fixed() -> None:
    defaults = config()
    assert defaults.method == "bilora"
    assert (defaults.rank, defaults.auxiliary_rank) == (8, 8)
    assert defaults.resolved_lora_alpha == 16
    assert defaults.target_modules == "all-linear"
    assert defaults.lora_dropout == 0
    assert defaults.rho == 0.05
    assert defaults.learning_rate == 5e-4
    assert defaults.auxiliary_learning_rate is None  # the primary's
    assert (defaults.lr_scheduler_type, defaults.warmup_ratio) == ("cosine", 0.03)
    assert defaults.num_train_epochs == 3


def test_alpha_follows_the_rank_until_it_is_given() -> None:
    assert config(rank=32).resolved_lora_alpha == 64
    assert config(rank=32, lora_alpha=8).resolved_lora_alpha == 8


def test_the_split_follows_the_seed_until_it_has_its_own() -> None:
    assert config(seed=3).resolved_split_seed == 3
    assert config(seed=3, split_seed=0).resolved_split_seed == 0


@pytest.mark.parametrize(
    ("settings", "decisive"),
    [
        ({}, True),
        ({"split_seed": None}, True),
        ({"split_seed": 0}, False),
        ({"validation_data": "d"}, False),
        ({"validation_split": "test"}, False),
    ],
)
def test_the_seed_decides_the_split_where_nothing_else_does(settings: dict[str, Any], decisive: bool) -> None:
    assert ("seed" in deciding_the_split(settings)) is decisive
    named = settings.keys() & {"validation_data", "validation_split"}
    others = {
        "column_names",
        "dataset_config_name",
        "delimiter",
        "encoding",
        "field",
        "quoting",
        "split_seed",
        "stratify",
        "train_data",
        "train_revision",
        "train_split",
        "validation_data",
        "validation_fraction",
        "validation_revision",
        "validation_split",
    }
    assert deciding_the_split(settings) - {"seed"} == (set() if named else others)


def test_code_from_the_hub_does_not_run_unless_asked() -> None:
    assert config().trust_remote_code is False


@pytest.mark.parametrize("kind", [TrialConfig, StudyConfig, ResourceConfig])
def test_every_setting_has_a_description(kind: type[Settings]) -> None:
    assert [key for key, field in kind.model_fields.items() if not (field.description or "").strip()] == []


def test_settings_cannot_be_changed_once_they_are_checked() -> None:
    with pytest.raises(ValueError, match="frozen"):
        config().rank = 0


# Types


@pytest.mark.parametrize(
    ("setting", "given", "taken"),
    [
        ("learning_rate", "3e-4", 3e-4),
        ("learning_rate", 1, 1.0),
        ("rank", "8", 8),
        ("rank", 8.0, 8),
        ("max_grad_norm", None, None),
        ("max_steps", "100", 100),
        ("auxiliary_learning_rate", "1e-5", 1e-5),
        ("gradient_checkpointing", "true", True),
        ("target_modules", ["q_proj", "v_proj"], ("q_proj", "v_proj")),
        ("train_data", 2024, "2024"),
        ("label_names", [0, 1], ("0", "1")),
    ],
)
def test_a_value_becomes_the_settings_type_in_a_file_and_in_a_choice(setting: str, given: Any, taken: Any) -> None:
    for value in (getattr(config(**{setting: given}), setting), coerce(setting, given, "W")):
        assert value == taken
        assert type(value) is type(taken)


@pytest.mark.parametrize("setting", NUMBERS)
def test_true_is_no_number(setting: str) -> None:
    assert refused(**{setting: True}) == f"W: {setting}: must be a number, not true or false, got True"
    assert coercion_refused(setting, False) == "W: must be a number, not true or false"


@pytest.mark.parametrize("setting", [key for key in NUMBERS if key not in INTEGERS])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), "nan", "-inf"])
def test_nan_and_infinity_are_refused(setting: str, value: float | str) -> None:
    assert refused(**{setting: value}) == f"W: {setting}: should be a finite number, got {value!r}"
    assert coercion_refused(setting, value) == f"W: should be a finite number, got {value!r}"


@pytest.mark.parametrize("setting", INTEGERS)
def test_a_fraction_is_no_integer(setting: str) -> None:
    problem = "should be a valid integer, got a number with a fractional part, got 7.5"
    assert refused(**{setting: 7.5}) == f"W: {setting}: {problem}"
    assert coercion_refused(setting, 7.5) == f"W: {problem}"


def test_integers_are_known_and_so_are_numbers() -> None:
    assert INTEGERS == [
        "max_length",
        "max_train_samples",
        "max_eval_samples",
        "split_seed",
        "rank",
        "auxiliary_rank",
        "looksam_every",
        "max_steps",
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "per_device_generation_batch_size",
        "gradient_accumulation_steps",
        "tokens_per_pass",
        "seed",
        "early_stopping_patience",
        "max_new_tokens",
        "adversary_steps",
    ]
    assert [key for key in NUMBERS if key not in INTEGERS] == [
        "validation_fraction",
        "lora_alpha",
        "lora_dropout",
        "rho",
        "auxiliary_learning_rate",
        "looksam_alpha",
        "esam_beta",
        "esam_gamma",
        "bar_alpha",
        "learning_rate",
        "weight_decay",
        "max_grad_norm",
        "warmup_ratio",
        "num_train_epochs",
        "eval_steps",
        "early_stopping_threshold",
        "sharpness_radius",
    ]


# Errors


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"rank": 0}, "rank: should be greater than or equal to 1, got 0"),
        ({"rank": "eight"}, "rank: should be a valid integer, unable to parse string as an integer, got 'eight'"),
        (
            {"rank": [4, 8]},
            "rank: should be a valid integer, got [4, 8]; several values to choose from are {choice: [...]}",
        ),
        # No choice of what trials are compared by.
        ({"max_length": [64, 128]}, "max_length: should be a valid integer, got [64, 128]"),
        ({"rank": None}, "rank: should be a valid integer, got None"),
        ({"rho": 0}, "rho: should be greater than 0, got 0"),
        ({"rho": "-0.1"}, "rho: should be greater than 0, got '-0.1'"),
        ({"lora_dropout": 1}, "lora_dropout: should be less than 1, got 1"),
        ({"validation_fraction": 0}, "validation_fraction: should be greater than 0, got 0"),
        ({"seed": 2**32}, "seed: should be less than 4294967296, got 4294967296"),
        ({"seed": -1}, "seed: should be greater than or equal to 0, got -1"),
        ({"max_length": 3}, "max_length: should be greater than or equal to 4, got 3"),
        ({"train_data": ""}, "train_data: should have at least 1 character, got ''"),
        ({"model_name_or_path": None}, "model_name_or_path: should be a valid string, got None"),
        ({"task": "causal"}, f"task: should be {TASK_WORDS}, got 'causal'"),
        (
            {"method": "sam"},
            f"method: should be {METHOD_WORDS}, got 'sam'",
        ),
        (
            {"lr_scheduler_type": "cosin"},
            "lr_scheduler_type: should be 'cosine', 'linear', 'constant' or 'constant_with_warmup', got 'cosin'",
        ),
        (
            {"gradient_checkpointing": "maybe"},
            "gradient_checkpointing: should be a valid boolean, unable to interpret input, got 'maybe'",
        ),
        ({"delimiter": ", "}, 'delimiter: must be one character, such as ";", or "\\t" for a tab, got \', \''),
        ({"encoding": "cp-1252x"}, "encoding: 'cp-1252x' is no text encoding; did you mean 'cp1252'?"),
        (
            {"encoding": "hex"},
            "encoding: 'hex' is no text encoding; allowed: big5, cp1250, cp1251, cp1252, gb18030, iso-8859-1, "
            "mac-roman, shift_jis, utf-16, utf-8",
        ),
        (
            {"attn_implementation": "flash_attention2"},
            "attn_implementation: 'flash_attention2' is no attention kernel; did you mean 'flash_attention_2'?",
        ),
        ({"quoting": "all"}, "quoting: should be 'none', 'csv' or 'by-suffix', got 'all'"),
        ({"target_modules": [3, None]}, "target_modules: should be a valid string, got [3, None]"),
        ({"label_names": "yes"}, "label_names: should be a valid tuple, got 'yes'"),
        (
            {"label_names": ["good", False]},
            f"label_names.1: should be a valid string, got False; {UNQUOTED}",
        ),
        ({"label_names": [None, "good"]}, "label_names.0: should be a valid string, got None"),
        ({"positive_label": True}, f"positive_label: should be a valid string, got True; {UNQUOTED}"),
        ({"eval_steps": 1.5}, "eval_steps: must be a whole number of steps, or a share below 1, got 1.5"),
        ({"eval_steps": 0}, "eval_steps: should be greater than 0, got 0"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(settings: dict[str, Any], problem: str) -> None:
    assert refused(**settings) == f"W: {problem}"


@pytest.mark.parametrize(("value", "taken"), [(1, 1), (50, 50), ("0.25", 0.25), (0.999, 0.999)])
def test_eval_steps_is_a_number_of_steps_or_a_share(value: Any, taken: float) -> None:
    assert config(eval_steps=value).eval_steps == taken


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("rnak", "did you mean 'rank'?"),
        ("lr", "`bilora-ray settings` lists the keys"),
        ("num_epochs", "did you mean 'num_train_epochs'?"),
        ("Rho", "did you mean 'rho'?"),
        (
            "batch_size",
            "did you mean 'per_device_eval_batch_size' or 'per_device_generation_batch_size' or "
            "'per_device_train_batch_size'?",
        ),
    ],
)
def test_an_unknown_key_comes_with_the_nearest_or_who_lists_all(key: str, hint: str) -> None:
    assert refused(**{key: 1}) == f"W: unknown key '{key}'; {hint}"


def test_an_unknown_key_is_told_before_any_other_problem() -> None:
    with pytest.raises(UserError) as caught:
        build(TrialConfig, {"task": 3, "trian_data": "x"}, "W")
    assert str(caught.value) == "W: unknown key 'trian_data'; did you mean 'train_data'?"


@pytest.mark.parametrize("key", sorted(NEEDED))
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(UserError) as caught:
        build(TrialConfig, {k: v for k, v in NEEDED.items() if k != key}, "W")
    assert str(caught.value) == f"W: '{key}' is missing"


def test_a_key_that_is_no_text_is_refused_without_a_traceback() -> None:
    with pytest.raises(UserError) as caught:
        build(TrialConfig, {**NEEDED, 8: "rank"}, "W")
    assert str(caught.value) == "W: 8: Keys should be strings, got 8"


# Settings that must go together


@pytest.mark.parametrize(
    ("settings", "metrics"),
    [
        ({}, ["eval_loss", "eval_perplexity", "eval_token_accuracy"]),
        ({"task": "seq2seq-lm"}, ["eval_loss", "eval_perplexity", "eval_token_accuracy"]),
        (
            {"predict_with_generate": True},
            ["eval_loss", "eval_perplexity", "eval_token_accuracy", "eval_exact_match"],
        ),
        (
            {"task": "seq2seq-lm", "predict_with_generate": True, "label_names": ["a", "b"]},
            [
                "eval_loss",
                "eval_perplexity",
                "eval_token_accuracy",
                "eval_exact_match",
                "eval_accuracy",
                "eval_f1",
                "eval_matthews_correlation",
            ],
        ),
        (LABELLED, ["eval_loss", "eval_accuracy", "eval_f1", "eval_matthews_correlation"]),
    ],
)
def test_a_trial_is_judged_only_by_what_its_evaluation_measures(settings: dict[str, Any], metrics: list[str]) -> None:
    assert list(config(**settings).available_metrics) == metrics
    for metric in metrics:
        assert config(**settings, metric=metric).metric == metric
    # Too far from every name for a guess, so the whole list is the hint.
    assert refused(**settings, metric="bleu") == (
        f"W: metric: 'bleu' is not measured here; allowed: {', '.join(sorted(metrics))}"
    )


def test_sharpness_is_measured_where_its_radius_is_given() -> None:
    assert config(sharpness_radius=0.1, metric="sharpness").available_metrics[-1] == "sharpness"
    assert not config(sharpness_radius=0.1, metric="sharpness").objective.greater_is_better
    assert refused(metric="sharpness") == "W: metric: 'sharpness' is not measured here; it needs sharpness_radius"
    assert (config(sharpness_radius=0.1).whole_only or "").startswith("sharpness_radius: ")


def test_a_metric_of_another_task_is_refused_with_the_nearest_name() -> None:
    assert refused(**LABELLED, metric="accuracy") == (
        "W: metric: 'accuracy' is not measured here; did you mean 'eval_accuracy'?"
    )
    assert refused(metric="eval_exact_match") == (
        "W: metric: 'eval_exact_match' is not measured here; it needs predict_with_generate: true"
    )
    # Generated text can be compared with labels only if the labels are known.
    assert refused(predict_with_generate=True, metric="eval_f1") == (
        "W: metric: 'eval_f1' is not measured here; "
        "allowed: eval_exact_match, eval_loss, eval_perplexity, eval_token_accuracy"
    )


@pytest.mark.parametrize(
    ("settings", "greater"),
    [
        ({"metric": "eval_loss"}, False),
        ({"metric": "eval_perplexity"}, False),
        ({"metric": "eval_token_accuracy"}, True),
        ({"metric": "eval_exact_match", "predict_with_generate": True}, True),
        ({"metric": "eval_matthews_correlation", **LABELLED}, True),
    ],
)
def test_losses_are_minimized_and_scores_maximized(settings: dict[str, Any], greater: bool) -> None:
    assert config(**settings).objective.greater_is_better is greater


def test_a_classifier_generates_no_text() -> None:
    assert refused(**LABELLED, predict_with_generate=True) == (
        "W: predict_with_generate: sequence-classification generates no text"
    )


@pytest.mark.parametrize("names", [[], ["a"], ["a", "a"], ["a", "b", "a"]])
def test_labels_need_two_different_names(names: list[str]) -> None:
    assert refused(**LABELLED, label_names=names) == "W: label_names: needs two or more different names"


# Templates and patterns


@pytest.mark.parametrize(
    ("template", "columns"),
    [
        ("{prompt}", ("prompt",)),
        ("{b} and {a} and {b}", ("b", "a", "b")),
        ("no column", ()),
        ("", ()),
        ("{{literal}} {question id}{answer-1}", ("question id", "answer-1")),
        ("{größe}\n{0}", ("größe", "0")),
    ],
)
def test_a_template_names_its_columns_in_order(template: str, columns: tuple[str, ...]) -> None:
    assert template_columns(template) == columns
    assert config(prompt_template=template).prompt_template == template


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{}", "may hold only plain column names in braces, not '{}'"),
        ("{a.b}", "may hold only plain column names in braces, not '{a.b}'"),
        ("{a[0]}", "may hold only plain column names in braces, not '{a[0]}'"),
        ("{a!r}", "may hold only plain column names in braces, not '{a!r}'"),
        ("{a:>9}", "may hold only plain column names in braces, not '{a:>9}'"),
        ("{a:{b}}", "may hold only plain column names in braces, not '{a:{b}}'"),
        ('{"a": 1}', "may hold only plain column names in braces, not '{\"a\": 1}'"),
        ("{a", "expected '}' before end of string"),
        ("a}", "Single '}' encountered in format string"),
        ("{", "Single '{' encountered in format string"),
    ],
)
def test_a_template_holds_plain_columns_only(template: str, problem: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        template_columns(template)
    assert str(caught.value) == problem
    for key in ("prompt_template", "completion_template"):
        assert refused(**{key: template}) == f"W: {key}: {problem}, got {template!r}"


def test_an_answer_pattern_has_one_group() -> None:
    assert config(answer_pattern=r"#### (-?\d+)").answer_pattern == r"#### (-?\d+)"
    assert config(answer_pattern=r"(?:a|b): (.*)").answer_pattern == r"(?:a|b): (.*)"
    for pattern, groups in ((r"#### \d+", 0), (r"(a)(b)", 2)):
        assert refused(answer_pattern=pattern) == (
            f"W: answer_pattern: must have one group, (...), around the answer; it has {groups}, got {pattern!r}"
        )


def test_an_answer_pattern_is_a_regular_expression() -> None:
    assert refused(answer_pattern="(a") == (
        "W: answer_pattern: is not a regular expression: missing ), unterminated subpattern at position 0, got '(a'"
    )


# Methods


@pytest.mark.parametrize("setting", ["rho", "auxiliary_rank", "auxiliary_learning_rate"])
def test_the_auxiliarys_settings_apply_to_bilora_alone(setting: str) -> None:
    assert applies(setting, "bilora")
    assert not applies(setting, "lora")


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_the_primarys_settings_apply_to_every_method(method: str) -> None:
    adapter = {"rank", "lora_alpha", "lora_dropout", "target_modules"}
    assert all(applies(key, method) for key in ("learning_rate", "weight_decay", "max_grad_norm"))
    assert {key for key in adapter if applies(key, method)} == (set() if method == "full" else adapter)


def test_full_fine_tuning_wants_weights_as_they_are_and_all_of_them() -> None:
    line = "W: quantization: method full trains the weights, which must not be quantised"
    assert refused(quantization="nf4", method="full") == line
    assert config(method="full").leaves_model
    assert not config(method="lora").leaves_model


def test_what_a_method_does_not_read_does_not_apply_to_it() -> None:
    assert [key for key in FACTS if not applies(key, "lora")] == [
        "rho",
        "auxiliary_rank",
        "auxiliary_learning_rate",
        "clip",
        "norm",
        "ascent",
        "looksam_every",
        "looksam_alpha",
        "esam_beta",
        "esam_gamma",
        "bar_alpha",
        "rwp_space",
    ]
    assert [key for key in FACTS if not applies(key, "lora-sam")][:2] == ["auxiliary_rank", "auxiliary_learning_rate"]


def test_noise_on_the_full_weight_wants_all_of_it_as_it_is() -> None:
    line = "W: quantization: {} has noise on the full weight, which must not be quantised"
    assert refused(quantization="nf4", method="flat-lora") == line.format("flat-lora")
    assert refused(quantization="int8", method="rwp") == line.format("rwp")
    assert config(quantization="nf4", method="rwp", rwp_space="lora").whole_only is not None
    for method in METHOD_NAMES:
        whole = config(method=method).whole_only
        noise = f"method: {method} has noise on whole weights, not on parts of them; use parallelism: ddp"
        parts = "method: full is not trained in parts; use parallelism: ddp"
        assert whole == {"flat-lora": noise, "rwp": noise, "full": parts}.get(method)


def test_a_primary_is_refused_where_a_method_cannot_be_right_with_it() -> None:
    line = "W: primary: {} has noise on the sum of W0 and LoRA, and dora is another function of them; allowed: "
    line += ", ".join(name for name in get_args(Primary) if name != "dora")
    assert refused(primary="dora", method="flat-lora") == line.format("flat-lora")
    assert refused(primary="dora", method="rwp") == line.format("rwp")
    assert config(primary="dora", method="rwp", rwp_space="lora").primary == "dora"
    for method in METHOD_NAMES:
        assert config(primary="rslora", method=method).primary == "rslora"
    assert config().primary == "lora"
    line = "W: quantization: the norms of a dora are of weights that int8 does not let be read; use nf4"
    assert refused(primary="dora", quantization="int8") == line
    assert config(primary="dora", quantization="nf4").primary == "dora"
    for primary in STARTING:
        line = f"W: quantization: {primary} begins with weights as they are, not with quantised ones"
        assert refused(primary=primary, quantization="nf4") == line
        assert config(primary=primary, rank=4).exported_rank == 8
        whole = f"primary: {primary} begins with whole weights, not with parts of them; use parallelism: ddp"
        assert config(primary=primary).whole_only == whole
    assert config(rank=4, primary="dora").exported_rank == 4


# Facts


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"of": ("bilora",)},
        {"decides": "rho"},
        {"decides": "training", "of": ("adam",)},
        {"decides": "training", "search": False},
        {"decides": "training", "multiple_of": 1},
    ],
    ids=str,
)
def test_a_setting_is_not_declared_without_what_it_decides_or_with_facts_that_are_none(facts: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        setting(0.5, "of something", **facts)


def test_a_setting_is_not_declared_in_another_way() -> None:
    class Plain(TrialConfig):
        momentum: float = 0.9

    class Described(TrialConfig):
        momentum: float = Field(0.9, description="of something")

    for kind in (Plain, Described):
        with pytest.raises(TypeError, match="decides"):
            facts_of(kind)


def test_rows_and_measures_are_the_same_for_all_trials_unless_a_setting_says_otherwise() -> None:
    class New(TrialConfig):
        shuffled: bool = setting(False, "of something", decides="rows")
        beams: int = setting(1, "of something", decides="evaluation")
        momentum: float = setting(0.9, "of something", decides="training")
        packed: bool = setting(False, "of something", decides="rows", searched=True)

    found = facts_of(New)
    assert [found[key].searched for key in ("shuffled", "beams", "momentum", "packed")] == [False, False, True, True]
    assert found["momentum"].of == METHOD_NAMES


# The settings of 0.1.0 and what it knew of them, where each was told in a list of its own.
OF_0_1_0 = """
    answer_pattern attn_implementation auxiliary_learning_rate auxiliary_rank column_names completion_template
    dataset_config_name eval_steps gradient_accumulation_steps gradient_checkpointing label_column label_names
    learning_rate lora_alpha lora_dropout lr_scheduler_type max_eval_samples max_grad_norm max_length max_new_tokens
    max_steps max_train_samples messages_column method metric model_name_or_path model_revision num_train_epochs
    per_device_eval_batch_size per_device_train_batch_size precision predict_with_generate prompt_template quantization
    rank rho seed target_modules task text_column text_pair_column train_data train_split trust_remote_code
    validation_data validation_fraction validation_split warmup_ratio weight_decay
"""


@pytest.mark.parametrize(
    ("settings", "known"),
    [
        (
            TRAINING_SETTINGS,
            """
            auxiliary_learning_rate auxiliary_rank eval_steps gradient_accumulation_steps gradient_checkpointing
            learning_rate lora_alpha lora_dropout lr_scheduler_type max_grad_norm max_steps max_train_samples method
            metric num_train_epochs per_device_train_batch_size rank rho target_modules warmup_ratio weight_decay
            """,
        ),
        (
            NOT_SEARCHED,
            """
            answer_pattern column_names completion_template dataset_config_name eval_steps label_column label_names
            max_eval_samples max_length max_new_tokens messages_column metric predict_with_generate task text_column
            text_pair_column train_split trust_remote_code validation_data validation_fraction validation_split
            """,
        ),
        (
            shown("card"),
            """
            auxiliary_learning_rate auxiliary_rank gradient_accumulation_steps learning_rate lora_alpha max_steps
            num_train_epochs per_device_train_batch_size precision quantization rank rho seed target_modules
            """,
        ),
        (shown("best"), "auxiliary_rank learning_rate method rank rho"),
        (SOURCES, "model_name_or_path train_data validation_data"),
        (
            [key for key, facts in FACTS.items() if facts.rehearsed],
            "model_name_or_path quantization attn_implementation target_modules",
        ),
    ],
    ids=["training", "not searched", "card", "best", "sources", "rehearsed"],
)
def test_what_was_known_of_the_settings_of_0_1_0_still_holds(settings: Collection[str], known: str) -> None:
    assert set(settings) & set(OF_0_1_0.split()) == set(known.split())


def test_no_setting_of_0_1_0_is_gone() -> None:
    assert set(FACTS) >= set(OF_0_1_0.split())
