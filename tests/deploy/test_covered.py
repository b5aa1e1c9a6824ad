"""Every file of deploy/ is checked by a test, and its documentation points at things that exist."""

from __future__ import annotations

import re
from pathlib import Path

CHECKED_BY = {
    ".env.example": "test_compose.py",
    ".gitignore": "test_compose.py",
    "Dockerfile": "test_image.py",
    "README.md": "test_commands.py",
    "compose.yaml": "test_compose.py",
    "kubernetes/raycluster.yaml": "test_kubernetes.py",
    "kubernetes/rayjob.yaml": "test_kubernetes.py",
    "kubernetes/storage.yaml": "test_kubernetes.py",
    "ray-cluster.yaml": "test_aws.py",
    "slurm.sh": "test_slurm.py",
}


def _files(deploy: Path) -> set[str]:
    # deploy/.env is a user's own.
    return {str(path.relative_to(deploy)) for path in deploy.rglob("*") if path.is_file() and path.name != ".env"}


def test_each_file_has_its_test(deploy: Path) -> None:
    assert _files(deploy) == set(CHECKED_BY)
    for file, module in CHECKED_BY.items():
        assert Path(file).name in Path(__file__).with_name(module).read_text(), f"{module} does not read {file}"


def test_nothing_is_left_to_chance_or_given_away(deploy: Path) -> None:
    for file in _files(deploy):
        text = (deploy / file).read_text()
        assert not re.search(r":latest\b", text), file
        assert not re.search(r"BEGIN [A-Z ]*PRIVATE KEY|AKIA[0-9A-Z]{16}|hf_[A-Za-z0-9]{20}", text), file


def test_the_readme_points_at_what_exists(root: Path, deploy: Path) -> None:
    text = (deploy / "README.md").read_text()
    anchors = {
        re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in re.findall(r"^#+ (.+)$", text, re.M)
    }
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        path, _, anchor = link.partition("#")
        assert not path or (deploy / path).exists(), link
        assert not anchor or anchor in anchors, link
    for path in re.findall(r"\bdeploy/[\w./-]*\w", text):
        assert path == "deploy/.env" or (root / path).exists(), path


def test_the_readme_tells_of_each_way(deploy: Path) -> None:
    text = (deploy / "README.md").read_text()
    for title in ("Kubernetes", "Slurm", "AWS", "MLflow server"):
        section = re.split(r"^## ", text.split(f"\n## {title}\n")[1], flags=re.M)[0]
        for promise in ("**Storage.**", "**Auth.**", "**Resume.**", "**Clean-up.**"):
            assert promise in section, f"{title}: {promise}"
