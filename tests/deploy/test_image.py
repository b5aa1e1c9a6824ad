"""deploy/Dockerfile and .dockerignore, read as a builder reads them; no image is built."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

Instruction = tuple[str, str]


@pytest.fixture(scope="module")
def stages(deploy: Path) -> list[list[Instruction]]:
    """The instructions of each stage, FROM first."""
    text = re.sub(r"^\s*#.*\n", "", (deploy / "Dockerfile").read_text(), flags=re.M).replace("\\\n", " ")
    found: list[list[Instruction]] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        name, _, rest = line.partition(" ")
        if name == "FROM":
            found.append([])
        found[-1].append((name, rest.strip()))
    return found


def _all(stage: list[Instruction], name: str) -> list[str]:
    return [rest for instruction, rest in stage if instruction == name]


def test_the_base_is_pinned(stages: list[list[Instruction]]) -> None:
    bases = {stage[0][1].partition(" AS ")[0] for stage in stages}
    assert len(bases) == 1
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+@sha256:[0-9a-f]{64}", bases.pop())


def test_the_image_runs_as_the_user_of_the_manifests(deploy: Path, stages: list[list[Instruction]]) -> None:
    pod = yaml.safe_load((deploy / "kubernetes" / "raycluster.yaml").read_text())["spec"]["headGroupSpec"]["template"]
    security = pod["spec"]["securityContext"]
    final = stages[-1]
    assert _all(final, "USER") == [f"{security['runAsUser']}:{security['runAsGroup']}"]
    after = [name for name, _ in final[[name for name, _ in final].index("USER") :]]
    assert not {"RUN", "COPY", "ADD"} & set(after)
    # KubeRay starts the nodes with a command of its own, which an ENTRYPOINT would swallow.
    assert not _all(final, "ENTRYPOINT")


def test_the_final_stage_has_no_tools_for_building(stages: list[list[Instruction]]) -> None:
    runs = " ".join(_all(stages[-1], "RUN"))
    assert "pip" not in runs
    packages = re.findall(r"install --yes --no-install-recommends (.*?) &&", runs)
    assert [package.split() for package in packages] == [["wget"]]
    assert _all(stages[-1], "COPY")[0] == "--from=build /usr/local /usr/local"


def test_packages_are_those_of_the_constraints(stages: list[list[Instruction]]) -> None:
    installs = [run for stage in stages for run in _all(stage, "RUN") if "pip install" in run]
    assert len(installs) == 2
    for run in installs:
        assert "--constraint constraints.txt" in run
        assert "test" not in run, "what the tests need is not for an image"
    assert "'.[postgresql,quantization]'" in installs[1]
    assert _all(stages[0], "ARG") == ["TORCH_INDEX=https://pypi.org/simple"]
    assert '--index-url "$TORCH_INDEX"' in installs[0]
    assert installs[0].endswith(" torch")


def test_the_context_is_what_is_copied(root: Path, stages: list[list[Instruction]]) -> None:
    copied: set[str] = set()
    for stage in stages:
        assert not _all(stage, "ADD")
        for copy in _all(stage, "COPY"):
            if not copy.startswith("--from="):
                copied |= set(shlex.split(copy)[:-1])
    lines = [line for line in (root / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    assert {line.removeprefix("!") for line in lines if line.startswith("!")} == copied
    for source in copied:
        assert (root / source).exists(), source
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert {project["readme"], *project["license-files"], "pyproject.toml", "bilora_ray"} <= copied


def test_hadolint_is_content(deploy: Path, tool: Callable[[str], str]) -> None:
    done = subprocess.run([tool("hadolint"), str(deploy / "Dockerfile")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
