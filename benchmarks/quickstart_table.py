"""Records the table over which searches are compared: some hundred real trials of the quickstart, each to its end.

Every point of a grid over the quickstart's settings and both methods is trained once, on one thread, and told with its
whole curve: at each evaluation the loss, the exact matches and the CPU seconds until then, so that other work of the
machine does not count. It goes on where it was stopped. `--part 0/2 --output a.csv` and `--part 1/2 --output b.csv`
share the work of two cores; `--join a.csv b.csv` then puts the table together.

    OMP_NUM_THREADS=1 python benchmarks/quickstart_table.py [--part I/N] [--output FILE] [--join FILE ...]

The 297 trials take about an hour of one core. `benchmarks/search_efficiency.py` searches over them.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
SPACE = HERE.parents[1] / "search_spaces" / "quickstart.yaml"
TABLE = HERE.parent / "data" / "quickstart_table.csv"
LEARNING_RATES = tuple(float(f"{3e-4 * 10 ** (power / 4):.3g}") for power in range(9))
RADII = (0.005, 0.0188, 0.0707, 0.266, 1.0)
RANKS, AUXILIARY_RANKS = (4, 8, 16), (2, 8)
SETTINGS = ("method", "rank", "auxiliary_rank", "rho", "learning_rate")
MEASURED = ("step", "eval_loss", "eval_exact_match", "seconds")


def grid() -> Iterator[dict[str, Any]]:
    """The settings of every trial; those of plain LoRA have no auxiliary."""
    for rank, rate in itertools.product(RANKS, LEARNING_RATES):
        yield {"method": "lora", "rank": rank, "learning_rate": rate}
        for auxiliary, rho in itertools.product(AUXILIARY_RANKS, RADII):
            yield {"method": "bilora", "rank": rank, "auxiliary_rank": auxiliary, "rho": rho, "learning_rate": rate}


def key(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """What tells a trial from the others, as the table has it."""
    return tuple(str(settings.get(name, "")) for name in SETTINGS)


def record(settings: Mapping[str, Any]) -> list[dict[str, float]]:
    """The evaluations of one trial. One whose loss is no number ends with the last that was."""
    from bilora_ray.errors import TrialFailure
    from bilora_ray.search.space_file import load_space
    from bilora_ray.training.folder import TrialFolder
    from bilora_ray.training.loop import fit

    space, told = load_space(SPACE), []
    started = time.process_time()

    def report(metrics: Mapping[str, float]) -> bool:
        told.append({**metrics, "seconds": time.process_time() - started})
        return True

    with tempfile.TemporaryDirectory() as folder:
        config = space.trial_config({**settings, "seed": 0})
        try:
            fit(config, TrialFolder(Path(folder)), report, keep_base=True)
        except TrialFailure as failure:
            print(key(settings), failure, flush=True)
    return told


def read(file: Path) -> dict[tuple[str, ...], list[dict[str, str]]]:
    """The evaluations of each trial that a table has."""
    found: dict[tuple[str, ...], list[dict[str, str]]] = {}
    if file.exists():
        with file.open(newline="", encoding="utf-8") as opened:
            for row in csv.DictReader(opened):
                found.setdefault(key(row), []).append(row)
    return found


def write(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add `rows` to a table."""
    begins = not file.exists()
    with file.open("a", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, (*SETTINGS, *MEASURED), lineterminator="\n")
        if begins:
            writer.writeheader()
        writer.writerows(rows)


def join(parts: Iterable[Path], output: Path) -> None:
    """Write the table of all `parts`, in the order of the grid. SystemExit if a trial is missing."""
    found = {name: rows for part in parts for name, rows in read(part).items()}
    missing = [settings for settings in grid() if key(settings) not in found]
    if missing:
        raise SystemExit(f"{len(missing)} trials are missing, such as {missing[0]}")
    output.unlink(missing_ok=True)
    write(output, itertools.chain.from_iterable(found[key(settings)] for settings in grid()))


def main() -> None:
    """Record what is missing of one part of the grid, or join the parts."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--part", default="0/1", help="I/N: every N-th point from the I-th")
    parser.add_argument("--output", type=Path, default=TABLE)
    parser.add_argument("--join", type=Path, nargs="+", metavar="FILE", help="parts of the table to put together")
    arguments = parser.parse_args()
    arguments.output.parent.mkdir(exist_ok=True)
    if arguments.join:
        join(arguments.join, arguments.output)
        return
    part, parts = map(int, arguments.part.split("/"))
    known = read(arguments.output)
    for settings in itertools.islice(grid(), part, None, parts):
        if key(settings) not in known:
            told = record(settings)
            if not told:
                raise SystemExit(
                    f"{key(settings)}: diverges before its first evaluation, of which a table tells nothing"
                )
            write(arguments.output, ({**settings, **{name: f"{one[name]:.6g}" for name in MEASURED}} for one in told))


if __name__ == "__main__":
    main()
