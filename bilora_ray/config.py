"""One trial's settings: what each may be beside its type, which go together, and what follows from them."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from typing import Any, get_args

from pydantic import field_validator, model_validator

from bilora_ray.checking import Pairs
from bilora_ray.errors import nearest
from bilora_ray.facts import NOISY, STARTING, WHOLE, Primary
from bilora_ray.fields import COMPLETION_TEMPLATE, PROMPT_TEMPLATE, TrialFields
from bilora_ray.measures import EXACT_MATCH, LABEL_METRICS, SHARPNESS, TASK_FACTS, objective
from bilora_ray.records import Objective

# Kernels of attention. Of those of the Hub, which are code, the ones that transformers' authors keep.
KERNELS = ("eager", "sdpa", "varlen", "flash_attention_2", "flash_attention_3")
HUB_KERNEL = re.compile(r"kernels-community/[\w.-]+(@[\w.-]+)?(:[\w.-]+)?")
# Those that a file is likely to have: any other that Python knows is taken too.
ENCODINGS = ("utf-8", "utf-16", "cp1250", "cp1251", "cp1252", "iso-8859-1", "mac-roman", "gb18030", "big5", "shift_jis")

# Of the formats that hold chats, the column.
CHAT_COLUMNS = {"openai": "messages", "sharegpt": "conversations"}
# What only chats read.
CHAT_SETTINGS = ("tools_column", "system_prompt", "train_on", "chat_template", "chat_template_kwargs")
# What rendering a chat is given by us, and not by a user.
RENDERED = frozenset(
    [
        *("add_generation_prompt", "chat_template", "continue_final_message", "conversation", "documents"),
        *("max_length", "messages", "padding", "return_dict", "return_tensors", "tokenize", "tools", "truncation"),
    ]
)
# What no trial reads.
TEST_SETTINGS = ("test_data", "test_split", "test_revision", "retention_data")


class TrialConfig(TrialFields):
    """All that decides what one training run computes. See each field's description."""

    @field_validator("attn_implementation")
    @classmethod
    def _known_kernel(cls, value: str | None) -> str | None:
        if value is not None and value not in KERNELS and not HUB_KERNEL.fullmatch(value):
            hint = nearest(value, [*KERNELS, "kernels-community/NAME"])
            raise ValueError(f"{value!r} is no attention kernel; {hint}")
        return value

    @field_validator("eval_steps")
    @classmethod
    def _whole_eval_steps(cls, value: float) -> float:
        if value >= 1 and value != int(value):
            raise ValueError("must be a whole number of steps, or a share below 1")
        return value

    @field_validator("delimiter")
    @classmethod
    def _one_character(cls, value: str | None) -> str | None:
        if value is not None and (len(value) != 1 or value in '"\r\n'):
            raise ValueError('must be one character, such as ";", or "\\t" for a tab')
        return value

    @field_validator("encoding")
    @classmethod
    def _text_encoding(cls, value: str | None) -> str | None:
        try:
            "".encode(value or "utf-8")
        except LookupError:
            raise ValueError(f"{value!r} is no text encoding; {nearest(value or '', ENCODINGS)}") from None
        return value

    @field_validator("prompt_template", "completion_template")
    @classmethod
    def _plain_template(cls, value: str) -> str:
        template_columns(value)
        return value

    @field_validator("label_names", "positive_label", mode="before")
    @classmethod
    def _as_in_a_file(cls, value: Any) -> Any:
        names = list(value) if isinstance(value, list | tuple) else [value]
        # A label that passed through a table with gaps is read so.
        texts = [str(int(name)) if isinstance(name, float) and name.is_integer() else name for name in names]
        return texts if isinstance(value, list | tuple) else texts[0]

    @field_validator("chat_template")
    @classmethod
    def _jinja(cls, value: str | None) -> str | None:
        if value is not None and not value.endswith(".jinja"):
            raise ValueError("must be a file whose name ends with .jinja")
        return value

    @field_validator("chat_template_kwargs")
    @classmethod
    def _of_the_template(cls, value: Pairs | None) -> Pairs | None:
        for key, _ in value or ():
            if key in RENDERED:
                raise ValueError(f"'{key}' is not for a user to give")
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
        generates = TASK_FACTS[self.task].generates
        if self.metric not in self.available_metrics:
            # A right name in the wrong place needs the list, not a guess at another name.
            known = self.metric in {EXACT_MATCH, *(name for facts in TASK_FACTS.values() for name in facts.metrics)}
            allowed = f"allowed: {', '.join(sorted(self.available_metrics))}"
            hint = allowed if known else nearest(self.metric, self.available_metrics)
            if self.metric == EXACT_MATCH and generates:
                hint = "it needs predict_with_generate: true"
            if self.metric == SHARPNESS:
                hint = "it needs sharpness_radius"
            raise ValueError(f"metric: '{self.metric}' is not measured here; {hint}")
        if self.predict_with_generate and not generates:
            raise ValueError(f"predict_with_generate: {self.task} generates no text")
        if self.early_stopping_threshold and self.early_stopping_patience is None:
            raise ValueError("early_stopping_threshold: needs early_stopping_patience")
        if self.format is not None:
            self._check_format(generates)
        if self.test_revision is not None and self.test_data is None:
            raise ValueError("test_revision: is of test_data, which is absent; train_revision is of train_data")
        if self.class_weights is not None and not TASK_FACTS[self.task].has_classes:
            allowed = ", ".join(task for task, facts in TASK_FACTS.items() if facts.has_classes)
            raise ValueError(f"class_weights: {self.task} has no classes to weigh; allowed with {allowed}")
        if self.method == "bilora" and self.ascent != "adamw":
            self._check_ascent()
        if self.quantization is not None and self.method in NOISY and self.rwp_space == "weight":
            raise ValueError(f"quantization: {self.method} has noise on the full weight, which must not be quantised")
        if self.quantization is not None and self.leaves_model:
            raise ValueError(f"quantization: method {self.method} trains the weights, which must not be quantised")
        self._check_primary()
        if self.label_names is not None and len(set(self.label_names)) < max(2, len(self.label_names)):
            raise ValueError("label_names: needs two or more different names")
        if self.label_names is not None:
            self.check_f1(self.label_names)
        return self

    def _check_primary(self) -> None:
        """ValueError unless the method is one of this primary."""
        if self.primary == "dora" and self.method in NOISY and self.rwp_space == "weight":
            allowed = ", ".join(name for name in get_args(Primary) if name != "dora")
            why = f"{self.method} has noise on the sum of W0 and LoRA, and dora is another function of them"
            raise ValueError(f"primary: {why}; allowed: {allowed}")
        if self.primary == "dora" and self.quantization == "int8":
            raise ValueError("quantization: the norms of a dora are of weights that int8 does not let be read; use nf4")

        if self.primary in STARTING and self.quantization is not None:
            raise ValueError(f"quantization: {self.primary} begins with weights as they are, not with quantised ones")

    def check_f1(self, label_names: Sequence[str]) -> None:
        """ValueError unless there is an `eval_f1` of these labels."""
        if self.positive_label is not None and self.positive_label not in label_names:
            hint = nearest(self.positive_label, label_names)
            raise ValueError(f"positive_label: '{self.positive_label}' is not among the labels; {hint}")
        if self.f1_average == "binary" and self.positive_label is None and len(label_names) > 2:
            raise ValueError(f"f1_average: binary is of one of {len(label_names)} labels; positive_label says of which")

    def _check_ascent(self) -> None:
        if self.clip != "global":
            raise ValueError(f"clip: ascent {self.ascent} has norm rho over all layers; allowed: global")
        if self.auxiliary_learning_rate is not None:
            raise ValueError(f"auxiliary_learning_rate: ascent {self.ascent} has none; allowed with ascent: adamw")

    def _check_format(self, generates: bool) -> None:
        if not generates:
            raise ValueError(f"format: {self.task} has no prompts")
        chats = self.format in CHAT_COLUMNS
        named = (self.messages_column and "messages_column") or ("prompt_template" if self.has_templates else None)
        if named and (self.format == "alpaca" or chats is not (named == "messages_column")):
            raise ValueError(f"format: {self.format} and {named} exclude each other; leave one out")

    @property
    def has_templates(self) -> bool:
        """Whether a template of the rows is other than by default."""
        return (self.prompt_template, self.completion_template) != (PROMPT_TEMPLATE, COMPLETION_TEMPLATE)

    @property
    def chat_column(self) -> str | None:
        """The column of chat messages, by its own setting or by `format`; None: the rows are no chats."""
        return self.messages_column or CHAT_COLUMNS.get(self.format or "")

    @property
    def available_metrics(self) -> tuple[str, ...]:
        """Names of the metrics that an evaluation of this trial reports."""
        facts = TASK_FACTS[self.task]
        metrics = facts.metrics
        if self.predict_with_generate and facts.generates:
            metrics += (EXACT_MATCH,) + (LABEL_METRICS if self.label_names else ())
        return metrics if self.sharpness_radius is None else (*metrics, SHARPNESS)

    @property
    def objective(self) -> Objective:
        """What the trial is judged by."""
        return objective(self.metric)

    @property
    def has_test(self) -> bool:
        """Whether rows are named to score a winner on."""
        return self.test_data is not None or self.test_split is not None

    def on_test(self) -> TrialConfig:
        """These settings, as those of an evaluation whose validation rows are the test rows, all of them."""
        revision = self.train_revision if self.test_data is None else self.test_revision
        name, split = self.test_data or self.train_data, self.test_split or "test"
        named = {
            f"{of}_{what}": value
            for of in ("train", "validation")
            for what, value in zip(("data", "split", "revision"), (name, split, revision), strict=True)
        }
        unused = {"max_eval_samples": None, "max_train_samples": None}
        return self.model_copy(update={**named, **unused, **dict.fromkeys(TEST_SETTINGS)})

    @property
    def writes_several(self) -> bool:
        """Whether prompts are padded, since several texts are written at once."""
        return (self.per_device_generation_batch_size or self.per_device_eval_batch_size) > 1

    def step_rows(self, workers: int) -> int:
        """Training rows of one optimizer step of so many workers."""
        return workers * self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def leaves_model(self) -> bool:
        """Whether the trial trains the base model itself, and leaves a model and no adapter."""
        return self.method in WHOLE

    @property
    def whole_only(self) -> str | None:
        """Why each worker must have all of the model, and no part of it; None if it need not."""
        if self.quantization is not None:
            return "quantization: quantised weights cannot be cut into parts; use parallelism: ddp"
        if self.torch_compile:
            return "torch_compile: blocks that are cut into parts are not compiled; use parallelism: ddp"
        if self.sharpness_radius is not None:
            return "sharpness_radius: sharpness is not measured of a model in parts; use parallelism: ddp"
        if self.primary in STARTING:
            return f"primary: {self.primary} begins with whole weights, not with parts of them; use parallelism: ddp"
        if self.method in NOISY:
            return f"method: {self.method} has noise on whole weights, not on parts of them; use parallelism: ddp"
        if self.leaves_model:
            return f"method: {self.method} is not trained in parts; use parallelism: ddp"
        return None

    @property
    def resolved_split_seed(self) -> int:
        """`split_seed`, or `seed`. Trials with one of their own, and several seeds, are compared on the same rows."""
        return self.seed if self.split_seed is None else self.split_seed

    @property
    def exported_rank(self) -> int:
        """The rank of the adapter that leaves training."""
        return 2 * self.rank if self.primary in STARTING else self.rank

    @property
    def resolved_lora_alpha(self) -> float:
        """`lora_alpha`, or the paper's 2 x rank."""
        return 2.0 * self.rank if self.lora_alpha is None else self.lora_alpha


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
