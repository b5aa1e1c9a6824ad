"""A comparison of methods, checked and then run: `bilora-ray compare` and `bilora_ray.compare` are this."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bilora_ray.library.asked import Asked
from bilora_ray.paths import have_home
from bilora_ray.search.comparing.file import Comparison, checked_comparison, load_comparison, sections_of
from bilora_ray.search.space.shipped import comparison_file

if TYPE_CHECKING:
    from bilora_ray.evidence.outcome import Outcome
    from bilora_ray.search.preflight import Checked
    from bilora_ray.search.session import Watch
    from bilora_ray.search.study.layout import Layout
    from bilora_ray.training.rehearsal import Rehearsal

# A comparison file, the name of one that ships, or what one holds.
ComparisonLike = str | Path | Mapping[str, Any]
# What is said to be wrong with a dict, which has no file's name.
IN_PYTHON = Path("comparison")


@dataclass(frozen=True)
class Checks:
    """A comparison that is checked, and has not begun.

    Attributes:
        comparison: with all that its file leaves open.
        asked: how it is to be run.
        checked: what its data say.
        seeds: on how many its runs have begun.
        entries: those that have runs, once these have begun.
    """

    comparison: Comparison
    asked: Asked
    checked: Checked
    seeds: int = 0
    entries: tuple[str, ...] = ()


def comparison_of(given: ComparisonLike, overrides: Sequence[str], asked: Asked) -> Comparison:
    """The comparison of a file, checked in a moment.

    Args:
        given: the file.
        overrides: `key=value` texts on top of it.
        asked: how to run it.

    Raises:
        UserError: it is wrong, or another machine would be used without a secret.
    """
    asked.check("seeds")
    if isinstance(given, Mapping):
        found = checked_comparison(sections_of(given, IN_PYTHON), IN_PYTHON, overrides)
    else:
        found = load_comparison(comparison_file(given) if isinstance(given, str) else given, overrides)
    have_home()
    return found


def check_comparison(comparison: Comparison, asked: Asked) -> Checks:
    """Check the data and the models of a comparison, before anything starts.

    Raises:
        UserError: one line that says what is wrong, where, and what is allowed.
    """
    from bilora_ray.search.preflight import check_kernels, pinned, preflight

    resumed_in = asked.layout if asked.goes_on else None
    parts = [space.study.name for space in comparison.spaces.values()]
    spaces = {entry: pinned(space, resumed_in, beside=parts) for entry, space in comparison.spaces.items()}
    comparison = comparison.mapped(spaces)
    # The data is the same for all.
    checked = preflight(spaces[comparison.baseline], asked.dry_run)
    # Ray is imported once the data is right.
    from bilora_ray.search.cluster.cluster import is_own
    from bilora_ray.search.comparing.run import check_begun
    from bilora_ray.search.study.control.comparisons import entries_of, seeds_of

    for space in spaces.values():
        if is_own(asked.ray_address):
            check_kernels(space, apart=True)
    # What has begun in a job names the copies of the files that came with it.
    kept, digests = _kept(comparison, checked.digests, asked.layout, copied=False)
    runs = check_begun(kept, asked.layout, digests, asked.goes_on, asked.extend)
    if runs is None:
        return Checks(comparison, asked, checked)
    return Checks(comparison, asked, checked, seeds_of(runs), entries_of(runs))


def _kept(
    comparison: Comparison, digests: Mapping[str, str], layout: Layout, copied: bool
) -> tuple[Comparison, dict[str, str]]:
    """See `keep_inputs`, of all entries, which read the same files."""
    from bilora_ray.search.cluster.inputs import keep_inputs

    kept = {
        entry: keep_inputs(space, digests, layout.storage_path, copied) for entry, space in comparison.spaces.items()
    }
    spaces = {entry: space for entry, (space, _) in kept.items()}
    return comparison.mapped(spaces), kept[comparison.baseline][1]


def run_comparison(checks: Checks, watch: Watch, say: Callable[[str], None]) -> Outcome:
    """Run a comparison that is checked, and say what came of it.

    Raises:
        UserError: see `search.comparing.run.compare`.
        KeyboardInterrupt: of Ctrl-C, or of `bilora-ray stop`, once the trials are stopped and MLflow knows it.
    """
    from bilora_ray.search.comparing.gathered import gathered
    from bilora_ray.search.comparing.run import Comparing, asked_of, compare
    from bilora_ray.search.comparing.told import tell_outcome
    from bilora_ray.search.study.storage import naming_the_database

    asked = checks.asked
    comparison, digests = _kept(checks.comparison, checks.checked.digests, asked.layout, copied=True)
    for line in (*comparison.notes, *checks.checked.notes):
        say(f"Note: {line}")
    comparing = Comparing(
        comparison, asked.layout, asked.ray_address, asked.mlflow_uri, digests, watch, say, asked_of(comparison)
    )
    runs = compare(comparing, asked.extend)
    with naming_the_database(asked.layout):
        outcome = gathered(comparison, asked.layout)
    tell_outcome(outcome, runs, asked.mlflow_uri, say)
    return outcome


def rehearse(checks: Checks) -> Rehearsal:
    """Whatever can be tried of a comparison before it begins, but for a cluster that is elsewhere."""
    from bilora_ray.quiet import quiet
    from bilora_ray.search.cluster.cluster import capacity, check_address, is_own, this_machine

    asked, spaces = checks.asked, checks.comparison.spaces
    check_address(asked.ray_address)
    here = is_own(asked.ray_address)
    if here:
        capacity(spaces[checks.comparison.baseline].resources, [this_machine()])
    quiet()
    from bilora_ray.training.rehearsal import rehearse

    first, *_ = [rehearse(space.first_config(), here) for space in spaces.values()]
    return first
