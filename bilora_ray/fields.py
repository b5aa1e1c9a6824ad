"""The settings of one trial, flat and typed, each with all that is known of it: declared here and nowhere else.

The same key is used in a space file, by Optuna, Tune and MLflow, and in code. Names are those of PEFT and
transformers where they have one, and the Bi-LoRA paper's (arXiv 2508.19564) otherwise. Nothing here imports
torch, so that `bilora-ray validate` is instant.
"""

from __future__ import annotations

from typing import Literal

from bilora_ray.checking import Float, Int, Pairs, Settings
from bilora_ray.facts import ADAPTING, MethodName, Primary, setting
from bilora_ray.measures import Task

PROMPT_TEMPLATE, COMPLETION_TEMPLATE = "{prompt}", "{completion}"


class TrialFields(Settings):
    """Each setting by itself: its type, its limits and its facts. `config.TrialConfig` are those that go together."""

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
        "local file of plain texts in text_column: where what was trained is scored on test rows, forgetting is by how "
        "much its loss on each next token of them is above the base model's",
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
