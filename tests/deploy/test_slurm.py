"""deploy/slurm.sh: linted, run with stand-ins for Slurm and Ray, and run with Ray itself on this machine."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

STAND_IN = """#!{python}
import json, os, signal, subprocess, sys, time

name, arguments = os.path.basename(sys.argv[0]), sys.argv[1:]
record = {{
    "name": name,
    "arguments": arguments,
    "mode": os.environ.get("RAY_AUTH_MODE"),
    "token": os.environ.get("RAY_AUTH_TOKEN"),
    "hears_sigint": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
}}
if name != "python" or arguments[0] == "-":
    with open(os.environ["RECORDS"], "a") as file:
        file.write(json.dumps(record) + "\\n")


def rest():
    return arguments[next(at for at, word in enumerate(arguments) if not word.startswith("--")):]


def until_told(code):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(code))
    open(os.environ["RECORDS"] + ".running", "a").close()
    time.sleep(60)
    sys.exit("was never told to end")


if name == "srun":
    os.execvp(rest()[0], rest())
elif name == "scontrol" and arguments[0] == "show":
    print("node-a\\nnode-b\\nnode-c")
elif name == "hostname":
    print("fe80::1 10.0.0.7")
elif name == "ray":
    until_told(0)
elif name == "bilora-ray" and arguments[0] == "validate":
    print(json.dumps({{"study": {{"name": "my-study"}}}}))
elif name == "bilora-ray" and os.environ.get("LASTS"):
    until_told(130)
elif name == "bilora-ray":
    sys.exit(int(os.environ.get("ENDS_WITH", "0")))
elif name == "python" and arguments[0] != "-":
    os.execv({python!r}, [{python!r}, *arguments])
"""


class Job:
    """A Slurm job whose Slurm, Ray and bilora-ray only write down how they are called."""

    def __init__(self, script: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.script, self.folder, self.records_file = script, folder, folder / "records"
        programs = folder / "bin"
        programs.mkdir()
        for name in ("srun", "scontrol", "hostname", "ray", "bilora-ray", "python"):
            (programs / name).write_text(STAND_IN.format(python=sys.executable))
            (programs / name).chmod(0o755)
        for name in [name for name in os.environ if name.startswith(("BILORA_RAY_", "RAY_", "SLURM_", "MLFLOW_"))]:
            monkeypatch.delenv(name)
        self.environment = os.environ | {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "RECORDS": str(self.records_file),
            "SLURM_CPUS_PER_TASK": "8",
            "SLURM_JOB_ID": f"dry-{folder.name}",
            "SLURM_JOB_NODELIST": "node-[a-c]",
            "SLURM_SUBMIT_DIR": str(folder),
        }

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(self.script), *arguments],
            env=self.environment | environment,
            stderr=subprocess.PIPE,
            text=True,
        )

    def calls(self, name: str) -> list[dict[str, Any]]:
        records = [json.loads(line) for line in self.records_file.read_text().splitlines()]
        return [record for record in records if record["name"] == name]

    def searches(self) -> list[list[str]]:
        return [call["arguments"] for call in self.calls("bilora-ray") if call["arguments"][0] == "tune"]


@pytest.fixture
def job(deploy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """A job on three nodes, not started yet."""
    return Job(deploy / "slurm.sh", tmp_path, monkeypatch)


def test_shellcheck_and_bash_are_content(deploy: Path, tool: Callable[[str], str]) -> None:
    for command in ([tool("shellcheck")], ["bash", "-n"]):
        done = subprocess.run([*command, str(deploy / "slurm.sh")], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_sbatch_reads_its_options(deploy: Path) -> None:
    """Slurm reads #SBATCH lines only before the first command."""
    text = (deploy / "slurm.sh").read_text()
    options = dict(
        line.partition("=")[::2] for line in re.findall(r"^#SBATCH --(\S+)$", text.split("\nset -")[0], re.M)
    )
    assert text.count("#SBATCH --") == len(options)
    assert options["signal"] == "B:USR1@180"
    assert options["ntasks-per-node"] == "1"
    assert {"requeue", "exclusive"} <= set(options)
    assert os.access(deploy / "slurm.sh", os.X_OK)


def test_a_search_runs_on_all_nodes(job: Job) -> None:
    process = job.start("my_space.yaml", "--num-trials", "30")
    assert process.wait(30) == 0, process.stderr
    # Both start at once.
    head, workers = sorted((call["arguments"] for call in job.calls("ray")), key=lambda words: "--head" not in words)
    assert {"--head", "--node-ip-address=10.0.0.7", "--port=6379", "--num-cpus=8"} <= set(head)
    assert {"--address=10.0.0.7:6379", "--num-cpus=8", "--block"} <= set(workers)
    steps = [" ".join(call["arguments"]) for call in job.calls("srun")]
    assert steps[0] == "--nodes=1 --ntasks=1 --nodelist=node-a hostname --ip-address"
    assert any(step.startswith("--nodes=1 --ntasks=1 --nodelist=node-a ray start") for step in steps)
    assert any(step.startswith("--nodes=2 --ntasks=2 --ntasks-per-node=1 --exclude=node-a ray start") for step in steps)
    assert steps[-1].endswith(f"rm -rf /tmp/ray-{job.environment['SLURM_JOB_ID']}")
    (wait,) = job.calls("python")
    assert wait["arguments"][1:3] == ["10.0.0.7:6379", "3"]
    storage = str(job.folder / "runs")
    expected = ["tune", "--space", "my_space.yaml", "--ray-address", "10.0.0.7:6379", "--storage-path", storage]
    assert job.searches() == [[*expected, "--num-trials", "30"]]
    assert not [call for call in job.calls("scontrol") if call["arguments"][0] == "requeue"]


def test_what_it_calls_is_understood(job: Job, parse: Callable[[list[str]], dict[str, Any]]) -> None:
    assert job.start("my_space.yaml").wait(30) == 0
    for call in job.calls("ray") + job.calls("bilora-ray"):
        parse([call["name"], *call["arguments"]])


def test_ray_asks_for_a_token_that_no_command_line_shows(job: Job) -> None:
    job.start("my_space.yaml").wait(30)
    calls = job.calls("ray") + job.calls("bilora-ray") + job.calls("python")
    tokens = {call["token"] for call in calls}
    assert {call["mode"] for call in calls} == {"token"}
    assert len(tokens) == 1
    token = tokens.pop()
    assert re.fullmatch(r"[0-9a-f]{64}", token)
    assert not any(token in " ".join(call["arguments"]) for call in calls + job.calls("srun"))


def test_a_study_that_has_begun_is_resumed(job: Job) -> None:
    (job.folder / "elsewhere/studies/my-study/trials/0000").mkdir(parents=True)
    assert job.start("my_space.yaml", BILORA_RAY_STORAGE_PATH=str(job.folder / "elsewhere")).wait(30) == 0
    (search,) = job.searches()
    assert search[-3:] == ["--storage-path", str(job.folder / "elsewhere"), "--resume"]


@pytest.mark.parametrize(("told", "queued_again"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_a_signal_ends_it_cleanly(job: Job, told: signal.Signals, queued_again: bool) -> None:
    process = job.start("my_space.yaml", LASTS="yes")
    deadline = time.monotonic() + 30
    while not (job.records_file.exists() and job.searches()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(told)
    assert process.wait(30) == 130
    requeues = [call["arguments"] for call in job.calls("scontrol") if call["arguments"][0] == "requeue"]
    assert requeues == [["requeue", job.environment["SLURM_JOB_ID"]]] * queued_again
    # Bash starts background processes deaf to SIGINT unless told otherwise; the search ends by it.
    assert all(call["hears_sigint"] for call in job.calls("bilora-ray"))


def test_the_searchs_exit_code_is_the_jobs(job: Job) -> None:
    assert job.start("my_space.yaml", ENDS_WITH="2").wait(30) == 2
    assert not [call for call in job.calls("scontrol") if call["arguments"][0] == "requeue"]


def test_it_says_what_is_missing(job: Job) -> None:
    process = job.start()
    assert process.wait(30) == 2
    assert process.stderr is not None
    assert "usage: sbatch" in process.stderr.read()
    assert not job.records_file.exists()


@pytest.mark.slow
def test_ray_itself_searches_on_two_nodes_and_resumes(root: Path, job: Job) -> None:
    """Both nodes are this machine; Ray, its tokens and the search are real."""
    programs = job.folder / "bin"
    for name in ("ray", "bilora-ray", "python"):
        (programs / name).unlink()
    (programs / "srun").write_text('#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n')
    (programs / "scontrol").write_text("#!/bin/sh\nprintf 'one\\ntwo\\n'\n")
    (programs / "hostname").write_text(f"#!/bin/sh\necho {ray.util.get_node_ip_address()}\n")
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
    space = str(root / "search_spaces" / "quickstart.yaml")
    for trials in (1, 2):
        settings = {
            "PATH": path,
            "SLURM_CPUS_PER_TASK": "1",
            "SLURM_JOB_ID": f"{os.getpid()}",
            "BILORA_RAY_PORT": "6390",
        }
        process = job.start(space, "--num-trials", str(trials), "--set", "max_steps=10", **settings)
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        finished = list((job.folder / "runs/studies/quickstart/trials").iterdir())
        assert len(finished) == trials
    # One of the ports that Ray keeps for its workers: the head does not start, and nobody waits for it.
    process = job.start(space, **(settings | {"BILORA_RAY_PORT": "16379"}))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "Ray has ended on one of the nodes" in errors
    assert not Path(f"/tmp/ray-{os.getpid()}").exists()
