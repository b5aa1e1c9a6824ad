"""How much of a batch's sharpness the auxiliary captures, by the rule with which it goes up the loss.

A trial trains with each rule. Every few steps, before a step, the auxiliary that the step will use is asked what it
does at the weights as they are: on the *next* batch, on which it is used; on the batch that it was made of (*seen*);
and on 100 *held-out* rows. *captured* is (L(W + E) - L(W)) / (L(W + rho g / ||g||) - L(W)), g being the gradient of
that batch over the full weights: 1 is what SAM does, 0 what a random direction does. *stale* is the whole gradient of
the batch before in place of E, without a limit on its rank: what a rule of one pass can know of the next batch. Shares
are ratios of sums over the looks of one half of a training and over seeds, since a single rise may be near 0.

Tasks: `lm`, the quickstart's model and data; `noisy`, MiniLM on 160 short sentences of SST-2 with 20 % of the labels
turned round, as `label_noise.py` has it.

    python benchmarks/ascent_capture.py --sst2 FOLDER [--tasks lm noisy] [--seeds 0 1 2]

Without --sst2 it is lm alone. Writes ascent_capture.md and .png to --output.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import label_noise
import torch

from bilora_ray.config import TrialConfig
from bilora_ray.method.layers import AUXILIARY
from bilora_ray.method.spaces import FullSpace, Pass, Vector, norm
from bilora_ray.paths import loadable
from bilora_ray.training.folder import TrialFolder
from bilora_ray.training.loop import Run
from bilora_ray.training.probe.adversary import spread
from bilora_ray.training.probe.sharpness import Rows

RULES = ("adamw", "tangent", "half-step")
BATCHES = ("next", "seen", "held")
HELD_OUT = 100
RHO = 0.05
# What both tasks are trained with.
COMMON: dict[str, Any] = {
    "method": "bilora",
    "rho": RHO,
    "num_train_epochs": 8,
    "per_device_train_batch_size": 16,
    "eval_steps": 1.0,
    "precision": "fp32",
}
LM: dict[str, Any] = {
    "model_name_or_path": "builtin:quickstart/model",
    "task": "causal-lm",
    "train_data": "builtin:quickstart/train.jsonl",
    "validation_data": "builtin:quickstart/validation.jsonl",
    "max_length": 96,
    "learning_rate": 4e-3,
}


@dataclass
class Look:
    """What was found once: rises of the loss of a batch.

    Attributes:
        task, rule, seed: of the trial.
        share: of the training that was over.
        batch: one of `BATCHES`.
        own: by the auxiliary.
        stale: by the gradient of the batch before.
        rise: by the batch's own gradient.
    """

    task: str
    rule: str
    seed: int
    share: float
    batch: str
    own: float
    stale: float
    rise: float


def settings(task: str, folder: Path, sst2: Path | None, model: Path | None) -> dict[str, Any]:
    """Of a trial of `task`, its files in `folder`."""
    if task == "lm":
        return {**COMMON, **{key: loadable(value) if ":" in str(value) else value for key, value in LM.items()}}
    assert sst2 is not None
    short = label_noise.shorten(model or label_noise.packaged(), folder / "model")
    data = label_noise.write_data(folder / "noisy", sst2, 20)
    given = label_noise.task(short, {key: value for key, value in data.items() if key != "test_data"})
    return {**given, **COMMON, "metric": "eval_loss", "learning_rate": 1e-3}


def looks(run: Run, count: int) -> Iterator[tuple[float, list[tuple[float, float, float]]]]:
    """Train `run`, and look `count` times on the way: the share that is over, and the rises of each batch."""
    rows = Rows(run.model, run.data.validation, run.config, run.data.tokenizer)
    held_out = spread(rows.examples, HELD_OUT)
    due = {run.max_steps * (2 * number + 1) // (2 * count) for number in range(count)}
    for step in range(run.max_steps):
        if step in due and step:
            batches = [run._rows_of(step), run._rows_of(step - 1), held_out]
            yield step / run.max_steps, rows.measured_of(batches, lambda cuts: rises(FullSpace(run.model), cuts))
        run.train_step()


def rises(space: FullSpace, batches: Sequence[Sequence[Pass]]) -> list[tuple[float, float, float]]:
    """Of each batch: by the auxiliary, by the second batch's gradient, by its own."""
    change, stale = space.factors(AUXILIARY), space.gradient(batches[1])
    found = []
    for passes in batches:
        rest = space.loss(passes)
        own = space.loss_beside(passes, change) - rest
        gradient = space.gradient(passes)
        found.append((own, along(space, passes, stale) - rest, along(space, passes, gradient) - rest))
    return found


def along(space: FullSpace, passes: Sequence[Pass], gradient: Vector) -> float:
    """The loss rho along `gradient`."""
    return space.loss(passes, gradient, RHO / norm(gradient))


def captured(found: Sequence[Look], late: bool, of: str = "own") -> float:
    """The ratio of sums over the looks in one half of the training."""
    half = [look for look in found if (look.share >= 0.5) is late]
    return sum(getattr(look, of) for look in half) / sum(look.rise for look in half)


def table(found: Sequence[Look]) -> list[str]:
    """Early and late shares, a line a task and rule."""
    lines = [
        "| task | rule | next | seen | held out | stale, next | stale, held out |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for task, rule in dict.fromkeys((look.task, look.rule) for look in found):
        cells = [task, f"`{rule}`"]
        for of, batches in (("own", BATCHES), ("stale", ("next", "held"))):
            for batch in batches:
                ours = [look for look in found if (look.task, look.rule, look.batch) == (task, rule, batch)]
                cells.append(" / ".join(f"{captured(ours, late, of):.2f}" for late in (False, True)))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def draw(found: Sequence[Look], file: Path) -> None:
    """Captured shares over the training: a row of panels a task, a panel a batch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = list(dict.fromkeys(look.task for look in found))
    size = (10, 2.9 * len(tasks))
    figure, panels = pyplot.subplots(len(tasks), len(BATCHES), figsize=size, sharex=True, sharey=True, squeeze=False)
    for row, task in zip(panels, tasks, strict=True):
        for panel, batch in zip(row, BATCHES, strict=True):
            for rule in dict.fromkeys(look.rule for look in found):
                ours = [look for look in found if (look.task, look.rule, look.batch) == (task, rule, batch)]
                shares = sorted({look.share for look in ours})
                at = [[look for look in ours if look.share == share] for share in shares]
                values = [sum(look.own for look in some) / sum(look.rise for look in some) for some in at]
                panel.plot(shares, values, label=rule, lw=1.6)
            panel.axhline(0, color="grey", lw=0.6)
            panel.set(title=f"{task}, {batch}", ylim=(-0.4, 1.1))
    panels[-1][1].set_xlabel("share of the training")
    panels[0][0].set_ylabel("captured")
    panels[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=80)


def told(found: Sequence[Look], arguments: argparse.Namespace) -> str:
    """The page."""
    tasks, seeds = " ".join(dict.fromkeys(look.task for look in found)), " ".join(map(str, arguments.seeds))
    command = f"python benchmarks/ascent_capture.py --tasks {tasks} --seeds {seeds}"
    return "\n".join(
        [
            "# What the auxiliary captures of a batch's sharpness",
            "",
            "Shares of the rise along the batch's own gradient, early / late half of the training, as explained in",
            f"benchmarks/ascent_capture.py. rho {RHO}, r1 = r2 = 8, batch 16, 8 epochs, seeds {arguments.seeds},",
            f"{arguments.looks} looks a training, torch {torch.__version__}, CPU.",
            "",
            f"    {command} --looks {arguments.looks}{' --sst2 FOLDER' if arguments.sst2 else ''}",
            "",
            *table(found),
            "",
            "![shares over the training](ascent_capture.png)",
            "",
        ]
    )


def main() -> None:
    """Train, look, tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sst2", type=Path, help="folder of train.tsv, dev.tsv and test.tsv, for the task noisy")
    parser.add_argument("--model", type=Path, help="folder of MiniLM; that of its Python package when absent")
    parser.add_argument("--tasks", nargs="+", choices=["lm", "noisy"])
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--looks", type=int, default=16, help="in each training")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder")
    parser.add_argument("--raw", type=Path, help="a JSONL file that gets each look")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tasks = arguments.tasks or (["lm", "noisy"] if arguments.sst2 else ["lm"])
    if "noisy" in tasks and arguments.sst2 is None:
        parser.error("the task noisy needs --sst2")
    found: list[Look] = []
    with tempfile.TemporaryDirectory() as name:
        for task in tasks:
            given = settings(task, Path(name), arguments.sst2, arguments.model)
            for rule in arguments.rules:
                for seed in arguments.seeds:
                    config = TrialConfig(**given, ascent=rule, seed=seed)
                    run = Run(config, TrialFolder(Path(name, f"{task}-{rule}-{seed}")))
                    for share, of_batches in looks(run, arguments.looks):
                        pairs = zip(BATCHES, of_batches, strict=True)
                        found += [Look(task, rule, seed, share, batch, *of) for batch, of in pairs]
                    print(f"{task} {rule} seed {seed}", flush=True)
    if arguments.raw:
        arguments.raw.write_text("".join(json.dumps(asdict(look)) + "\n" for look in found), encoding="utf-8")
    page = told(found, arguments)
    (arguments.output / "ascent_capture.md").write_text(page, encoding="utf-8")
    draw(found, arguments.output / "ascent_capture.png")
    print(page)


if __name__ == "__main__":
    main()
