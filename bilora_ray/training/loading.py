"""What a trial learns from, ready to be batched, and kept for the next trial of the process.

Tokenizing takes some tenths of a millisecond a row, a minute of a large data set, and the trials of a search mostly
differ in what does not touch it. What comes of a source that is too large for the memory is in a file beside the
trials' folders instead, for the trials of all processes.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial, reduce
from itertools import islice
from operator import or_
from pathlib import Path
from typing import Any

import tokenizers
import transformers
from transformers import PreTrainedTokenizerBase

from bilora_ray import __version__
from bilora_ray.config import TEST_SETTINGS, TrialConfig
from bilora_ray.errors import UserError
from bilora_ray.files import temporary_folder
from bilora_ray.settings import deciding
from bilora_ray.training.data.cache import Stored, Writer, cached
from bilora_ray.training.data.sources import Source, stamps_of
from bilora_ray.training.data.truncation import Truncation
from bilora_ray.training.model import load_processor
from bilora_ray.training.rows import read_sources, rows_of
from bilora_ray.training.tasks import TASKS
from bilora_ray.training.tasks.base import Cut, Dataset, Example, Row

# All settings but these decide the examples, or could.
NOT_OF_EXAMPLES = {*deciding("training", "memory"), *TEST_SETTINGS}
WITHOUT_EFFECT = {key: TrialConfig.model_fields[key].default for key in NOT_OF_EXAMPLES}

# Rows tokenized at one time: enough to be fast, few enough that Python's int lists stay small.
CHUNK = 1000

SPLITS = ("train", "validation")
FACTS_FILE = "facts.json"
# Of what is in the folder of large sources' examples: another one is another key.
FORMAT = 1

_kept: dict[tuple[object, ...], Loaded] = {}


@dataclass(frozen=True)
class Prepared:
    """The examples of a trial, and what truncation did, by split: `train` and `validation`.

    Attributes:
        notes: lines about what is allowed and yet seldom meant, and that only the tokenizer shows.
    """

    train: Sequence[Example]
    validation: Sequence[Example]
    truncation: dict[str, Truncation]
    notes: tuple[str, ...]

    @classmethod
    def of(
        cls, examples: Mapping[str, Sequence[Example]], truncation: dict[str, Truncation], notes: tuple[str, ...]
    ) -> Prepared:
        """From `examples` by split; one that is not there is empty."""
        return cls(examples.get("train", ()), examples.get("validation", ()), truncation, notes)


@dataclass(frozen=True)
class Loaded(Prepared):
    """The examples of a trial, with what made them.

    Attributes:
        tokenizer: the base model's, or its image processor.
        label_names: names by label index; None where the task has no labels.
        digests: what identifies the data, by setting: see `base.Dataset`.
        format: what the columns mean, named or found.
    """

    tokenizer: PreTrainedTokenizerBase
    label_names: tuple[str, ...] | None
    digests: Mapping[str, str]
    format: str | None


def load_data(
    config: TrialConfig, shared: Path | None = None, beginning: bool = False, splits: tuple[str, ...] = SPLITS
) -> Loaded:
    """Read, check and tokenize the rows; or what was loaded last, if it would be the same.

    Args:
        config: the settings.
        shared: a folder for the examples of large sources, which all trials that read the same share; None: they are
            in temporary files, for this process.
        beginning: take the first `sources.BEGINNING` rows of a large source only.
        splits: which to tokenize; the other one is empty.

    Raises:
        UserError: the data or the tokenizer are not as the settings say.
        OSError: the examples cannot be written or read again; it names a file.
    """
    # Of the two seeds one decides them.
    decisive = config.model_copy(update={**WITHOUT_EFFECT, "seed": 0, "split_seed": config.resolved_split_seed})
    sources = (config.train_data, config.validation_data, config.chat_template)
    key = (decisive, beginning, splits, *(stamps_of(source, config) for source in sources))
    if key not in _kept:
        _kept.clear()  # before there is another: they may be large
        _kept[key] = _load(decisive, shared, beginning, splits)
    return _kept[key]


def _load(config: TrialConfig, shared: Path | None, beginning: bool, splits: tuple[str, ...]) -> Loaded:
    sources = read_sources(config, beginning)
    if any(source.is_large for source in sources.values()):
        return _load_large(sources, config, shared, splits)
    rows = rows_of(sources, config)
    tokenizer = load_processor(config)
    prepared = prepare(rows, config, tokenizer, splits)
    return Loaded(
        **vars(prepared),
        tokenizer=tokenizer,
        label_names=rows.label_names,
        digests=rows.digests,
        format=rows.format,
    )


def _load_large(
    sources: Mapping[str, Source], config: TrialConfig, shared: Path | None, splits: tuple[str, ...]
) -> Loaded:
    tokenizer = load_processor(config)
    write = partial(_write, sources=sources, config=config, tokenizer=tokenizer, splits=splits)
    if shared is not None:
        found = _read(cached(shared, _key(sources, config, tokenizer, splits), write))
    else:
        with temporary_folder() as folder:
            write(folder)
            found = _read(folder)  # files that are open outlive their names
    digests = {setting: source.digest for setting, source in sources.items()}
    return Loaded(**found, tokenizer=tokenizer, digests=digests)


def _write(
    folder: Path,
    sources: Mapping[str, Source],
    config: TrialConfig,
    tokenizer: PreTrainedTokenizerBase,
    splits: tuple[str, ...],
) -> None:
    """As `prepare`, into files of `folder`."""
    rows = rows_of(sources, config)
    with ExitStack() as open_files:
        writers = {split: open_files.enter_context(Writer(folder / f"{split}.arrow", Example)) for split in splits}
        truncation, notes = _filled(writers, rows, config, tokenizer)
    counts = {split: asdict(found) for split, found in truncation.items()}
    facts = {"truncation": counts, "notes": notes, "label_names": rows.label_names, "format": rows.format}
    (folder / FACTS_FILE).write_text(json.dumps(facts), encoding="utf-8")


def _read(folder: Path) -> dict[str, Any]:
    """What `_write` has written, as arguments of `Loaded`."""
    facts = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
    truncation = {split: Truncation(**counts) for split, counts in facts["truncation"].items()}
    examples = {split: Stored(folder / f"{split}.arrow", Example) for split in truncation}
    names = None if facts["label_names"] is None else tuple(facts["label_names"])
    prepared = Prepared.of(examples, truncation, tuple(facts["notes"]))
    return {**vars(prepared), "label_names": names, "format": facts["format"]}


def _key(
    sources: Mapping[str, Source], config: TrialConfig, tokenizer: PreTrainedTokenizerBase, splits: tuple[str, ...]
) -> str:
    """What decides the examples: the content of the data and of the tokenizer, the settings, and the code."""
    with temporary_folder() as folder:
        tokenizer.save_pretrained(folder)
        files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    versions = (__version__, tokenizers.__version__, transformers.__version__)
    digests = {setting: source.digest for setting, source in sources.items()}
    everything = [FORMAT, versions, splits, config.model_dump(mode="json"), digests, files]
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()[:32]


def prepare(
    dataset: Dataset, config: TrialConfig, tokenizer: PreTrainedTokenizerBase, splits: tuple[str, ...] = SPLITS
) -> Prepared:
    """Tokenize all rows; the task's file says what happens to those longer than `max_length`.

    Validation examples keep their prompts, from which a text can be generated.

    Raises:
        UserError: the tokenizer lacks what the task needs, or a row or a split has nothing to predict.
    """
    examples: dict[str, list[Example]] = {split: [] for split in splits}
    return Prepared.of(examples, *_filled(examples, dataset, config, tokenizer))


def _filled(
    examples: Mapping[str, list[Example] | Writer[Example]],
    dataset: Dataset,
    config: TrialConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[dict[str, Truncation], tuple[str, ...]]:
    """Add to `examples`, by split; what truncation did, by split, and what only the tokenizer shows."""
    config = config.model_copy(update={"format": dataset.format or config.format})
    truncation = {
        split: _encode(getattr(dataset, split), config, tokenizer, split, found) for split, found in examples.items()
    }
    told = list(TASKS[config.task].tokenizer_notes(dataset, config, tokenizer))
    if "train" in examples:
        told = [*_several(len(dataset.train), len(examples["train"]), config), *told]
    return truncation, tuple(told)


def _several(chats: int, examples: int, config: TrialConfig) -> Iterator[str]:
    if examples > chats:
        setting = "format" if config.messages_column is None else "messages_column"
        yield (
            f"{setting}: {chats} chats are {examples} training rows, one for each turn of the assistant, for the chat "
            "template writes a turn otherwise once others follow"
        )


def _encode(
    rows: Collection[Row],
    config: TrialConfig,
    tokenizer: PreTrainedTokenizerBase,
    split: str,
    examples: list[Example] | Writer[Example],
) -> Truncation:
    """Add the examples of `rows` to `examples`."""
    task, keep_prompts = TASKS[config.task], split == "validation"
    kinds: Counter[Cut] = Counter()
    found = cut = 0
    for chunk in _chunks(rows):
        for row, encoded in zip(chunk, task.examples(chunk, config, tokenizer, keep_prompts), strict=True):
            for example, _ in encoded:
                _check_readable(example, row, config)
            kept = [(example, taken) for example, taken in encoded if task.target_count([example])]
            examples.extend(example for example, _ in kept)
            if kept:
                lost = reduce(or_, [taken for _, taken in kept])
                found, cut = found + 1, cut + bool(lost & ~Cut.ANSWER)
                kinds.update(lost)
    if not found:
        too_long = f"has max_length ({config.max_length}) tokens or less, and" if config.truncation == "drop" else "has"
        raise UserError(f"{split}_data: no row {too_long} a token to predict")
    return Truncation(
        rows=len(rows),
        cut=cut,
        dropped=len(rows) - found,
        prompt_gone=kinds[Cut.WHOLE_PROMPT],
        prompt_cut=kinds[Cut.PROMPT],
        completion_cut=kinds[Cut.COMPLETION],
        turns_cut=kinds[Cut.TURNS],
        answer_cut=kinds[Cut.ANSWER],
    )


def _chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    remaining = iter(rows)
    while chunk := list(islice(remaining, CHUNK)):
        yield chunk


def _check_readable(example: Example, row: Row, config: TrialConfig) -> None:
    asked = example.prompt_ids if config.predict_with_generate else None
    if not example.length or (asked is not None and not asked):
        raise UserError(f"{row.where}: there is no text to read")
