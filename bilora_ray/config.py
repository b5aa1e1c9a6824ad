"""One trial's settings: flat, typed, strict. A setting is declared here and nowhere else.

The same key is used in a space file, by Optuna, Tune and MLflow, and in code. Names are those of PEFT and
transformers where they have one, and the Bi-LoRA paper's (arXiv 2508.19564) otherwise. Nothing here imports
torch, so that `bilora-ray validate` is instant.
"""

from __future__ import annotations

import re
import string
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import (
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from bilora_ray.checking import Float, Int, Settings, first_problem, in_words
from bilora_ray.errors import UserError, nearest

Task = Literal["causal-lm", "seq2seq-lm", "sequence-classification"]
MethodName = Literal["lora", "bilora"]

# What transformers calls the models of a task.
MODEL_CLASS: dict[Task, str] = {
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "sequence-classification": "AutoModelForSequenceClassification",
}

# About what CUDA takes of a GPU for each process, beside what torch allocates: an estimate, not measured here.
CUDA_GIB = 0.5

# A setting that only some methods read; a search does not vary it for the others.
METHOD_SETTINGS: dict[str, frozenset[str]] = {
    "rho": frozenset({"bilora"}),
    "auxiliary_rank": frozenset({"bilora"}),
    "auxiliary_learning_rate": frozenset({"bilora"}),
}
# What an evaluation does not read: all that is about how an adapter was trained.
TRAINING_SETTINGS = frozenset(
    {
        *METHOD_SETTINGS,
        "eval_steps",
        "gradient_accumulation_steps",
        "gradient_checkpointing",
        "learning_rate",
        "lora_alpha",
        "lora_dropout",
        "lr_scheduler_type",
        "max_grad_norm",
        "max_steps",
        "max_train_samples",
        "method",
        "metric",
        "num_train_epochs",
        "per_device_train_batch_size",
        "rank",
        "target_modules",
        "warmup_ratio",
        "weight_decay",
    }
)

LOSS_METRICS = ("eval_loss",)
LM_METRICS = ("eval_loss", "eval_perplexity", "eval_token_accuracy")
EXACT_MATCH = "eval_exact_match"
LABEL_METRICS = ("eval_accuracy", "eval_f1", "eval_matthews_correlation")
MINIMIZED = frozenset({"eval_loss", "eval_perplexity"})


class TrialConfig(Settings):
    """All that decides what one training run computes. See each field's description."""

    searched: ClassVar[bool] = True

    # Model
    model_name_or_path: str = Field(min_length=1, description="Hub id, local folder, or builtin:NAME")
    model_revision: str | None = Field(None, description="Hub revision (branch, tag or commit)")
    trust_remote_code: bool = Field(False, description="run model code that comes from the Hub")
    task: Task = Field(description="what is learned")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="base weights and activations; adapters stay fp32")
    quantization: Literal["nf4", "int8"] | None = Field(
        None, description="of the frozen base weights (QLoRA); needs bitsandbytes"
    )
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2"] | None = Field(
        None, description="attention kernel; transformers chooses when absent"
    )

    # Data
    train_data: str = Field(min_length=1, description="local file, Hub dataset, or builtin:NAME")
    validation_data: str | None = Field(None, description="as train_data; a split by seed is made when absent")
    validation_fraction: Float = Field(0.1, gt=0, lt=1, description="share of train_data held out when it is split")
    dataset_config_name: str | None = Field(None, description="configuration of a Hub dataset, such as sst2")
    train_split: str = Field("train", description="split of a Hub dataset to train on")
    validation_split: str | None = Field(None, description="split of a Hub dataset to validate on")
    column_names: tuple[str, ...] | None = Field(None, description="columns of a CSV or TSV file without a header")
    prompt_template: str = Field("{prompt}", description="prompt of a row; {name} is a column")
    completion_template: str = Field("{completion}", description="completion of a row; {name} is a column")
    messages_column: str | None = Field(None, description="column of chat messages, used instead of the templates")
    text_column: str = Field("text", description="sequence-classification: the text")
    text_pair_column: str | None = Field(None, description="sequence-classification: the second text")
    label_column: str = Field("label", description="column of the label")
    label_names: tuple[str, ...] | None = Field(None, description="labels in order; found in train_data when absent")
    max_length: Int = Field(512, ge=4, description="tokens a row keeps at the most")
    max_train_samples: Int | None = Field(None, ge=1, description="train on this many rows, drawn by seed")
    max_eval_samples: Int | None = Field(None, ge=1, description="validate on the first so many rows")

    # Method
    method: MethodName = Field("bilora", description="how the adapter is trained")
    rank: Int = Field(8, ge=1, description="r of the primary adapter")
    lora_alpha: Float | None = Field(None, gt=0, description="2 x rank when absent")
    lora_dropout: Float = Field(0.0, ge=0, lt=1, description="dropout on the primary adapter's input")
    target_modules: str | tuple[str, ...] = Field("all-linear", description="modules that get an adapter")
    rho: Float = Field(0.05, gt=0, description="radius of the auxiliary perturbation, Frobenius norm, all layers")
    auxiliary_rank: Int = Field(8, ge=1, description="r of the auxiliary adapter")
    auxiliary_learning_rate: Float | None = Field(None, gt=0, description="learning_rate when absent")

    # Optimisation
    learning_rate: Float = Field(5e-4, gt=0, description="peak learning rate of the primary adapter")
    weight_decay: Float = Field(0.0, ge=0, description="AdamW weight decay of the primary adapter")
    max_grad_norm: Float | None = Field(1.0, gt=0, description="gradient norm limit, per branch; null: none")
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = Field(
        "cosine", description="course of the learning rate over the steps"
    )
    warmup_ratio: Float = Field(0.03, ge=0, lt=1, description="share of steps with rising learning rate")
    num_train_epochs: Float = Field(3.0, gt=0, description="passes over the training rows")
    max_steps: Int | None = Field(None, ge=1, description="optimizer steps, instead of num_train_epochs")
    per_device_train_batch_size: Int = Field(8, ge=1, description="rows of one forward pass")
    per_device_eval_batch_size: Int = Field(32, ge=1, description="rows of one evaluation pass")
    gradient_accumulation_steps: Int = Field(1, ge=1, description="forward passes of one optimizer step")
    gradient_checkpointing: bool = Field(False, description="recompute activations: less memory, more time")
    seed: Int = Field(0, ge=0, lt=2**32, description="of data order, initial weights and dropout")

    # Evaluation
    metric: str = Field("eval_loss", description="what a trial is judged by; decides which checkpoint is kept")
    eval_steps: Float = Field(0.1, gt=0, description="steps between evaluations; below 1, a share of the training")
    predict_with_generate: bool = Field(False, description="generate text and measure eval_exact_match")
    max_new_tokens: Int = Field(64, ge=1, description="length of generated text")
    answer_pattern: str | None = Field(None, description="regular expression whose group 1 is the answer in a text")

    @field_validator("eval_steps")
    @classmethod
    def _whole_eval_steps(cls, value: float) -> float:
        if value >= 1 and value != int(value):
            raise ValueError("must be a whole number of steps, or a share below 1")
        return value

    @field_validator("prompt_template", "completion_template")
    @classmethod
    def _plain_template(cls, value: str) -> str:
        template_columns(value)
        return value

    @field_validator("answer_pattern")
    @classmethod
    def _one_group(cls, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            groups = re.compile(value).groups
        except re.error as error:
            raise ValueError(f"is not a regular expression: {error}") from None
        if groups != 1:
            raise ValueError(f"must have one group, (...), around the answer; it has {groups}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> TrialConfig:
        if self.metric not in self.available_metrics:
            # A right name in the wrong place needs the list, not a guess at another name.
            known = self.metric in (*LM_METRICS, EXACT_MATCH, *LABEL_METRICS)
            allowed = f"allowed: {', '.join(sorted(self.available_metrics))}"
            hint = allowed if known else nearest(self.metric, self.available_metrics)
            if self.metric == EXACT_MATCH and self.task != "sequence-classification":
                hint = "it needs predict_with_generate: true"
            raise ValueError(f"metric: '{self.metric}' is not measured here; {hint}")
        if self.task == "sequence-classification" and self.predict_with_generate:
            raise ValueError("predict_with_generate: sequence-classification generates no text")
        if self.label_names is not None and len(set(self.label_names)) < max(2, len(self.label_names)):
            raise ValueError("label_names: needs two or more different names")
        return self

    @property
    def available_metrics(self) -> tuple[str, ...]:
        """Names of the metrics that an evaluation of this trial reports."""
        if self.task == "sequence-classification":
            return LOSS_METRICS + LABEL_METRICS
        if not self.predict_with_generate:
            return LM_METRICS
        return LM_METRICS + (EXACT_MATCH,) + (LABEL_METRICS if self.label_names else ())

    @property
    def greater_is_better(self) -> bool:
        """Whether a larger `metric` is a better trial."""
        return self.metric not in MINIMIZED

    @property
    def resolved_lora_alpha(self) -> float:
        """`lora_alpha`, or the paper's 2 x rank."""
        return 2.0 * self.rank if self.lora_alpha is None else self.lora_alpha

    @property
    def resolved_auxiliary_learning_rate(self) -> float:
        """`auxiliary_learning_rate`, or the paper's choice: the primary's."""
        return self.learning_rate if self.auxiliary_learning_rate is None else self.auxiliary_learning_rate


def template_columns(template: str) -> tuple[str, ...]:
    """The columns that `template` names, in order. ValueError unless every field is a plain {column}."""
    columns = []
    try:
        for _, column, spec, conversion in string.Formatter().parse(template):
            if column is None:
                continue
            field = column + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            if not re.fullmatch(r"[\w \-]+", field):
                raise ValueError(f"may hold only plain column names in braces, not '{{{field}}}'")
            columns.append(column)
    except ValueError as error:
        raise ValueError(str(error)) from None
    return tuple(columns)


def is_integer(setting: str) -> bool:
    """Whether `setting` takes whole numbers only."""
    return int in _kinds(setting)


def is_number(setting: str) -> bool:
    """Whether `setting` takes numbers."""
    return bool({int, float} & _kinds(setting))


def _kinds(setting: str) -> set[Any]:
    annotation = TrialConfig.model_fields[setting].annotation
    return {getattr(kind, "__origin__", kind) for kind in (annotation, *get_args(annotation))}


def coerce(setting: str, value: Any, where: str) -> Any:
    """`value` as the type of `setting`: YAML 1.1 reads `3e-4` as text. UserError if it can't be."""
    field = TrialConfig.model_fields[setting]
    try:
        kind: Any = Annotated[field.annotation, field]
        adapter: TypeAdapter[Any] = TypeAdapter(kind, config=TrialConfig.model_config)
        return adapter.validate_python(value)
    except ValidationError as error:
        raise UserError(f"{where}: {in_words(TrialConfig, first_problem(error))}") from None


def applies(setting: str, method: str) -> bool:
    """Whether `method` reads `setting`."""
    return setting not in METHOD_SETTINGS or method in METHOD_SETTINGS[setting]
