"""What came with a Ray job is copied beside its study, under a name that only its content decides."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bilora_ray.errors import UserError
from bilora_ray.library.asked import Asked
from bilora_ray.library.searching import check_search, rehearse
from bilora_ray.paths import SourcesElsewhere, data_files
from bilora_ray.search.cluster.inputs import keep_inputs
from bilora_ray.search.cluster.upload import check_upload, read_upload
from bilora_ray.search.space import Space
from bilora_ray.search.space_file import load_space
from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.studies import open_study


def job(folder: Path, package: str) -> Path:
    """The folder in which Ray unpacks a job's files, with some."""
    folder = folder / "session" / "working_dir_files" / f"_ray_pkg_{package}"
    (folder / "model" / "deep").mkdir(parents=True)
    (folder / "model" / "config.json").write_text("{}")
    (folder / "model" / "deep" / "weights").write_bytes(b"\0\1")
    for name in ("a", "b", "held-out"):
        (folder / f"{name}.jsonl").write_text(f'{{"prompt": "{name}", "completion": "x"}}\n')
    return folder


def space_in(folder: Path, points: str = "[{train_data: b.jsonl}]", **trial: Any) -> Space:
    settings: dict[str, Any] = {
        "model_name_or_path": "model",
        "task": "causal-lm",
        "train_data": "{choice: [a.jsonl, b.jsonl]}",
        "validation_data": "held-out.jsonl",
    }
    (folder / "space.yaml").write_text(
        f"study: {{name: s, points_to_evaluate: {points}}}\ntrial:\n"
        + "".join(f"  {key}: {value}\n" for key, value in {**settings, **trial}.items())
    )
    return load_space(folder / "space.yaml")


def test_a_job_on_another_cluster_finds_its_files_under_the_same_path(tmp_path: Path) -> None:
    storage, kept = tmp_path / "runs", []
    for package in ("0123abcd", "fe"):
        folder = job(tmp_path, package)
        (folder / "own.jinja").write_text("chat")
        known = {
            str(folder / "held-out.jsonl"): "d",
            f"model {folder / 'model'}": "m",
            f"chat template {folder / 'own.jinja'}": "t",
        }
        space, digests = keep_inputs(space_in(folder, messages_column="m", chat_template="own.jinja"), known, storage)
        kept.append((space.fixed, space.distributions, space.points_to_evaluate, digests))
    assert kept[0] == kept[1]
    fixed, distributions, points, digests = kept[0]
    model, held_out = Path(fixed["model_name_or_path"]), Path(fixed["validation_data"])
    a, b = distributions["train_data"].ends()
    assert (model / "deep" / "weights").read_bytes() == b"\0\1"
    assert (Path(str(a)).name, Path(str(a)).read_text()) == ("a.jsonl", '{"prompt": "a", "completion": "x"}\n')
    assert points == ({"train_data": b},)
    template = fixed["chat_template"]
    assert Path(template).read_text() == "chat"
    assert digests == {str(held_out): "d", f"model {model}": "m", f"chat template {template}": "t"}
    assert all(Path(path).is_relative_to(storage / "inputs") for path in (model, held_out, str(a), str(b)))
    # One folder each, and nothing of the copying.
    assert len(list((storage / "inputs").iterdir())) == 5


def test_where_copies_would_be_is_known_without_one(tmp_path: Path) -> None:
    folder, storage = job(tmp_path, "1"), tmp_path / "runs"
    known = {str(folder / "held-out.jsonl"): "d"}
    found = keep_inputs(space_in(folder), known, storage, copied=False)
    assert not storage.exists()
    assert keep_inputs(space_in(folder), known, storage) == found


def test_other_content_has_another_path(tmp_path: Path) -> None:
    folder, storage = job(tmp_path, "1"), tmp_path / "runs"
    before, _ = keep_inputs(space_in(folder), {}, storage)
    (folder / "held-out.jsonl").write_text('{"prompt": "new", "completion": "x"}\n')
    (folder / "model" / "deep" / "weights").rename(folder / "model" / "deep" / "renamed")
    after, _ = keep_inputs(space_in(folder), {}, storage)
    assert before.distributions == after.distributions
    assert before.fixed["validation_data"] != after.fixed["validation_data"]
    assert before.fixed["model_name_or_path"] != after.fixed["model_name_or_path"]
    assert "prompt" in Path(before.fixed["validation_data"]).read_text()


def test_files_that_came_with_no_job_stay_where_they_are(tmp_path: Path) -> None:
    folder = job(tmp_path, "1").rename(tmp_path / "mine")
    space = space_in(folder, model_name_or_path="org/name")
    assert keep_inputs(space, {"org/data/train": "d"}, tmp_path / "runs") == (space, {"org/data/train": "d"})
    assert not (tmp_path / "runs").exists()


def test_a_storage_path_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    folder = job(tmp_path, "1")
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(UserError, match=r"--storage-path .*/runs: cannot be written \("):
        keep_inputs(space_in(folder), {}, tmp_path / "runs")


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("shards", ["part-1.csv.gz", "part-2.csv.gz"]),
        ("shards/*-[12].csv*", ["part-1.csv.gz", "part-2.csv.gz"]),
        ("s*/part-2.csv.gz", ["part-2.csv.gz"]),
    ],
)
def test_a_folder_and_a_pattern_stay_whole(name: str, files: list[str], tmp_path: Path) -> None:
    folder = job(tmp_path, "1")
    (folder / "shards").mkdir()
    for file in ("part-1.csv.gz", "part-2.csv.gz"):
        (folder / "shards" / file).write_bytes(file.encode())
    space, digests = keep_inputs(
        space_in(folder, validation_data=f'"{name}"'), {f"{folder}/{name}": "d"}, tmp_path / "runs"
    )
    kept = space.fixed["validation_data"]
    assert Path(kept).is_relative_to(tmp_path / "runs" / "inputs")
    assert digests == {kept: "d"}
    assert [file.name for file in data_files(Path(kept))] == files
    assert [file.read_bytes().decode() for file in data_files(Path(kept))] == files


def test_an_upload_that_leaves_a_shard_out_is_told(tmp_path: Path) -> None:
    names = ("part-1.csv", "part-2.csv", ".gitignore")
    for name, content in zip(names, ("a", "b", "part-2.csv"), strict=True):
        (tmp_path / name).write_text(content)
    upload = read_upload(tmp_path)
    assert [upload.holds(tmp_path / name) for name in ("part-1.csv", "part-*.csv", "part-[1].csv", "")] == [
        True,
        False,
        True,
        False,
    ]


def test_a_chat_template_comes_along(tmp_path: Path) -> None:
    folder = job(tmp_path, "0123abcd")
    (folder / "own.jinja").write_text("x")
    space, _ = keep_inputs(space_in(folder, messages_column="m", chat_template="own.jinja"), {}, tmp_path / "runs")
    kept = Path(space.fixed["chat_template"])
    assert kept.is_relative_to(tmp_path / "runs" / "inputs")
    assert (kept.name, kept.read_text()) == ("own.jinja", "x")


def test_an_upload_that_leaves_an_image_of_a_folder_out_is_told(tmp_path: Path) -> None:
    pictures = tmp_path / "pics"
    for name in ("cat/x.png", "dog/y.png", "dog/.hidden.png", "dog/Thumbs.db"):
        (pictures / name).parent.mkdir(parents=True, exist_ok=True)
        (pictures / name).write_text("")
    (tmp_path / ".gitignore").write_text("Thumbs.db\n.hidden.png\n")
    assert read_upload(tmp_path).holds(pictures)
    (tmp_path / ".gitignore").write_text("cat\n")
    assert not read_upload(tmp_path).holds(pictures)


def of_images(folder: Path, names: Sequence[str], **trial: Any) -> Space:
    """A space whose table, in a folder of its own, names images; they need not be any here."""
    (folder / "tables").mkdir()
    (folder / "tables" / "rows.csv").write_text("image,label\n" + "".join(f"{name},a\n" for name in names))
    for name in names:
        path = folder / "tables" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    data = {f"{split}_data": "tables/rows.csv" for split in ("train", "validation")}
    return space_in(folder, points="[]", task="image-classification", **data, **trial)


def test_the_images_that_a_table_names_come_along(tmp_path: Path) -> None:
    folder, elsewhere = job(tmp_path, "1"), tmp_path / "shared.png"
    names = ["imgs/a.png", "../others/b.png", str(elsewhere)]
    space, _ = keep_inputs(of_images(folder, names), {}, tmp_path / "runs")
    kept = Path(space.fixed["train_data"])
    assert kept.is_relative_to(tmp_path / "runs" / "inputs")
    assert [(kept.parent / name).read_text() for name in names] == names
    assert len(list((tmp_path / "runs" / "inputs").rglob("*.png"))) == 2
    (folder / "others" / "b.png").write_text("another")
    again, _ = keep_inputs(load_space(folder / "space.yaml"), {}, tmp_path / "runs")
    assert again.fixed["train_data"] != str(kept)


def test_an_upload_that_leaves_an_image_of_a_table_out_is_told(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    outside = tmp_path.parent / "shared.png"
    of_images(tmp_path, ["imgs/a.png", str(outside)])

    def check() -> None:
        sources = SourcesElsewhere()
        space = load_space(tmp_path / "space.yaml", locate=sources)
        check_upload(read_upload(tmp_path), space, sources.local)

    check()
    (tmp_path / ".gitignore").write_text("*.png")
    with pytest.raises(UserError) as caught:
        check()
    where = f"{tmp_path / 'space.yaml'}: trial.train_data: tables/rows.csv"
    assert str(caught.value) == (
        f"{where}: the image {tmp_path / 'tables' / 'imgs' / 'a.png'} is outside the upload or ignored; put it below "
        f"--working-dir {tmp_path}, or the table and its images on storage that all nodes share, with an absolute path"
    )


def test_a_dry_run_in_another_job_asks_whether_the_study_may_go_on(tmp_path: Path) -> None:
    asked, model = Asked(layout=Layout(tmp_path / "runs"), resume=True), "builtin:quickstart/model"
    spaces = [
        space_in(job(tmp_path, package), model_name_or_path=model, max_length=64) for package in ("0123abcd", "fe")
    ]
    begun = check_search(spaces[0], asked, counted=False)
    space, digests = keep_inputs(begun.space, begun.checked.digests, asked.layout.storage_path)
    open_study(space, asked.layout, digests).next_trials()
    rehearse(check_search(spaces[1], asked, counted=False))
    (tmp_path / "session" / "working_dir_files" / "_ray_pkg_fe" / "held-out.jsonl").write_text(
        '{"prompt": "other", "completion": "x"}\n'
    )
    with pytest.raises(UserError, match="validation_data"):
        rehearse(check_search(spaces[1], asked, counted=False))
