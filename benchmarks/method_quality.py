"""Whether a method beats plain LoRA, on the two comparisons that ship: the quickstart's task, and few rows of SST-2.

    python benchmarks/method_quality.py [--sst2 FOLDER --model FOLDER] [--storage-path FOLDER] [--output FOLDER]

The folder of SST-2 holds `train.tsv`, `dev.tsv` and `test.tsv`, each a sentence and a label a line, without a header;
the model is a local copy of sentence-transformers/all-MiniLM-L6-v2. Without the two, `nyu-mll/glue` and the model are
loaded from the Hub, whose test is then what GLUE calls validation.

Each is `bilora-ray compare NAME`, and nothing else: what is interrupted goes on when the command is given again, and of
what has ended the table is composed anew. The output folder gets `method_quality.md` and a picture of each.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
TASKS = {
    "quickstart": "Arithmetic word problems, the quickstart's model (causal-lm): exact match on its test rows",
    "sst2": "SST-2, 500 sentences, MiniLM (sequence-classification): accuracy on the test rows",
}
COLUMNS = (
    "| method | mean | sd | difference to LoRA (95 %) | Holm p | verdict | sharpness | step time | hours | chosen |",
    "| --- | ---: | ---: | --- | ---: | --- | ---: | ---: | ---: | --- |",
)


def main() -> None:
    """Run both comparisons, or go on with them, and write what they say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=tuple(TASKS), default=list(TASKS))
    parser.add_argument("--sst2", type=Path, help="folder with train.tsv, dev.tsv and test.tsv")
    parser.add_argument("--model", type=Path, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of both comparisons")
    parser.add_argument("--storage-path", type=Path, default=Path("runs"))
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    found = {}
    for task in arguments.tasks:
        overrides = [*arguments.set, *(_local(arguments.sst2, arguments.model) if task == "sst2" else [])]
        found[task] = compared(task, overrides, arguments.storage_path)
        picture = arguments.storage_path / "studies" / f"{found[task]['name']}-runs" / "comparison" / "comparison.png"
        shutil.copy(picture, arguments.output / f"method_quality_{task}.png")
    page = arguments.output / "method_quality.md"
    page.write_text(in_words(found, arguments.sst2 is not None), encoding="utf-8")
    print(page.read_text(encoding="utf-8"))


def compared(task: str, overrides: Sequence[str], storage: Path) -> dict[str, Any]:
    """The outcome of a comparison, which goes on where it was."""
    begun = any((storage / "studies").glob(f"{task}-methods-*"))
    given = [part for text in overrides for part in ("--set", text)]
    output = storage / f"{task}.json"
    storage.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "bilora_ray", "compare", task, *given, "--storage-path", str(storage)]
    subprocess.run([*command, "--json", str(output), *(["--resume"] if begun else [])], check=True)
    return dict(json.loads(output.read_text(encoding="utf-8")))


def in_words(found: Mapping[str, Mapping[str, Any]], local: bool) -> str:
    """The page: a table, the sentences and the notes of each comparison; `local` is whether SST-2 is of a folder."""
    today, machine = datetime.now(UTC).date(), f"{os.cpu_count()} CPU cores, {platform.machine()}"
    lines = [
        "# Does a method beat plain LoRA, tuned alike?",
        "",
        f"`python benchmarks/method_quality.py{' --sst2 FOLDER' if local else ''}`, {today}, {machine}.",
        "Each method is tuned with as many trials over its own space, the learning rate always among it; its best",
        "settings on the validation rows are trained on fresh seeds and scored once on test rows that chose nothing.",
        "Each trial's best evaluation counts, so that stopping early is allowed to all. Sharpness is the rise of the",
        "validation loss along its gradient, over all adapted",
        "weights, at the radius that the file says. Step times are of trials beside each other on a machine that did",
        "other work too: ratios, and no benchmark. Hours are of training, the tuning's too.",
        *(["SST-2's validation rows are those of the folder's dev.tsv, its test rows test.tsv's."] if local else []),
    ]
    for task, outcome in found.items():
        count, kind = len(outcome["seeds"]), outcome["budget"]
        trials = max(one["tuned"]["trials"] for one in outcome["entries"] if one["tuned"])
        lines += ["", f"## {TASKS[task]}", "", f"{trials} trials of tuning, {count} seeds, equal {kind}.", "", *COLUMNS]
        lines += [_row(one) for one in outcome["entries"]]
        lines += [
            "",
            *(f"- {line}" for line in outcome["sentences"]),
            *(f"- Note: {line}" for line in outcome["notes"]),
        ]
        lines += ["", f"![Differences to LoRA](method_quality_{task}.png)"]
    statistics = next(iter(found.values()))["statistics"]
    return "\n".join([*lines, "", f"Statistics: {statistics}.", ""])


def _row(one: Mapping[str, Any]) -> str:
    difference = one["difference"]
    told = ("", "") if difference is None else (_interval(difference), _number(difference["p_holm"], 2))
    settings = (one["tuned"] or {}).get("settings", {})
    chosen = ", ".join(f"{key} {_number(value, 3)}" for key, value in settings.items())
    mean, deviation = _number(one["mean"], 4), _number(one["standard_deviation"], 2)
    measured = (_number(one[key], 3) for key in ("sharpness", "step_time_ratio", "device_hours"))
    cells = (f"`{one['entry']}`", mean, deviation, *told, one["verdict"], *measured, chosen)
    return f"| {' | '.join(cells)} |"


def _interval(difference: Mapping[str, float]) -> str:
    return f"{difference['mean']:+.4f} ({difference['low']:+.4f} to {difference['high']:+.4f})"


def _number(value: float | str | None, digits: int) -> str:
    return "" if value is None else value if isinstance(value, str) else f"{value:.{digits}g}"


def _local(sst2: Path | None, model: Path | None) -> list[str]:
    """What has SST-2 and its model read from folders."""
    names = {"train_data": "train.tsv", "validation_data": "dev.tsv", "test_data": "test.tsv"}
    given = [] if model is None else [f"model_name_or_path={model.absolute()}"]
    if sst2 is None:
        return given
    files = [f"{key}={(sst2 / name).absolute()}" for key, name in names.items()]
    return [*given, *files, "column_names=[sentence, label]", "dataset_config_name=null", "test_split=null"]


if __name__ == "__main__":
    main()
