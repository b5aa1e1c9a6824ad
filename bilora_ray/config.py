"""One trial's settings: flat, typed, strict. A setting is declared here and nowhere else.

The same key is used in a space file, by Optuna, Tune and MLflow, and in code. Names are those of PEFT and
transformers where they have one, and the Bi-LoRA paper's (arXiv 2508.19564) otherwise. Nothing here imports
torch, so that `bilora-ray validate` is instant.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from typing import Any, Literal, get_args

from pydantic import field_validator, model_validator

from bilora_ray.checking import Float, Int, Pairs, Settings
from bilora_ray.errors import nearest
from bilora_ray.facts import ADAPTING, NOISY, STARTING, WHOLE, MethodName, Primary, setting
from bilora_ray.measures import EXACT_MATCH, LABEL_METRICS, SHARPNESS, TASK_FACTS, Task, objective
from bilora_ray.records import Objective

# Kernels of attention. Of those of the Hub, which are code, the ones that transformers' authors keep.
KERNELS = ("eager", "sdpa", "varlen", "flash_attention_2", "flash_attention_3")
HUB_KERNEL = re.compile(r"kernels-community/[\w.-]+(@[\w.-]+)?(:[\w.-]+)?")
# Those that a file is likely to have: any other that Python knows is taken too.
ENCODINGS = ("utf-8", "utf-16", "cp1250", "cp1251", "cp1252", "iso-8859-1", "mac-roman", "gb18030", "big5", "shift_jis")

PROMPT_TEMPLATE, COMPLETION_TEMPLATE = "{prompt}", "{completion}"
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


class TrialConfig(Settings):
    """All that decides what one training run computes. See each field's description."""

    # Model
    model_name_or_path: str = setting(
        ...,
        "Hub id, local folder, or builtin:NAME",
        min_length=1,
        decides="model",
        source="model",
        revision="model_revision",
        rehearsed=True,
    )
    model_revision: str | None = setting(None, "Hub revision (branch, tag or commit)", decides="model")
    trust_remote_code: bool = setting(False, "run model code that comes from the Hub", decides="model", searched=False)
    task: Task = setting(..., "what is learned", decides="model", searched=False)
    precision: Literal["auto", "fp32", "bf16"] = setting(
        "auto",
        "base weights and activations; adapters stay fp32, and the masters of full. auto: bf16 on GPUs that have it, "
        "decided once a study",
        decides="memory",
        shown=("card",),
        before="fp32",
    )
    quantization: Literal["nf4", "int8"] | None = setting(
        None,
        "of the frozen base weights (QLoRA); needs bitsandbytes",
        decides="memory",
        rehearsed=True,
        shown=("card",),
    )
    attn_implementation: str | None = setting(
        None,
        "attention kernel: eager, sdpa, or one that needs no padding: varlen (torch's own), flash_attention_2, "
        "flash_attention_3, kernels-community/NAME; transformers chooses when absent",
        decides="memory",
        rehearsed=True,
    )

    # Data
    train_data: str = setting(
        ...,
        "local file, folder or pattern of files, Hub dataset, or builtin:NAME",
        min_length=1,
        decides="rows",
        searched=True,
        holds_out=True,
        source="data",
        revision="train_revision",
    )
    validation_data: str | None = setting(
        None,
        "as train_data; without it and validation_split, rows are split off by split_seed",
        decides="rows",
        holds_out=True,
        source="data",
        revision="validation_revision",
    )
    validation_fraction: Float = setting(
        0.1, "share of train_data held out when it is split", gt=0, lt=1, decides="rows", holds_out=True
    )
    dataset_config_name: str | None = setting(
        None, "configuration of a Hub dataset, such as sst2", decides="rows", holds_out=True
    )
    train_split: str = setting("train", "split of a Hub dataset to train on", decides="rows", holds_out=True)
    train_revision: str | None = setting(
        None, "Hub revision of train_data (branch, tag or commit)", decides="rows", holds_out=True
    )
    validation_split: str | None = setting(
        None, "split of a Hub dataset to validate on", decides="rows", holds_out=True
    )
    validation_revision: str | None = setting(None, "Hub revision of validation_data", decides="rows", holds_out=True)
    test_data: str | None = setting(
        None,
        "as train_data: rows that the winner of study.finalists is scored on once, after all is decided",
        decides="evaluation",
        source="data",
        revision="test_revision",
    )
    test_split: str | None = setting(
        None,
        "split of a Hub dataset with those rows, of train_data where test_data is absent; test when absent",
        decides="evaluation",
    )
    test_revision: str | None = setting(None, "Hub revision of test_data", decides="evaluation")
    retention_data: str | None = setting(
        None,
        "local file of plain texts in text_column: where an adapter is scored on test rows, forgetting is by how much "
        "its loss on each next token of them is above the base model's",
        decides="evaluation",
        source="data",
    )
    column_names: tuple[str, ...] | None = setting(
        None, "columns of a CSV or TSV file without a header", decides="rows", holds_out=True
    )
    delimiter: str | None = setting(
        None, "character between a table's cells; found by looking when absent", decides="rows", holds_out=True
    )
    quoting: Literal["none", "csv", "by-suffix"] | None = setting(
        None,
        "whether a table's quotes mean themselves, or are CSV's; tables between tabs are looked at when absent; "
        "by-suffix: csv in .csv, none in .tsv, and no look at the delimiter",
        decides="rows",
        holds_out=True,
        before="by-suffix",
    )
    encoding: str | None = setting(
        None,
        "of text files, such as cp1252; when absent UTF-8, or what the byte order mark says",
        decides="rows",
        holds_out=True,
    )
    field: str | None = setting(None, "key of a JSON file that holds the rows", decides="rows", holds_out=True)
    prompt_template: str = setting(
        PROMPT_TEMPLATE, "prompt of a row; {name} is a column", decides="rows", searched=True
    )
    completion_template: str = setting(COMPLETION_TEMPLATE, "completion of a row; {name} is a column", decides="rows")
    messages_column: str | None = setting(
        None, "column of chat messages, used instead of the templates", decides="rows"
    )
    format: Literal["alpaca", "sharegpt", "openai", "completion"] | None = setting(
        None, "what the columns mean; found by their names when neither templates nor chats are named", decides="rows"
    )
    tools_column: str | None = setting(None, "column of the tools that a chat may call, as JSON", decides="rows")
    system_prompt: str | None = setting(None, "system turn of the chats that have none", min_length=1, decides="rows")
    train_on: Literal["all", "last"] = setting("all", "turns of the assistant that are learned", decides="rows")
    chat_template: str | None = setting(
        None,
        "Jinja file, instead of the tokenizer's own chat template",
        min_length=1,
        decides="rows",
        source="template",
    )
    chat_template_kwargs: Pairs | None = setting(
        None, "what the chat template is told, such as {enable_thinking: false}", decides="rows"
    )
    text_column: str = setting(
        "text", "the text, where a task reads one; token-classification: the list of words", decides="rows"
    )
    text_pair_column: str | None = setting(None, "the second text, if there is one", decides="rows")
    image_column: str = setting(
        "image",
        "image-classification: the image, or the path of its file, relative to the data file",
        decides="rows",
    )
    label_column: str = setting(
        "label", "column of the label; token-classification: the list of tags, one a word", decides="rows"
    )
    label_names: tuple[str, ...] | None = setting(
        None, "labels in order; found in train_data when absent", decides="rows"
    )
    label_delimiter: str = setting(
        ",", "multi-label-classification: between the labels of a text", min_length=1, decides="rows"
    )
    check_labels: bool = setting(
        True,
        "refuse what is no label as a rule: -1 beside labels from 0 on, and false on an answer to learn",
        decides="rows",
        before=False,
    )
    class_weights: Literal["balanced"] | None = setting(
        None,
        "balanced: each label counts alike in the training loss, however many rows it has; eval_loss stays unweighted",
        decides="training",
        shown=("card",),
    )
    f1_average: Literal["binary", "macro", "micro", "weighted"] | None = setting(
        None,
        "which mean eval_f1 is; absent: binary of two labels, macro of more, micro of sets",
        decides="evaluation",
    )
    positive_label: str | None = setting(
        None, "the label that a binary eval_f1 is of; the second one when absent", decides="evaluation"
    )
    stratify: bool = setting(
        True,
        "rows held out or drawn have each label's share; false: at random, max_eval_samples: the first ones",
        decides="rows",
        holds_out=True,
        before=False,
    )
    max_length: Int = setting(512, "tokens a row keeps at the most", ge=4, decides="rows")
    truncation: Literal["prompt-first", "completion-first", "both", "drop"] = setting(
        "both",
        "of a row that is too long: the prompt or the completion is kept as far as possible, both keep a share, or the "
        "row is left out",
        decides="rows",
        before="completion-first",
    )
    src_lang: str | None = setting(
        None, "seq2seq-lm: language code of the prompts, for tokenizers that write one", decides="rows"
    )
    tgt_lang: str | None = setting(None, "seq2seq-lm: language code of the completions, likewise", decides="rows")
    max_train_samples: Int | None = setting(
        None, "train on this many rows, drawn by split_seed", ge=1, decides="training rows"
    )
    max_eval_samples: Int | None = setting(
        None, "validate on this many rows, drawn by split_seed", ge=1, decides="rows"
    )
    split_seed: Int | None = setting(
        None,
        "of the held-out rows and of those that max_train_samples and max_eval_samples draw; seed when absent",
        ge=0,
        lt=2**32,
        decides="rows",
        searched=True,
        holds_out=True,
        shown=("card",),
    )

    # Method
    variant: str | None = setting(
        None,
        "what a comparison calls the settings: a name, which decides nothing",
        min_length=1,
        decides="training",
    )
    method: MethodName = setting(
        "bilora",
        "how the adapter is trained; full: all of the base model is, and there is no adapter",
        decides="training",
        shown=("best",),
    )
    primary: Primary = setting(
        "lora",
        "what the primary adapter is: plain LoRA; dora: LoRA of the weight's direction, beside a magnitude of each of "
        "its rows; rslora: LoRA with s = lora_alpha / sqrt(rank); pissa: LoRA that begins with the greatest singular "
        "values of the weight; lora-ga: with the directions of its gradient. The last two are exported with twice the "
        "rank",
        decides="training",
        of=ADAPTING,
        rehearsed=True,
        shown=("card",),
    )
    rank: Int = setting(8, "r of the primary adapter", ge=1, decides="training", of=ADAPTING, shown=("card", "best"))
    lora_alpha: Float | None = setting(
        None, "2 x rank when absent", gt=0, decides="training", of=ADAPTING, shown=("card",)
    )
    lora_dropout: Float = setting(
        0.0, "dropout on the primary adapter's input", ge=0, lt=1, decides="training", of=ADAPTING, amid=True
    )
    target_modules: str | tuple[str, ...] = setting(
        "all-linear",
        "modules that get an adapter",
        decides="training",
        of=ADAPTING,
        rehearsed=True,
        shown=("card",),
    )
    rho: Float = setting(
        0.05,
        "radius of the perturbation, over all layers: of the auxiliary's effective weight change, Frobenius norm "
        "(bilora, dual-lora); of the primary's factors (lora-sam, looksam, esam). With a bf16 base and steps of few "
        "rows 0.2 or more of the auxiliary's outlasts the rounding. flat-lora, rwp: of noise, as a share of its row's",
        gt=0,
        decides="training",
        of=("bilora", "dual-lora", "lora-sam", "looksam", "esam", "flat-lora", "rwp"),
        amid=True,
        shown=("card", "best"),
    )
    auxiliary_rank: Int = setting(
        8,
        "r of the auxiliary adapter",
        ge=1,
        decides="training",
        of=("bilora", "dual-lora"),
        shown=("card", "best"),
    )
    auxiliary_learning_rate: Float | None = setting(
        None,
        "learning_rate when absent",
        gt=0,
        decides="training",
        of=("bilora", "dual-lora"),
        amid=True,
        shown=("card",),
    )
    clip: Literal["global", "per-layer", "none"] = setting(
        "global",
        "what is clipped to rho: the auxiliary over all layers, each layer by itself, nothing",
        decides="training",
        of=("bilora",),
        amid=True,
        shown=("card",),
    )
    norm: Literal["effective", "unscaled"] = setting(
        "effective",
        "what rho is the norm of: s2 B2 A2, or B2 A2 as the paper writes it",
        decides="training",
        of=("bilora",),
        shown=("card",),
    )
    ascent: Literal["adamw", "tangent", "half-step"] = setting(
        "adamw",
        "how the auxiliary goes up the loss: by AdamW, as in the paper; or anew in each step, of norm rho, as the "
        "gradient's projection on the tangent space of the adapters (tangent) or on a span of its own (half-step)",
        decides="training",
        of=("bilora",),
        amid=True,
        shown=("card", "best"),
    )
    looksam_every: Int = setting(
        5, "each so many-th step is one of SAM", ge=1, decides="training", of=("looksam",), amid=True, shown=("card",)
    )
    looksam_alpha: Float = setting(
        0.7,
        "share of SAM's direction in the steps between",
        gt=0,
        decides="training",
        of=("looksam",),
        amid=True,
        shown=("card",),
    )
    esam_beta: Float = setting(
        0.5,
        "share of the factors that are perturbed",
        gt=0,
        le=1,
        decides="training",
        of=("esam",),
        amid=True,
        shown=("card",),
    )
    esam_gamma: Float = setting(
        0.5,
        "share of a step's rows, those whose loss the perturbation raises most, that the update is of",
        gt=0,
        le=1,
        decides="training",
        of=("esam",),
        amid=True,
        shown=("card",),
    )
    bar_alpha: Float = setting(
        0.25,
        "coefficient of the regularization at the first step; falls to 0 over the training",
        gt=0,
        decides="training",
        of=("nbar", "obar"),
        amid=True,
        shown=("card",),
    )
    rwp_space: Literal["weight", "lora"] = setting(
        "weight",
        "what has the noise: the full weight, or A1 and B1",
        decides="training",
        of=("rwp",),
        amid=True,
        shown=("card",),
    )

    # Optimisation
    learning_rate: Float = setting(
        5e-4,
        "peak learning rate of the primary adapter; of full, all weights': a tenth of an adapter's or less as a rule",
        gt=0,
        decides="training",
        amid=True,
        shown=("card", "best"),
    )
    weight_decay: Float = setting(
        0.0, "AdamW weight decay of the primary adapter; of full, of all weights", ge=0, decides="training", amid=True
    )
    max_grad_norm: Float | None = setting(
        1.0, "gradient norm limit, per branch; null: none", gt=0, decides="training", amid=True
    )
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = setting(
        "cosine", "course of the learning rate over the steps", decides="training", amid=True
    )
    warmup_ratio: Float = setting(
        0.03, "share of steps with rising learning rate", ge=0, lt=1, decides="training", amid=True
    )
    num_train_epochs: Float = setting(3.0, "passes over the training rows", gt=0, decides="training", shown=("card",))
    max_steps: Int | None = setting(
        None, "optimizer steps, instead of num_train_epochs", ge=1, decides="training", shown=("card",)
    )
    per_device_train_batch_size: Int = setting(
        8,
        "rows of one forward pass that are as long as the longest of the step; of shorter ones it takes more. A step "
        "has this x gradient_accumulation_steps x workers rows",
        ge=1,
        decides="training",
        shown=("card",),
    )
    per_device_eval_batch_size: Int = setting(
        32,
        "rows of one evaluation pass that are as long as the longest of all; of shorter ones it takes more; 1: each "
        "row by itself",
        ge=1,
        decides="memory",
    )
    per_device_generation_batch_size: Int | None = setting(
        None,
        "texts that are written at once; absent: as many as there is memory for, and one where an evaluation pass has "
        "one row",
        ge=1,
        decides="memory",
    )
    gradient_accumulation_steps: Int = setting(
        1,
        "how many times per_device_train_batch_size rows each worker has in an optimizer step; how many passes they "
        "take depends on their lengths",
        ge=1,
        decides="training",
        shown=("card",),
    )
    tokens_per_pass: Int | None = setting(
        None,
        "positions of one forward pass of training at the most, padding too, however many rows that is; absent: "
        "those of per_device_train_batch_size rows as long as the longest of the step",
        ge=1,
        decides="memory",
    )
    gradient_checkpointing: bool = setting(False, "recompute activations: less memory, more time", decides="training")
    torch_compile: bool = setting(
        False, "compile the blocks of the model: less time a step, after some minutes", decides="memory", rehearsed=True
    )
    seed: Int = setting(
        0,
        "of data order, initial weights, dropout and noise",
        ge=0,
        lt=2**32,
        decides="model",
        holds_out=True,
        shown=("card",),
    )

    # Evaluation
    metric: str = setting(
        "eval_loss", "what a trial is judged by; decides which checkpoint is kept", decides="training", searched=False
    )
    eval_steps: Float = setting(
        0.1, "steps between evaluations; below 1, a share of the training", gt=0, decides="training", searched=False
    )
    early_stopping_patience: Int | None = setting(
        None,
        "evaluations in a row without a better metric that end a trial by itself, complete with its best adapter",
        ge=1,
        decides="training",
    )
    early_stopping_threshold: Float = setting(
        0.0, "how much better the metric must be for early_stopping_patience to begin anew", ge=0, decides="training"
    )
    predict_with_generate: bool = setting(False, "generate text and measure eval_exact_match", decides="evaluation")
    max_new_tokens: Int = setting(64, "length of generated text", ge=1, decides="evaluation")
    answer_pattern: str | None = setting(
        None, "regular expression whose group 1 is the answer in a text", decides="evaluation"
    )
    sharpness_radius: Float | None = setting(
        None,
        "measure sharpness, the rise of eval_loss when all adapted weights move along its gradient by this norm. Where "
        "no text is generated, an evaluation takes six times as long; those weights in fp32 are in main memory then",
        gt=0,
        decides="evaluation",
    )

    adversary_steps: Int | None = setting(
        None,
        "steps between looks at how adversarial the perturbation of bilora, dual-lora, lora-sam, looksam or esam is, "
        "told by the next evaluation; 0: never. A look takes as long as ten steps, and twice the adapted weights "
        "in fp32 are in main memory then. Absent: 1000, of 268 million adapted weights at the most",
        ge=0,
        decides="evaluation",
    )

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
