"""What can be known to be wrong before a search starts: the data's rows and the model's name."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import inf
from pathlib import Path
from typing import Any

from bilora_ray import checking
from bilora_ray.config import TrialConfig
from bilora_ray.digests import BASE, CHAT_TEMPLATE, of_base, of_template, source_of
from bilora_ray.errors import UserError, first_line
from bilora_ray.measures import TASK_FACTS
from bilora_ray.paths import COMMIT, cached_commit, kind_of, model_file
from bilora_ray.search.space import SEEDS, Space, StudyConfig
from bilora_ray.search.space.sense import without_effect
from bilora_ray.search.space_file import check_draw
from bilora_ray.search.study.layout import Layout
from bilora_ray.settings import REVISIONS, SOURCES
from bilora_ray.training.rows import about, check_first_rows, load_rows, notes, read_retained, shared_with
from bilora_ray.training.tasks import TASKS
from bilora_ray.training.tasks.base import Dataset, check_positions

HUB_TIMEOUT_S = 10
# Is decided when a study begins, and stays so.
AUTO = ("precision", "auto")
# The samplers that can search any space.
SEARCH_ALL = frozenset({"tpe", "random", "qmc"})
# What `config.json` calls the positions of some kinds of models, which transformers has another name for.
POSITIONS = {
    "codegen": "n_positions",
    "ctrl": "n_positions",
    "dbrx": "max_seq_len",
    "gpt2": "n_positions",
    "gpt_bigcode": "n_positions",
    "gptj": "n_positions",
    "openai-gpt": "n_positions",
}
# Kinds of models whose positions begin behind the padding token's id.
BEHIND_PADDING = frozenset(
    {
        "camembert",
        "data2vec-text",
        "ibert",
        "longformer",
        "luke",
        "mpnet",
        "roberta",
        "roberta-prelayernorm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    }
)


@dataclass(frozen=True)
class Checked:
    """What a search is about to use.

    Attributes:
        digests: source -> digest of its content, of data and base models: see `digests.source_of`.
        labels: lines about the labels, if there are any.
        notes: lines about what is allowed and yet seldom meant.
        config: settings of a trial, the first.
        rows: those of that trial.
        test_rows: how many are scored on once; None where the space names none, or a dry run has not counted them.
    """

    digests: dict[str, str]
    labels: tuple[str, ...]
    notes: tuple[str, ...]
    config: TrialConfig
    rows: Dataset
    test_rows: int | None = None


def preflight(space: Space, dry_run: bool = False) -> Checked:
    """Read and check the data and look for the models, with the space's first settings.

    Args:
        space: the space.
        dry_run: whether nothing is to start: then of large data the first rows will do.

    Raises:
        UserError: a file, row, column, label or model is not as the space says, or a row is too long for the model.
    """
    _check_sampler(space)
    _check_gain(space)
    config = space.first_config()
    for one in _models(space):
        check_model(one)
        check_positions(positions(one), one, TASKS[one.task].continues)
    rows = load_rows(config, beginning=dry_run)
    digests = _by_source(config, rows)
    for other in _choices(space, "train_data")[1:]:
        digests |= _by_source(other, load_rows(other, beginning=dry_run))
    for other in _choices(space, "prompt_template")[1:]:
        check_first_rows(other)
    _check_size(space, rows.label_names)
    digests |= _others(space)
    test = _test_rows(config, rows, dry_run) if config.has_test else None
    shared, test_rows = tuple[str, ...](), None
    if test is not None:
        test_rows = None if test.partial else len(test.validation)
        digests[source_of(config, "test_data")] = test.digests["validation_data"]
        shared = tuple(shared_with(test, rows))
    if config.retention_data is not None:
        digests[source_of(config, "retention_data")] = read_retained(config)[1]
    told = (
        *space.notes,
        *shared,
        *_unpinned(config),
        *_unlooked_at(space),
        *_beside_budgets(space.study),
        *_idle(space, rows),
        *_new_head(config, rows.label_names),
        *notes(rows, space.with_step(max), space.resources.workers),
    )
    return Checked(digests, tuple(about(rows, config)), told, config, rows, test_rows)


def _idle(space: Space, rows: Dataset) -> Iterator[str]:
    """What is without effect in a trial of so many rows, and is not known without them."""
    count = None if rows.partial else len(rows.train)
    yield from (line for line in without_effect(space, count) if line not in space.notes)


def _beside_budgets(study: StudyConfig) -> tuple[str, ...]:
    """What finalists train after a search whose training is limited."""
    limits = [key for key in ("max_hours", "max_device_hours", "max_cost") if getattr(study, key) is not None]
    if not study.finalists or not limits:
        return ()
    trainings, verb = study.finalists * (study.finalist_seeds or SEEDS), "ends" if len(limits) == 1 else "end"
    more = f"then come {trainings} trainings of its finalists, each as long as a whole trial"
    return (f"{' and '.join(limits)} {verb} the search alone; {more}",)


def look(space: Space) -> None:
    """As `preflight`, in a moment: the first rows of files and a model of this machine; the Hub is not asked.

    Raises:
        UserError: what `preflight` would say too.
    """
    _check_sampler(space)
    _check_gain(space)
    check_draw(space)
    config = space.first_config()
    for one in _models(space):
        if kind_of(one.model_name_or_path, is_data=False) != "hub":
            check_model(one)
            check_positions(positions(one), one, TASKS[one.task].continues)
    for one in (config, *_choices(space, "train_data")[1:], *_choices(space, "prompt_template")[1:]):
        check_first_rows(one)


def _check_sampler(space: Space) -> None:
    if space.study.sampler in SEARCH_ALL:
        return
    # Late: it imports Optuna, which takes longer than all else that a look takes.
    from bilora_ray.search.study.samplers import check_sampler

    check_sampler(space)


def _check_gain(space: Space) -> None:
    """Refuse to end a search by a bound of what other settings promise where it would not see all of them."""
    if space.study.min_gain is None:
        return
    # Late, as above.
    from bilora_ray.search.study.samplers.base import conditional

    for key in conditional(space):
        why = f"the bound sees settings that every trial has, and trial.{key} some have not"
        raise UserError(f"{space.path}: study.min_gain: {why}; write target, or a budget of time")


def check_kernels(space: Space, apart: bool) -> None:
    """Refuse attention kernels that trials of this machine have not, before anything starts.

    Torch is imported only where such a kernel is asked for.

    Args:
        space: the space.
        apart: whether trials have processes of their own, with the GPUs that the resources say; else it is this one.

    Raises:
        UserError: a package or a GPU is missing, or a trial would compute in a precision that the kernel has not.
    """
    from bilora_ray.training.compute.varlen import is_looked_for, missing_package

    for one in _choices(space, "attn_implementation"):
        kernel = one.attn_implementation
        if kernel is None or not is_looked_for(kernel):
            continue
        needed = missing_package(kernel)
        if needed is None and apart and not space.resources.gpus_per_worker:
            needed = "a GPU, and resources.gpus_per_worker is 0"
        for precision in dict.fromkeys(choice.precision for choice in _choices(space, "precision")):
            needed = needed or _missing_of_gpus(kernel, precision, apart)
        if needed is not None:
            raise UserError(f"attn_implementation: {kernel} needs {needed}")


def _missing_of_gpus(kernel: str, precision: str, apart: bool) -> str | None:
    if apart:
        from bilora_ray.search.cluster.gpus import missing_here

        return missing_here(kernel, precision)
    from bilora_ray.training.compute.precision import missing

    return missing(kernel, precision)


def _check_size(space: Space, label_names: Sequence[str] | None) -> None:
    """Refuse a limit that no trial's adapter would keep to. It takes torch, and seconds, where there is a limit."""
    limit = space.study.max_adapter_mb
    if limit is None:
        return
    from bilora_ray.quiet import quiet

    quiet()
    from bilora_ray.training.rehearsal import least_adapter_mb

    least = space.with_end(min, lambda config: inf if config.leaves_model else config.rank)
    ends = product(_choices(space, "target_modules"), _choices(space, BASE))
    of_least = {"method": least.method, "rank": least.rank}
    configs = [other.model_copy(update={**of_least, "target_modules": one.target_modules}) for one, other in ends]
    size = min(least_adapter_mb(config, label_names) for config in configs)
    if size > limit:
        what = "model" if least.leaves_model else f"adapter, of rank {least.rank},"
        raise UserError(f"study.max_adapter_mb: {limit:g} MB, and the smallest {what} has {size:.4g}")


def chat_notes(checked: Checked) -> tuple[str, ...]:
    """Lines about what the model's chat template makes of chats; of other rows none, for that takes torch, and seconds.

    Raises:
        UserError: there is no such template, or it refuses one of the first chats.
    """
    if checked.config.model_copy(update={"format": checked.rows.format}).chat_column is None:
        return ()
    from bilora_ray.quiet import quiet

    quiet()
    from bilora_ray.training.rehearsal import notes_of_first

    return notes_of_first(checked.config, checked.rows)


def _unlooked_at(space: Space) -> Iterator[str]:
    """A line where no worker has a whole model to look at: see `probe.passes.check_passes`."""
    if space.resources.parallelism == "fsdp":
        looks = "whether the base model sees ahead or reads padding"
        yield f"parallelism: no trial of fsdp looks {looks}; a dry run does, of models of up to 500 million parameters"


def _unpinned(config: TrialConfig) -> Iterator[str]:
    """Lines about Hub data whose commit is not known: what changes there between two trials would go unseen."""
    for source, revision in REVISIONS.items():
        name = getattr(config, source)
        is_data = SOURCES[source] == "data"
        if is_data and name and getattr(config, revision) is None and kind_of(name, is_data) == "hub":
            yield f"{revision}: the Hub did not say which commit of '{name}' there is, so that none is kept"


def _choices(space: Space, setting: str) -> list[TrialConfig]:
    """The settings of a first trial with each value that `setting` may get."""
    found: dict[Any, TrialConfig] = {}
    for sampled in space.each_value(setting):
        config = space.trial_config(sampled)
        found.setdefault(getattr(config, setting), config)
    return list(found.values())


def _models(space: Space) -> list[TrialConfig]:
    """The settings of a first trial with each base model, and each revision, that trials may get."""
    found = (*_choices(space, BASE), *_choices(space, REVISIONS[BASE]))
    return list({(one.model_name_or_path, one.model_revision): one for one in found}.values())


def _by_source(config: TrialConfig, rows: Dataset) -> dict[str, str]:
    return {source_of(config, setting): digest for setting, digest in rows.digests.items()}


def _test_rows(config: TrialConfig, rows: Dataset, dry_run: bool) -> Dataset:
    """The test rows, each of which is checked, as validation rows. UserError as `preflight`."""
    return load_rows(config.on_test().model_copy(update={"label_names": rows.label_names}), beginning=dry_run)


def _others(space: Space) -> dict[str, str]:
    """Source -> digest, of all base models that trials may get, and of their chat template."""
    found = {source_of(one, BASE): of_base(one) for one in _choices(space, BASE)}
    config = space.first_config()
    found[source_of(config, CHAT_TEMPLATE)] = of_template(config)
    return {source: digest for source, digest in found.items() if digest is not None}


def _new_head(config: TrialConfig, label_names: tuple[str, ...] | None) -> Iterator[str]:
    """A line about the base model's head where it is for another number of labels."""
    model, kind = described(config), TASK_FACTS[config.task].model_class.removeprefix("AutoModel")
    if label_names is None or not any(str(name).endswith(kind) for name in model.get("architectures") or ()):
        return
    of_base = len(model.get("id2label") or ()) or 2  # which transformers leaves out
    if of_base != len(label_names):
        yield f"label_names: the base model has a head for {of_base} labels; one for {len(label_names)} is trained anew"


def pinned(space: Space, resumed_in: Layout | None, beside: Iterable[str] = ()) -> Space:
    """`space` with the commits of its Hub model and data: all trials get the same, those of a resumed study too.

    A branch or tag is looked up each time, so a study that named one is not resumed once it has moved. Where the space
    tries several models or revisions, each trial gets what there is when it starts.

    A study of a version that lacked a setting goes on with what that version did (see `facts.Facts`).

    Args:
        space: the space.
        resumed_in: where its study is, if that is to be resumed.
        beside: studies of the same model, data and machines: where its own has not begun, what those have.

    Raises:
        UserError: there is no such model, or trials would be measured on different rows.
    """
    config = space.first_config()
    before = None if resumed_in is None else _settings_before(resumed_in, space.study.name)
    newer, found = _newer_settings(space, before), dict[str, Any]()
    if before is None and resumed_in is not None:
        before = next(filter(None, (_settings_before(resumed_in, name) for name in beside)), None)
        if before is not None and (space.fixed | newer).get("precision") == "auto":
            newer["precision"] = before["precision"]
    for source, revision in REVISIONS.items():
        name, given = getattr(config, source), getattr(config, revision)
        if name is None or not space.varied.isdisjoint({source, revision}):
            continue
        if before is not None and given is None:
            found[revision] = before.get(revision)
        elif kind_of(name, is_data=SOURCES[source] == "data") != "hub":
            continue
        elif SOURCES[source] == "model":
            found[revision] = _hub_commit(name, given, source)
        else:
            found[revision] = _dataset_commit(name, given)
    pins = {key: value for key, value in found.items() if value is not None}
    space = replace(space, fixed={**space.fixed, **newer, **pins})
    check_draw(space)
    return space


def _newer_settings(space: Space, before: Mapping[str, Any] | None) -> dict[str, Any]:
    """The values of settings that not every version had, where `space` has none: those of the study from `before`."""
    given = {key for key, value in space.fixed.items() if (key, value) != AUTO} | space.varied
    absent = checking.before(TrialConfig).keys() - given
    return {key: TrialConfig.model_fields[key].default if before is None else before[key] for key in absent}


def _settings_before(layout: Layout, name: str) -> dict[str, Any] | None:
    from bilora_ray.search.study.studies import settings_before

    return settings_before(layout, name)


def check_model(config: TrialConfig) -> None:
    """Look for the base model: built in, in a local folder, on the Hub, or in the Hub's cache if that does not answer.

    Raises:
        UserError: it is nowhere. A Hub that does not answer is asked once, where transformers tries for a minute; for a
            commit, which is what `pinned` has found, not at all.
    """
    name, revision = config.model_name_or_path, config.model_revision
    kind = kind_of(name, is_data=False)
    if kind == "hub" and not COMMIT.fullmatch(revision or ""):
        _hub_commit(name, revision, "model_name_or_path")
    if kind == "local" and not Path(name, "config.json").is_file():
        raise UserError(f"model_name_or_path: {name} holds no model: config.json is missing")


def _dataset_commit(name: str, revision: str | None) -> str | None:
    """The commit of a `revision` of a Hub dataset; None if the Hub does not say, which who loads it may."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(name, revision=revision, timeout=HUB_TIMEOUT_S).sha
    except Exception:  # which one it is depends on the HTTP library beneath
        return None


def positions(config: TrialConfig) -> int | None:
    """How many tokens the base model has positions for, as its `config.json` says.

    It is read without transformers, which would import torch.

    Returns:
        None where it does not say, or cannot be read from here; a trial looks again when it has the model. So too
        where rows are images, which have no tokens.
    """
    if TASK_FACTS[config.task].reads_images:
        return None
    model = described(config)
    kind, behind = str(model.get("model_type")), model.get("pad_token_id")
    found = model.get(POSITIONS.get(kind, "max_position_embeddings"))
    if kind in BEHIND_PADDING and isinstance(found, int):
        return found - (behind if isinstance(behind, int) else 1) - 1
    return found if isinstance(found, int) else None


def described(config: TrialConfig) -> dict[str, Any]:
    """What the base model's `config.json` says of it, or of its part for texts; nothing where it can't be read."""
    try:
        file = model_file(config.model_name_or_path, config.model_revision, "config.json")
        model = json.loads(file.read_text(encoding="utf-8"))
        model = model.get("text_config", model)
    except (OSError, ValueError, AttributeError):
        return {}
    return model if isinstance(model, dict) else {}


def _hub_commit(name: str, revision: str | None, where: str) -> str | None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        # A commit never moves: what is in the cache is what the Hub has.
        known = cached_commit(name, revision) if COMMIT.fullmatch(revision or "") else None
        return known or HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT_S).sha
    except HFValidationError:
        raise UserError(f"{where}: '{name}' is no folder here, and no name that the Hub could know") from None
    except Exception as error:  # which one it is depends on the HTTP library beneath
        known = cached_commit(name, revision)
        if known is not None:
            return known
        if isinstance(error, HfHubHTTPError):
            problem = f"the Hub has no model '{name}' that can be read ({first_line(error)})"
        else:
            problem = f"no folder '{name}' here, and the Hub, where it may be, cannot be reached"
        raise UserError(f"{where}: {problem}") from None
