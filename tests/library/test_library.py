"""`import bilora_ray`: what it gives, how light it is, and that it leaves the process as it was."""

from __future__ import annotations

import ast
import inspect
import json
import logging
import os
import random
import signal
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tiny_trials import Tiny, next_trial

import bilora_ray
from bilora_ray.config import TrialConfig
from bilora_ray.library import spaces
from bilora_ray.library.asked import Asked
from bilora_ray.search.simulated import simulate
from bilora_ray.search.space_file import load_space
from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.studies import open_study
from bilora_ray.search.study.study import SearchStudy

HEAVY = {"datasets", "mlflow", "numpy", "optuna", "pandas", "peft", "pydantic", "ray", "torch", "transformers"}
TRIAL = {
    "model_name_or_path": "org/model",
    "task": "causal-lm",
    "train_data": "org/data",
    "rho": {"low": 0.01, "high": 0.2, "log": True},
    "rank": {"choice": [4, 8, 16]},
}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("BILORA_RAY_STORAGE_PATH", "BILORA_RAY_STUDY_DATABASE", "MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


def curve(config: TrialConfig) -> list[dict[str, float]]:
    return [
        {"step": step, "max_steps": 2, "eval_loss": float(config.rho) / step, "train_runtime": 1.5 * step}
        for step in (1, 2)
    ]


def opened(folder: str = "runs") -> SearchStudy:
    space = spaces.read_space({"study": {"name": "s", "num_trials": 4, "scheduler": "none"}, "trial": TRIAL})
    return open_study(space, Layout(Path(folder).resolve()), {})


# What there is


def test_it_imports_nothing_heavy_and_no_name_does_before_it_is_used() -> None:
    code = "import bilora_ray, json, sys; dir(bilora_ray); bilora_ray.UserError; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert {name.partition(".")[0] for name in json.loads(done.stdout)} & HEAVY == set()


def test_each_public_name_is_there_and_says_what_it_is() -> None:
    assert set(bilora_ray.PLACES) | {"__version__"} == set(bilora_ray.__all__) <= set(dir(bilora_ray))
    for name in bilora_ray.PLACES:
        assert inspect.getdoc(getattr(bilora_ray, name)), name
    for call in (bilora_ray.tune, bilora_ray.train, bilora_ray.load_study, bilora_ray.Study.export):
        text = inspect.getdoc(call) or ""
        assert "Raises:" in text
        assert [name for name in inspect.signature(call).parameters if f"{name}:" not in text] in ([], ["self"])
    with pytest.raises(AttributeError, match="no attribute 'tun'"):
        _ = bilora_ray.tun  # type: ignore[attr-defined]


def test_type_checkers_read_the_same_names_from_the_same_places() -> None:
    tree = ast.parse(Path(bilora_ray.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    told = {
        alias.name: node.module.removeprefix("bilora_ray.")
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    assert told == bilora_ray.PLACES
    for call in (bilora_ray.tune, bilora_ray.train, bilora_ray.load_study, bilora_ray.Study.trials):
        found = inspect.signature(call)
        assert "return" in call.__annotations__
        assert {name for name in found.parameters if name not in call.__annotations__} <= {"self"}


# A study


def test_a_study_is_read_as_tables_the_best_trial_first() -> None:
    study = opened()
    simulate(study, curve, workers=1, keep=True)
    study.release()
    found = bilora_ray.load_study("s")
    trials, history, best = found.trials(), found.history(), found.best
    assert best is not None
    assert list(trials.columns[:5]) == ["trial", "status", "eval_loss", "rho", "rank"]
    assert trials.trial.iloc[0] == best.number
    assert trials.eval_loss.is_monotonic_increasing
    assert trials.seconds.tolist() == [3.0] * 4
    assert (len(history), set(history.trial)) == (8, {0, 1, 2, 3})
    assert history[history.trial == best.number].eval_loss.min() == best.value
    assert (found.metric, found.greater_is_better, found.trial(2).number) == ("eval_loss", False, 2)
    assert best.status is bilora_ray.Status.COMPLETE


def test_a_study_without_a_trial_has_empty_tables_and_no_best() -> None:
    opened().release()
    found = bilora_ray.load_study("s", storage_path="runs")
    assert (found.best, len(found.trials()), len(found.history())) == (None, 0, 0)
    with pytest.raises(bilora_ray.UserError, match=r"^number: must be a whole number, got '0'$"):
        found.trial("0")  # type: ignore[arg-type]


def test_a_study_that_runs_is_read_anew_each_time() -> None:
    study = opened()
    found = bilora_ray.load_study("s")
    assert len(found.trials()) == 0
    assert next_trial(study) == 0
    assert found.trials().status.tolist() == ["running"]
    study.release()
    assert found.trials().status.tolist() == ["interrupted"]


# Mistakes


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: bilora_ray.load_study("t"), "study 't': not in"),
        (lambda: bilora_ray.tune("none.yaml"), "none.yaml: no such file"),
        (lambda: bilora_ray.tune("quickstrat"), "no space 'quickstrat' ships with bilora-ray"),
        (lambda: bilora_ray.tune("quickstart", extend=0), "--extend 0: must be at least 1"),
        (lambda: bilora_ray.tune({"studi": {}}), "space: unknown section 'studi'; did you mean 'study'?"),
        (lambda: bilora_ray.tune({"trial": {}}), "space: section 'study' is missing"),
        (lambda: bilora_ray.tune({"study": {"name": "s"}, "trial": {**TRIAL, "rnk": 4}}), "did you mean 'rank'?"),
        (lambda: bilora_ray.tune({"study": {"name": "s"}, "trial": {"rank": 4}}), "space: "),
        (lambda: bilora_ray.tune({}, ray_address="10.1.2.3:6379"), "--ray-address 10.1.2.3:6379"),
        (lambda: bilora_ray.train({"rank": {"choice": [4, 8]}}), "space: "),
        (lambda: bilora_ray.train(trial=3), "--trial: needs --study"),
        (lambda: bilora_ray.train({"rank": 4}, os.getcwd() + "/full"), "full: exists already"),
        (lambda: bilora_ray.tune(3), "space: must be a text or a Path or a dict, got 3"),  # type: ignore[arg-type]
        (lambda: bilora_ray.tune("quickstart", num_trials="3"), "num_trials: must be a whole number or None, got '3'"),
        (lambda: bilora_ray.tune("quickstart", num_trials=True), "num_trials: must be a whole number or None, got"),
        (lambda: bilora_ray.tune("quickstart", warm_start=["s", 3]), "warm_start: must be a list of texts, got ['s', "),
        (lambda: bilora_ray.tune("quickstart", resume="no"), "resume: must be True or False, got 'no'"),
        (lambda: bilora_ray.tune("quickstart", settings=["rank=3"]), "settings: must be a dict or None, got ['rank=3"),
        (lambda: bilora_ray.tune("quickstart", settings={"rank": {(1, 2): 3}}), "rank: cannot be written as JSON ("),
        (lambda: bilora_ray.tune("quickstart", num_trial=3), "tune: takes no 'num_trial'; did you mean 'num_trials'?"),
        (lambda: bilora_ray.train([[0.5] * 99]), "space: must be a text or a Path or a dict or None, got list"),
        (lambda: bilora_ray.train(study="s", trial="0"), "trial: must be a whole number or None, got '0'"),
        (lambda: bilora_ray.compare(3), "file: must be a text or a Path or a dict, got 3"),  # type: ignore[arg-type]
        (lambda: bilora_ray.compare("quickstart", extend="3"), "extend: must be a whole number or None, got '3'"),  # type: ignore[arg-type]
        (lambda: bilora_ray.load_study(None), "name: must be a text, got None"),  # type: ignore[arg-type]
        (lambda: bilora_ray.load_study("s", storage_path=3), "storage_path: must be a text or a Path or None, got 3"),
    ],
)
def test_a_mistake_is_one_line_of_a_user_error(call: Any, line: str) -> None:
    Path("full").mkdir()
    Path("full/file").touch()
    with pytest.raises(bilora_ray.UserError) as raised:
        call()
    assert line in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1
    assert not Path("runs").exists()


def test_settings_of_any_kind_become_what_the_command_line_takes() -> None:
    np = pytest.importorskip("numpy")
    given = {"rank": np.int64(8), "learning_rate": 1e-05, "train_data": Path("x.csv"), "rho": {"choice": [0.1, 0.2]}}
    texts = spaces.as_overrides(given)
    assert texts[0] == "rank=8"
    rest = ["study.name=s", "model_name_or_path=org/m", "task=causal-lm", "train_data=org/d"]
    space = load_space(None, [*rest, *texts[:2], texts[3]])
    assert (space.fixed["rank"], float(space.fixed["learning_rate"])) == (8, 1e-05)
    assert texts[2] == 'train_data="x.csv"'


# The process


def test_a_process_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    from bilora_ray.library.surroundings import left_as_found
    from bilora_ray.quiet import quiet

    monkeypatch.setenv("ASKED", "before")
    transformers.logging.enable_progress_bar()

    def state() -> tuple[Any, ...]:
        logs = {name: logging.getLogger(name).level for name in ("", "ray.tune", "transformers", "mlflow")}
        bars = transformers.logging.is_progress_bar_enabled()
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        return dict(os.environ), logs, bars, handlers, list(warnings.filters), random.getstate()

    with left_as_found():  # what libraries set as they are imported is theirs
        pass
    before = state()

    def change() -> None:
        quiet()
        os.environ.update({"ASKED": "now", "MORE": "1"})
        for name in ("", "ray.tune", "mlflow"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        random.seed(1)
        assert [found != known for found, known in zip(state(), before, strict=True)] == [True] * 6
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), left_as_found():
        change()
    assert state() == before


def test_a_cluster_that_the_program_is_connected_to_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    from bilora_ray.search.cluster.cluster import cluster

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "shutdown", lambda: pytest.fail("it is not ours"))
    with pytest.raises(bilora_ray.UserError, match="Ray runs in this process already"), cluster(None):
        pytest.fail("it began")


def test_a_search_may_run_in_another_thread_which_has_no_signals() -> None:
    from bilora_ray.interruption import heeding_signals, noted
    from bilora_ray.library.surroundings import left_as_found

    def search() -> bool:
        with left_as_found(), heeding_signals(), noted():
            return True

    before = signal.getsignal(signal.SIGINT)
    with ThreadPoolExecutor(1) as executor:
        assert executor.submit(search).result()
    assert signal.getsignal(signal.SIGINT) is before


def test_who_interrupts_a_search_is_told_how_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from bilora_ray.library import verbs

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(verbs, "check_search", interrupted)
    with pytest.raises(KeyboardInterrupt) as raised:
        bilora_ray.tune({"study": {"name": "s"}, "trial": TRIAL})
    assert raised.value.__notes__ == ["What is done is kept. Go on: the same call, with resume=True"]


# A training


def test_a_run_is_trained_exported_and_resumed_to_nothing(tiny: Tiny, capfd: pytest.CaptureFixture[str]) -> None:
    settings = tiny.config("causal-lm").model_dump(exclude_unset=True)
    study = bilora_ray.train(settings, "adapter", name="one", storage_path="runs", progress=False)
    assert capfd.readouterr() == ("", "")
    assert (Path("adapter") / "adapter_model.safetensors").is_file()
    assert study.best is not None
    assert study.best.settings["rank"] == settings.get("rank", TrialConfig.model_fields["rank"].default)
    with pytest.raises(bilora_ray.UserError, match="study 'one' exists"):
        bilora_ray.train(settings, name="one", storage_path="runs", progress=False)
    again = bilora_ray.train(study.best.settings, name="two", storage_path="runs", progress=False)
    assert again.best is not None
    assert again.best.value == study.best.value
    assert again.best.history[-1]["eval_loss"] == study.best.history[-1]["eval_loss"]


def test_each_thing_that_is_asked_has_its_name() -> None:
    # Ten in a row, four of them of one type: two could change places, and nobody would see it.
    assert {one.kind for one in inspect.signature(Asked).parameters.values()} == {inspect.Parameter.KEYWORD_ONLY}
