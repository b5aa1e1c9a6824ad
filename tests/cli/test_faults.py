"""A machine that fails under a command: one line, exit code 2, nothing half-written, and the line is right."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from chaos.disks import Disk
from click.testing import CliRunner, Result
from tiny_trials import Tiny
from transformers import AutoModelForCausalLM

from bilora_ray import quiet
from bilora_ray.cli.main import main
from bilora_ray.cli.progress import SearchProgress
from bilora_ray.errors import GO_ON
from bilora_ray.release import export, servers
from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.storage import naming_the_database
from bilora_ray.training import loading

COMMAND = Path(sys.executable).with_name("bilora-ray")
DISK_BYTES = 8 * 1024**2


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for variable in ("MLFLOW_TRACKING_URI", "BILORA_RAY_STORAGE_PATH", "BILORA_RAY_STUDY_DATABASE"):
        monkeypatch.delenv(variable, raising=False)
    loading._kept.clear()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    made = Disk(tmp_path / "disk", DISK_BYTES)
    if not made.mounted:
        pytest.skip(f"no disk can be mounted here: {made.refusal}")
    yield made
    made.remove()


def bilora_ray(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def settings(tiny: Tiny) -> list[str]:
    """Of a run with two evaluations."""
    config = tiny.config("causal-lm", max_steps=4, eval_steps=2).model_dump(exclude_unset=True)
    return [f"--set={key}={json.dumps(value)}" for key, value in config.items()]


def train(tiny: Tiny, runs: Path, *more: str) -> Result:
    """Train a study `once`. MLflow's database is not in `runs`: it would take most of a small disk."""
    mlflow = f"--mlflow-uri=sqlite:///{tiny.folder}/mlflow.db"
    return bilora_ray("train", "--name=once", *settings(tiny), f"--storage-path={runs}", mlflow, *more)


@pytest.fixture(scope="session")
def trained(tiny: Tiny) -> Path:
    """The storage path of a run that is done; only to be read."""
    assert train(tiny, tiny.folder / "runs").exit_code == 0
    return tiny.folder / "runs"


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """The same, to do with as one likes."""
    return shutil.copytree(trained, tmp_path / "runs")


def line_of(result: Result) -> str:
    """The one line of a command that ended as one should whose machine failed."""
    assert result.exit_code == 2, (result.output, result.exception)
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert "Traceback" not in result.output
    return line.removeprefix("Error: ")


def half_written(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.startswith(".") or path.name.endswith(".tmp")]


@pytest.mark.parametrize("kib", [0, 60, 120, 180, 240])
def test_train_on_a_full_disk_says_so_and_how_to_go_on(kib: int, tiny: Tiny, disk: Disk) -> None:
    disk.fill(but_for=kib * 1024)
    runs = disk.folder / "runs"
    line = line_of(train(tiny, runs))
    assert "No space left on device" in line or "disk is full" in line
    assert str(runs) in line
    assert half_written(runs) == []
    disk.free()
    assert train(tiny, runs, *(["--resume"] if line.endswith(GO_ON) else [])).exit_code == 0


def test_the_disk_of_what_is_temporary_is_named_when_it_is_full(
    tiny: Tiny, disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(disk.folder))
    disk.fill(but_for=8192)
    line = line_of(train(tiny, tmp_path / "runs"))
    assert line.startswith(f"No space left on device: {disk.folder}")
    assert line.endswith(GO_ON)
    disk.free()
    assert train(tiny, tmp_path / "runs", "--resume").exit_code == 0


def test_storage_that_vanishes_amid_a_run_is_not_made_anew(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, away = tmp_path / "runs", tmp_path / "away"

    def take_away(*_: object) -> None:
        if runs.exists():
            runs.rename(away)

    with monkeypatch.context() as patch:
        patch.setattr(SearchProgress, "trial_reported", take_away)
        line = line_of(train(tiny, runs))
    assert line.endswith(GO_ON)
    assert str(runs) in line
    assert not runs.exists()
    away.rename(runs)
    assert train(tiny, runs, "--resume").exit_code == 0


def test_weights_that_cannot_be_read_now_fail_no_trial(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr(AutoModelForCausalLM, "from_pretrained", failing)
        line = line_of(train(tiny, tmp_path / "runs"))
    model = tiny.model("causal-lm")
    assert line == f"model_name_or_path: cannot load '{model}' (Stale file handle){GO_ON}"
    assert train(tiny, tmp_path / "runs", "--resume").exit_code == 0


@pytest.mark.parametrize("more", [[], ["--merge"]], ids=["adapter", "merged"])
def test_export_to_a_full_disk_leaves_nothing(more: list[str], trained: Path, disk: Disk) -> None:
    disk.fill(but_for=8192)
    result = bilora_ray("export", "once", f"--storage-path={trained}", f"--output={disk.folder}/out", *more)
    assert line_of(result).startswith(f"--output {disk.folder}/out: cannot be written (No space left on device")
    disk.free()
    assert list(disk.folder.iterdir()) == []


def test_what_a_merged_model_has_lost_is_told(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "export_merged", lambda *_: ["precision: is lost"])
    monkeypatch.setattr(servers, "advice_on", lambda *_: servers.Advice({"vLLM": "vllm serve a"}, []))
    typed = ["export", "once", f"--storage-path={trained}", "--merge"]
    shown = bilora_ray(*typed, "--output=a")
    assert (shown.stdout, shown.stderr) == (
        "Merged model of trial 0 is in a\nvLLM     vllm serve a\n",
        "Note: precision: is lost\n",
    )
    said = json.loads(bilora_ray(*typed, "--output=b", "--json").stdout)
    assert (said["notes"], said["serve"]) == (["precision: is lost"], {"vLLM": "vllm serve a"})
    adapter = ["export", "once", f"--storage-path={trained}", "--output=c", "--json"]
    assert "notes" not in json.loads(bilora_ray(*adapter).stdout)


def test_what_may_only_be_read_is_one_line(tiny: Tiny, trained: Path, disk: Disk, tmp_path: Path) -> None:
    runs = shutil.copytree(trained, disk.folder / "runs")
    (tmp_path / "space.yaml").write_text("study: {name: new}\ntrial: {}\n")
    disk.forbid_writing()
    search = ["tune", "--space=space.yaml", *settings(tiny), "--set=rho={low: 0.1, high: 1}", f"--storage-path={runs}"]
    for result in (train(tiny, runs, "--resume"), train(tiny, runs, "--name=new"), bilora_ray(*search)):
        assert "Read-only file system" in line_of(result)
    for verb in (["show"], ["show", "once"], ["export", "once", "--output=out"], ["train", "--study=once"]):
        result = bilora_ray(*verb, f"--storage-path={runs}")
        assert result.exit_code == 0 or "Read-only file system" in line_of(result)


@pytest.mark.parametrize("typed", ["settings", "settings --json", "--help", "tune --help", "validate space.yaml"])
def test_a_result_that_cannot_be_printed_is_one_line(typed: str, tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(
        "study: {name: s}\ntrial: {model_name_or_path: a/b, task: causal-lm, train_data: a/b}\n"
    )
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([COMMAND, *typed.split()], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, "Error: No space left on device\n")


def interrupted_by_a_signal() -> None:
    signal.raise_signal(signal.SIGTERM)


def interrupted_by_hand() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("interrupt", "code"), [(interrupted_by_hand, 130), (interrupted_by_a_signal, 143)])
@pytest.mark.parametrize("verb", ["evaluate", "export", "train", "tune"])
def test_an_interruption_before_anything_is_begun_is_one_line(
    verb: str,
    interrupt: Callable[[], None],
    code: int,
    tiny: Tiny,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (adapter,) = trained.glob("studies/once/trials/0000/adapters/*")
    (tmp_path / "space.yaml").write_text("study: {name: new}\ntrial: {}\n")
    typed: dict[str, list[str | Path]] = {
        "evaluate": ["evaluate", adapter],
        "export": ["export", "once", f"--storage-path={trained}", f"--output={tmp_path}/merged", "--merge"],
        "train": ["train", "--name=new", *settings(tiny)],
        "tune": ["tune", "--space=space.yaml", *settings(tiny), "--set=rho={low: 0.1, high: 1}", "--dry-run"],
    }
    monkeypatch.setattr(quiet, "quiet", interrupt)
    before = signal.getsignal(signal.SIGTERM)
    result = bilora_ray(*typed[verb])
    assert (result.exit_code, result.stdout, result.stderr) == (code, "", "Interrupted\n")
    assert signal.getsignal(signal.SIGTERM) is before
    assert half_written(tmp_path) == []


@pytest.mark.parametrize("gone", ["the trial", "the adapter"])
def test_an_adapter_that_is_gone_is_said_to_be(gone: str, copied: Path, tmp_path: Path) -> None:
    trial = copied / "studies" / "once" / "trials" / "0000"
    (adapter,) = (trial / "adapters").iterdir()
    was = trial if gone == "the trial" else adapter
    shutil.rmtree(was)
    shown = bilora_ray("show", "once", f"--storage-path={copied}")
    assert shown.exit_code == 0, shown.exception
    assert f"Adapter  gone; it was in {was.relative_to(tmp_path)}\n" in shown.stdout
    assert "Take it" not in shown.stdout
    result = bilora_ray("export", "once", f"--storage-path={copied}", "--output=out")
    assert line_of(result) == f"study 'once': the adapter of trial 0 is gone; it was in {was}"


@pytest.mark.parametrize("name", ["my runs", "a#b", "ü&=+"])
def test_a_storage_path_of_any_name_is_used(name: str, tiny: Tiny, tmp_path: Path) -> None:
    assert train(tiny, tmp_path / name).exit_code == 0
    shown = bilora_ray("show", "--json", f"--storage-path={tmp_path / name}")
    assert [study["study"] for study in json.loads(shown.stdout)] == ["once"]


@pytest.mark.parametrize("name", ["a?b", "100%", "{runs}", "a%20b"])
def test_a_storage_path_that_a_url_cannot_hold_is_refused(name: str, tiny: Tiny, tmp_path: Path) -> None:
    sign = next(sign for sign in name if sign in "?%{}")
    (tmp_path / "space.yaml").write_text("study: {name: new}\ntrial: {}\n")
    option = f"--storage-path={tmp_path / name}"
    submit = ["submit", "--space=space.yaml", "--address=http://127.0.0.1:9", "--insecure"]
    for result in (
        train(tiny, tmp_path / name),
        bilora_ray("train", "--study=once", option),
        bilora_ray("tune", "--space=space.yaml", *settings(tiny), "--set=rho={low: 0.1, high: 1}", option),
        bilora_ray("tune", "--space=space.yaml", *settings(tiny), "--set=rho={low: 0.1, high: 1}", "--dry-run", option),
        bilora_ray(*submit, option),
        *(bilora_ray(*verb, option) for verb in (["show"], ["show", "s"], ["ui"], ["export", "s", "--output=out"])),
    ):
        assert line_of(result) == f"--storage-path {tmp_path / name}: may not hold {sign}; MLflow could not use it"
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("content", [None, b"not a database", b""])
def test_ui_refuses_what_holds_no_runs(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "mlflow.db"
    if content is not None:
        file.write_bytes(content)
    assert line_of(bilora_ray("ui", f"--mlflow-uri=sqlite:///{file}")).startswith(f"--mlflow-uri sqlite:///{file}: ")
    assert file.exists() is (content is not None)


def test_a_storage_path_that_is_a_file_is_one_line(tiny: Tiny, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for result in (
        train(tiny, file),
        train(tiny, file, "--resume"),
        *(bilora_ray(*verb, f"--storage-path={file}") for verb in (["show"], ["show", "s"], ["ui"])),
        bilora_ray("export", "s", "--output=out", f"--storage-path={file}"),
    ):
        assert str(file) in line_of(result)


def test_without_a_home_only_what_is_in_it_is_refused(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_: object) -> None:
        raise KeyError("uid not found")

    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", unknown)
    assert line_of(bilora_ray("show", "--storage-path=~/runs")) == "~/runs: Could not determine home directory."
    refused = "--mlflow-uri http://mlflow.example.org: "
    assert line_of(train(tiny, Path("runs"), "--mlflow-uri=http://mlflow.example.org")).startswith(refused)


@pytest.mark.parametrize("deaf", [False, True])
def test_a_command_that_a_script_starts_in_the_background_hears_sigterm(deaf: bool, tmp_path: Path) -> None:
    """To SIGINT it is deaf."""
    code = (
        "import os, signal, sys\n"
        f"signal.signal(signal.SIGINT, signal.SIG_IGN if {deaf} else signal.default_int_handler)\n"
        "from bilora_ray.cli import main, settings\n"
        "settings.command.callback = lambda **_: os.kill(os.getpid(), signal.SIGTERM)\n"
        "main.main(['settings'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (143, "Interrupted\n")


def test_who_reads_enough_of_a_study_ends_it_quietly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BrokenPipeError), naming_the_database(Layout(tmp_path)):
        raise BrokenPipeError(32, "Broken pipe")
