"""`bilora-ray submit` before and at the cluster's door: what is refused, what is sent, and nothing else."""

from __future__ import annotations

import io
import json
import shlex
import socket
import threading
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from click.testing import CliRunner, Result

from bilora_ray.cli import submit, tune
from bilora_ray.cli.main import main
from bilora_ray.cli.options import SEARCH_OPTIONS

ROW = '{"prompt": "1 + 1 =", "completion": " 2"}\n'
JOB = "raysubmit_1"


@dataclass
class Dashboard:
    """Stands for Ray's: notes what it is sent.

    Attributes:
        status: the HTTP status of every answer but those below.
        version: what it says of itself.
        answers: path -> status and text of another answer.
    """

    status: int = 200
    version: str = '{"version": "4", "ray_version": "2.60.0"}'
    answers: dict[str, tuple[int, str]] = field(default_factory=dict)
    requests: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)
    address: str = ""

    def answer(self, method: str, path: str) -> tuple[int, str]:
        if path in self.answers:
            return self.answers[path]
        if self.status != 200:
            return self.status, "no"
        if method == "GET" and path.startswith("/api/packages/"):
            return 404, "no such package"
        return 200, self.version if path == "/api/version" else json.dumps({"job_id": JOB, "submission_id": JOB})

    def sent(self, method: str, beginning: str) -> bytes:
        (body,) = [body for verb, path, _, body in self.requests if verb == method and path.startswith(beginning)]
        return body

    @property
    def job(self) -> dict[str, Any]:
        return json.loads(self.sent("POST", "/api/jobs/"))

    @property
    def words(self) -> list[str]:
        return shlex.split(self.job["entrypoint"])


@contextmanager
def listening(dashboard: Dashboard) -> Iterator[Dashboard]:
    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            dashboard.requests.append((self.command, self.path, dict(self.headers), body))
            status, text = dashboard.answer(self.command, self.path)
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        do_GET = do_PUT = do_POST = _answer

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    dashboard.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield dashboard
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def dashboard() -> Iterator[Dashboard]:
    with listening(Dashboard()) as found:
        yield found


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a space file, its data and its model; nothing in the environment speaks of a cluster."""
    here = tmp_path / "here"
    (here / "model").mkdir(parents=True)
    (here / "model" / "config.json").write_text("{}")
    (here / "data.jsonl").write_text(ROW * 20)
    write_space(here / "space.yaml")
    monkeypatch.chdir(here)
    # `submit` sets one of them: what a test has set, pytest sets back.
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "MLFLOW_TRACKING_URI", "BILORA_RAY_STORAGE_PATH"):
        monkeypatch.delenv(name, raising=False)
    return here


def write_space(path: Path, **trial: object) -> None:
    settings = {"model_name_or_path": "model", "task": "causal-lm", "train_data": "data.jsonl", **trial}
    path.write_text(yaml.safe_dump({"study": {"name": "s"}, "trial": {"rank": {"choice": [4, 8]}, **settings}}))


def run(address: str, *words: str, space: str = "space.yaml", storage: str = "/shared/runs") -> Result:
    typed = ["submit", f"--address={address}", f"--space={space}", f"--storage-path={storage}", *words]
    return CliRunner().invoke(main, typed)


def refusal(result: Result) -> str:
    """The one line that was printed."""
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    (line,) = result.stderr.splitlines()
    return line.removeprefix("Error: ")


NOWHERE = "http://127.0.0.1:1"
SHARED = "on storage that all nodes share, with an absolute path"
IGNORED = "left out of the upload by a .gitignore or .rayignore"


# Refused before anything is sent


@pytest.mark.parametrize(
    "address",
    ["auto", "127.0.0.1:8265", "ray://127.0.0.1:10001", "http://", "http://host:0", "http://host:port", "http://[::1"],
)
def test_an_address_of_another_kind_is_refused(here: Path, address: str) -> None:
    line = f"--address {address}: must be that of a Ray dashboard, as in http://HOST:8265"
    assert refusal(run(address)) == line


@pytest.mark.parametrize("name", ["RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"])
def test_the_address_may_be_in_the_environment(here: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "auto")
    result = CliRunner().invoke(main, ["submit", "--space=space.yaml", "--storage-path=/s"])
    assert refusal(result).startswith("--address auto: must be")


def test_a_password_is_neither_sent_nor_shown(here: Path) -> None:
    results = [run("http://me:secret@host:1"), run("ftp://me:secret@host"), run("http://me@host")]
    options = ("--mlflow-uri", "--study-database")
    results += [run(NOWHERE, f"{option}=postgresql://me:secret@host/db") for option in options]
    for result in results:
        assert "secret" not in refusal(result)
    for option, result in zip(options, results[-2:], strict=True):
        assert refusal(result).startswith(f"{option}: everybody on the cluster could read its password")


def test_a_relative_storage_path_is_refused(here: Path) -> None:
    line = "--storage-path runs: must be absolute, of a folder that all nodes of the cluster share"
    assert refusal(run(NOWHERE, storage="runs")) == line
    assert refusal(CliRunner().invoke(main, ["submit", "--address", NOWHERE, "--space", "space.yaml"])) == line


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--set=rnak=4"], "--set trial: unknown key 'rnak'; did you mean 'rank'?"),
        (
            ["--set=rank=4"],
            "space.yaml: no setting has a distribution, so there is nothing to search: bilora-ray train",
        ),
        (["--num-trials=0"], "Invalid value for '--num-trials': 0 is not in the range x>=1. See 'main submit --help'."),
        (["--set=train_data=nope.jsonl"], "--set trial.train_data: no such file: {here}/nope.jsonl"),
        (["--working-dir=nope"], "--working-dir nope: no such folder"),
    ],
    ids=lambda part: str(part)[:30],
)
def test_what_can_be_known_here_is_told_here(here: Path, words: list[str], line: str) -> None:
    assert refusal(run(NOWHERE, *words)) == line.format(here=here)


def test_the_space_file_must_be_sent_too(here: Path) -> None:
    (here / "other").mkdir()
    line = f"--space space.yaml: is outside --working-dir {here}/other, which is all that a job sees"
    assert refusal(run(NOWHERE, "--working-dir=other")) == line
    (here / ".rayignore").write_text("*.yaml\n")
    assert refusal(run(NOWHERE)) == f"--space space.yaml: is {IGNORED}"


def test_files_outside_are_named_with_what_to_do(here: Path) -> None:
    (here / "more.jsonl").write_text(ROW)
    for name in ("model", "more.jsonl"):
        (here / name).rename(here.parent / name)
    write_space(here / "space.yaml", model_name_or_path="../model")
    line = (
        "space.yaml: trial.model_name_or_path: ../model, --set trial.validation_data: ../more.jsonl: "
        f"outside --working-dir {here}; move it there, or put it {SHARED}"
    )
    assert refusal(run(NOWHERE, "--set=validation_data=../more.jsonl")) == line


@pytest.mark.parametrize("ignore", [".gitignore", ".rayignore", "model/.gitignore"])
def test_files_that_ray_would_leave_out_are_named(here: Path, ignore: str) -> None:
    (here / "model" / "model.safetensors").write_bytes(b"\0")
    (here / ignore).write_text("*.safetensors\ndata.jsonl\n")
    line = refusal(run(NOWHERE))
    assert line.startswith("space.yaml: trial.model_name_or_path: model")
    assert line.endswith(f": {IGNORED}; take it out of that file, or put it {SHARED}")
    assert ("data.jsonl" in line) == ("/" not in ignore)


def test_a_large_folder_is_refused_with_its_largest_files(here: Path) -> None:
    (here / "sub").mkdir()
    for name, mebibytes in (("a", 20), ("sub/b", 60), ("c", 30), ("d", 10)):
        with (here / name).open("wb") as file:
            file.truncate(mebibytes * 1024**2)
    assert refusal(run(NOWHERE)) == (
        f"--working-dir {here}: 120.0 MiB to upload, and Ray takes less than 100.0 MiB; "
        f"the largest are sub/b (60.0 MiB), c (30.0 MiB), a (20.0 MiB): name them in .rayignore, or put them {SHARED}"
    )
    (here / ".rayignore").write_text("sub\n")
    assert refusal(run(NOWHERE)).startswith(f"--address {NOWHERE}: ")


# Refused at the door


def test_an_address_where_nothing_listens(here: Path) -> None:
    assert refusal(run(NOWHERE)) == f"--address {NOWHERE}: no Ray dashboard answers (Connection refused)"
    line = refusal(run("http://host.invalid:8265", "--insecure"))
    assert line.startswith("--address http://host.invalid:8265: no Ray dashboard answers (")


@pytest.mark.parametrize(("status", "reason"), [(401, "Authentication required"), (403, "Authentication failed")])
def test_a_cluster_that_refuses_this_client(here: Path, dashboard: Dashboard, status: int, reason: str) -> None:
    dashboard.status = status
    assert refusal(run(dashboard.address)) == (
        f"--address {dashboard.address}: the cluster refuses this client ({reason}: no); "
        "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
    )
    assert len(dashboard.requests) == 1


@pytest.mark.parametrize("version", ["<html>", "{}", "[]", '{"ray_version": "x"}', '{"ray_version": "1.0"}'])
def test_another_server_is_told_from_a_dashboard(here: Path, dashboard: Dashboard, version: str) -> None:
    dashboard.version = version
    assert refusal(run(dashboard.address)).startswith(f"--address {dashboard.address}: ")


def test_what_speaks_no_http_or_not_at_all(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bilora_ray.search.cluster import submission

    monkeypatch.setattr(submission, "ANSWER_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert refusal(run(address)) == f"--address {address}: no Ray dashboard answers (timed out)"

        def babble() -> None:
            for _ in range(2):
                connection, _ = server.accept()
                with connection:
                    connection.recv(100)
                    connection.sendall(b"\0\0\x18\4\0\0\r\n\r\n")

        thread = threading.Thread(target=babble)
        thread.start()
        line = f"--address {address}: no Ray dashboard answers (what listens there does not speak HTTP)"
        # The connection that timed out still waits in the queue.
        assert refusal(run(address)) == line
        thread.join()


@pytest.mark.parametrize(
    ("path", "answer", "reason"),
    [
        ("/api/jobs/", (500, "Traceback:\n  there\nOSError: disk full"), "OSError: disk full."),
        ("/api/jobs/", (503, "try again later"), "Request failed with status code 503: try again later."),
    ],
)
def test_a_cluster_that_does_not_take_the_job(
    here: Path, dashboard: Dashboard, path: str, answer: tuple[int, str], reason: str
) -> None:
    dashboard.answers[path] = answer
    line = f"--address {dashboard.address}: the cluster does not take the job ({reason})"
    assert refusal(run(dashboard.address)) == line


# What is sent


def test_the_job_is_the_same_search(here: Path, dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "HF_TOKEN", "BILORA_RAY_STORAGE_PATH"):
        monkeypatch.setenv(name, "http://this-machine:1")
    result = run(f"{dashboard.address}/", "--set=rank={choice: [2, 4]}", "--num-trials=3", "--resume")
    assert result.exit_code == 0, result.output
    assert dashboard.words == [
        "bilora-ray",
        "tune",
        "--space=space.yaml",
        "--set=rank={choice: [2, 4]}",
        "--num-trials=3",
        "--resume",
        "--storage-path=/shared/runs",
        "--ray-address=auto",
    ]
    assert dashboard.job["runtime_env"].pop("working_dir").startswith("gcs://")
    assert dashboard.job["runtime_env"]["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "60"}
    assert b"this-machine" not in b"".join(body for *_, body in dashboard.requests)


def test_every_option_of_a_search_is_passed_on(here: Path, dashboard: Dashboard) -> None:
    typed = []
    for option in tune.command.params:
        if option.name in submit.CHANGED | {"ray_address"}:
            continue
        assert isinstance(option, click.Option)
        typed.append(option.opts[0] if option.is_flag else f"{option.opts[0]}=3")
    assert len(typed) >= len(SEARCH_OPTIONS) - 3
    typed.remove("--num-trials=3")  # which --extend excludes
    assert run(dashboard.address, *typed).exit_code == 0
    assert set(typed) <= set(dashboard.words)


def test_the_upload_is_what_was_counted(here: Path, dashboard: Dashboard) -> None:
    from bilora_ray.search.cluster.upload import read_upload

    outside = here.parent / "outside"
    outside.mkdir()
    (outside / "linked.txt").write_text("linked")
    (here / "link").symlink_to(outside)
    (here / "deep" / "deeper").mkdir(parents=True)
    for name in ("deep/ü.txt", "deep/deeper/kept", "deep/deeper/dropped", "dropped", "deep/empty"):
        (here / name).write_text(name)
    (here / "deep" / "empty").write_text("")
    (here / ".gitignore").write_text("/dropped\n")
    (here / "deep" / ".rayignore").write_text("deeper/dropped\n")
    for name in (".git", ".venv", "__pycache__"):
        (here / name).mkdir()
        (here / name / "file").write_text("x" * 1000)
    upload = read_upload(Path())
    assert run(dashboard.address).exit_code == 0
    package = dashboard.sent("PUT", "/api/packages/gcs/")
    with zipfile.ZipFile(io.BytesIO(package)) as archive:
        packed = {here / entry.filename: entry.file_size for entry in archive.infolist()}
    assert packed == upload.files
    assert {"link/linked.txt", "deep/deeper/kept", ".gitignore"} <= {str(path.relative_to(here)) for path in packed}
    assert not any("dropped" in path.name or ".venv" in path.parts for path in packed)
    assert len(package) == upload.size


def test_an_absolute_path_is_the_clusters(here: Path, dashboard: Dashboard) -> None:
    write_space(here / "space.yaml", model_name_or_path="/shared/no/model", validation_data="~/no.jsonl")
    (here / "data.jsonl").unlink()
    assert run(dashboard.address, "--set=train_data=/shared/no.jsonl").exit_code == 0
    assert "--set=train_data=/shared/no.jsonl" in dashboard.words


def test_relative_paths_mean_the_same_files_to_the_job(
    here: Path, dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job's current folder is the top of the upload, wherever this command was typed."""
    (here / "spaces").mkdir()
    write_space(here / "spaces" / "my space.yaml", model_name_or_path="../model", train_data="../data.jsonl")
    (here / "spaces" / "it's.jsonl").write_text(ROW)
    monkeypatch.chdir(here / "spaces")
    typed = ["--working-dir=..", "--set=validation_data=it's.jsonl", "--set=trial.train_data=../data.jsonl"]
    assert run(dashboard.address, *typed, space="my space.yaml").exit_code == 0
    space, *settings = dashboard.words[2:5]
    assert space == "--space=spaces/my space.yaml"
    assert settings == ['--set=validation_data="spaces/it\'s.jsonl"', '--set=train_data="data.jsonl"']


def test_of_a_choice_of_files_each_is_moved(here: Path, dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "other").mkdir()
    (here / "other" / "more.jsonl").write_text(ROW)
    monkeypatch.chdir(here / "other")
    choice = "{choice: [../data.jsonl, more.jsonl, /shared/most.jsonl]}"
    typed = ["--working-dir=..", f"--set=train_data={choice}", "--set=validation_data=more.jsonl"]
    assert run(dashboard.address, *typed, space="../space.yaml").exit_code == 0
    setting = dashboard.words[3].removeprefix("--set=train_data=")
    assert yaml.safe_load(setting) == {"choice": ["data.jsonl", "other/more.jsonl", "/shared/most.jsonl"]}


def test_a_folder_and_a_pattern_are_sent_whole_or_told(
    here: Path, dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "shards").mkdir()
    for number in (1, 2):
        (here / "shards" / f"{number}.jsonl").write_text(ROW)
    typed = ["--set=train_data=shards/*.jsonl", "--set=validation_data=shards"]
    assert run(dashboard.address, *typed).exit_code == 0
    assert dashboard.words[3:5] == ['--set=train_data="shards/*.jsonl"', '--set=validation_data="shards"']
    (here / ".gitignore").write_text("2.jsonl")
    names = "--set trial.train_data: shards/*.jsonl, --set trial.validation_data: shards"
    assert refusal(run(dashboard.address, *typed)).startswith(f"{names}: {IGNORED}; ")


# What is printed


def test_the_commands_that_follow_and_stop_it_are_printed(here: Path, dashboard: Dashboard) -> None:
    from ray.scripts.scripts import cli as ray

    result = run(dashboard.address)
    name, *lines = result.stdout.splitlines()
    assert (result.exit_code, name.split()) == (0, ["Job", JOB])
    assert [line.split()[:4] for line in lines] == [
        ["Follow", "ray", "job", "logs"],
        ["Status", "ray", "job", "status"],
        ["Stop", "ray", "job", "stop"],
    ]
    for line in lines:
        options = parsed(ray, line.split()[2:])
        assert (options["address"], options["job_id"]) == (dashboard.address, JOB)


def parsed(program: Any, words: Sequence[str]) -> dict[str, Any]:
    context, arguments = click.Context(program), list(words)
    while isinstance(program, click.Group):
        _, program, arguments = program.resolve_command(context, arguments)
        context = click.Context(program, parent=context)
    return program.make_context("ray", arguments, parent=context).params


def test_json_for_a_script(here: Path, dashboard: Dashboard) -> None:
    result = run(dashboard.address, "--json")
    assert json.loads(result.stdout) == {"job_id": JOB, "address": dashboard.address}
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("follow", "code", "line"),
    [
        (KeyboardInterrupt, 130, "Detached; job {job} goes on. Follow: ray job logs --follow --address {at} {job}"),
        (None, 1, "Error: --address {at}: answers no more. Job {job} may go on: ray job logs"),
        (("SUCCEEDED", 0, None), 0, ""),
        (("FAILED", 2, None), 2, ""),
        (("STOPPED", 130, None), 130, "Job {job} was stopped; what is done is kept. Go on: bilora-ray submit "),
        (("FAILED", 137, None), 137, "Job {job} ended with exit code 137; what is done is kept. Go on: bilora-ray "),
        (("FAILED", 1, "no space left"), 1, "Error: job {job} did not start: no space left"),
    ],
    ids=str,
)
def test_what_the_end_of_the_job_means(
    here: Path, dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch, follow: Any, code: int, line: str
) -> None:
    from bilora_ray.search.cluster import submission

    def ending(follower: submission.Follower) -> submission.Outcome | None:
        follower.write("the log\n")
        if follow is KeyboardInterrupt:
            raise KeyboardInterrupt
        return follow and submission.Outcome(*follow)

    monkeypatch.setattr(submission.Follower, "follow", ending)
    monkeypatch.setattr("sys.argv", ["bilora-ray", "submit", "--space=space.yaml"])
    result = run(dashboard.address, "--follow")
    assert (result.exit_code, result.stdout) == (code, "the log\n")
    last = result.stderr.splitlines()[-1]
    if line:
        assert last.startswith(line.format(job=JOB, at=dashboard.address))
        assert ("--resume" in last) == ("Go on" in last)
    else:
        assert last.split()[0] == "Stop"
    result = run(dashboard.address, "--follow", "--json")
    assert result.exit_code == code
    assert "the log\n" in result.stderr
    if follow is not KeyboardInterrupt:
        status, exit_code, _ = follow or (None, None, None)
        told = {"job_id": JOB, "address": dashboard.address, "status": status, "exit_code": exit_code}
        assert json.loads(result.stdout) == told
