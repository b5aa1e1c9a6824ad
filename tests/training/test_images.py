"""Images: from wherever they are stored to the pixels that a model reads, and every wrong one in a line."""

from __future__ import annotations

import builtins
import hashlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from tiny_trials import Tiny, evaluate_adapter, run_fit, write_images, write_rows
from transformers import (
    AutoImageProcessor,
    ConvNextConfig,
    ConvNextForImageClassification,
    LevitConfig,
    LevitForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
)
from transformers.image_utils import load_image

from bilora_ray.cli.main import main
from bilora_ray.config import TrialConfig
from bilora_ray.errors import UserError
from bilora_ray.recipe import evaluation_config
from bilora_ray.search.space_file import absolute_sources
from bilora_ray.training.data.files.images import StoredImage, pixels, stored
from bilora_ray.training.folder import TrialFolder
from bilora_ray.training.loading import load_data
from bilora_ray.training.rehearsal import rehearse
from bilora_ray.training.rows import load_rows, notes
from bilora_ray.training.tasks import TASKS

TASK = "image-classification"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images, in a folder for each label."""
    return write_images(tmp_path_factory.mktemp("images") / "six", 6)


def settings(tiny: Tiny, data: Path | str, **others: Any) -> TrialConfig:
    return tiny.config(TASK, train_data=str(data), validation_data=str(data), **others)


def refused(tiny: Tiny, data: Path | str, **others: Any) -> str:
    with pytest.raises(UserError) as caught:
        load_rows(settings(tiny, data, **others))
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


# Sources


def encoded(path: Path) -> dict[str, Any]:
    """An image as the Hub stores it."""
    return {"bytes": path.read_bytes(), "path": path.name}


def table(path: Path, rows: list[dict[str, Any]]) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet of bytes", "parquet of paths", "parquet of both", "hub"])
def test_images_are_the_same_from_everywhere(
    kind: str, folder: Path, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder, tmp_path / "six")
    files = sorted(folder.rglob("*.png"))
    rows = [{"image": f"six/{file.relative_to(folder)}", "label": file.parent.name} for file in files]
    whole = [{"image": encoded(file), "label": file.parent.name} for file in files]
    if kind == "jsonl":
        data: Path | str = write_rows(tmp_path / "rows.jsonl", rows)
    elif kind == "csv":
        data = tmp_path / "rows.csv"
        data.write_text("image,label\n" + "".join(f"{row['image']},{row['label']}\n" for row in rows))
    elif kind == "hub":
        data = "someone/images"
        hub = datasets.Dataset.from_list(whole).cast_column("image", datasets.Image())
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: hub)
    elif kind == "parquet of both":
        data = table(tmp_path / "x.parquet", whole)
    else:
        of_bytes = kind == "parquet of bytes"
        named = [{"image": {"bytes": None, "path": row["image"]}, "label": row["label"]} for row in rows]
        bare = [{"image": row["image"]["bytes"], "label": row["label"]} for row in whole]
        data = table(tmp_path / "x.parquet", bare if of_bytes else named)
    split = {"validation_split": "test"} if kind == "hub" else {}
    expected, found = (load_data(settings(tiny, source, **more)) for source, more in ((folder, {}), (data, split)))
    assert found.label_names == ("bad", "good")
    ours, theirs = (TASKS[TASK].collate(loaded.train, loaded.tokenizer) for loaded in (found, expected))
    assert torch.equal(ours["labels"], theirs["labels"])
    assert torch.equal(ours["pixel_values"], theirs["pixel_values"])
    assert ours["pixel_values"].shape == (6, 3, 16, 16)


def test_relative_paths_start_at_the_file_that_names_them(folder: Path, tiny: Tiny, tmp_path: Path) -> None:
    for split, label in (("a", "bad"), ("b", "good")):
        image = next((folder / label).glob("*.png"))
        (tmp_path / split).mkdir()
        shutil.copy(image, tmp_path / split / "x.png")
        write_rows(tmp_path / split / "rows.jsonl", [{"image": "x.png", "label": label}])
    data = {f"{key}_data": str(tmp_path / split / "rows.jsonl") for key, split in (("train", "a"), ("validation", "b"))}
    rows = load_rows(tiny.config(TASK, label_names=("bad", "good"), **data))
    paths = [row.image.path for split in (rows.train, rows.validation) for row in split]  # type: ignore[attr-defined]
    assert paths == [str(tmp_path / "a" / "x.png"), str(tmp_path / "b" / "x.png")]


def test_another_column_may_hold_the_images(folder: Path, tiny: Tiny, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    names = [str(file.relative_to(folder)) for file in sorted(folder.rglob("*.png"))]
    data = write_rows(tmp_path / "metadata.jsonl", [{"file_name": name, "kind": name[:3]} for name in names])
    rows = load_rows(settings(tiny, data, image_column="file_name", label_column="kind"))
    assert rows.label_names == ("bad", "goo")
    line = f"{data}, line 1: no column 'image' (image_column); columns: file_name, kind"
    assert refused(tiny, data, label_column="kind") == line


def test_a_folder_is_a_source_as_a_file_is(folder: Path, tiny: Tiny, tmp_path: Path) -> None:
    base = folder.parent
    assert absolute_sources({"train_data": folder.name}, base, "W") == {"train_data": str(folder)}
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty is a folder"):
        absolute_sources({"train_data": "empty"}, tmp_path, "W")


def test_the_digest_of_a_folder_is_of_its_names_and_sizes(folder: Path, tiny: Tiny, tmp_path: Path) -> None:
    def digest(path: Path) -> str:
        return load_rows(settings(tiny, path)).digests["train_data"]

    copy = shutil.copytree(folder, tmp_path / "elsewhere")
    before = digest(folder)
    assert digest(copy) == before
    image = next(copy.rglob("*.png"))
    image.write_bytes(image.read_bytes() + b"\0")
    assert digest(copy) != before


def test_the_digest_of_a_table_is_of_the_sizes_of_its_images_too(folder: Path, tiny: Tiny, tmp_path: Path) -> None:
    def digest(path: Path) -> str:
        return load_rows(settings(tiny, path)).digests["train_data"]

    shutil.copytree(folder, tmp_path / "imgs")
    names = sorted(f"imgs/{path.relative_to(folder)}" for path in folder.rglob("*.png"))
    data = write_rows(tmp_path / "x.jsonl", [{"image": name, "label": name.split("/")[1]} for name in names])
    before = digest(data)
    assert load_data(settings(tiny, data)).digests["train_data"] == before
    assert digest(shutil.copytree(tmp_path, tmp_path.parent / "elsewhere") / "x.jsonl") == before
    (tmp_path / names[-1]).write_bytes((tmp_path / names[-1]).read_bytes() + b"\0")
    assert digest(data) == load_data(settings(tiny, data)).digests["train_data"] != before
    held = table(tmp_path / "x.parquet", [{"image": encoded(tmp_path / name), "label": name[5:8]} for name in names])
    assert digest(held) == hashlib.sha256(held.read_bytes()).hexdigest()[:16]


def test_an_image_that_is_in_both_splits_is_told_by_its_content(folder: Path, tiny: Tiny, tmp_path: Path) -> None:
    files = sorted(folder.rglob("*.png"))
    rows = [{"image": {**encoded(file), "path": "x.png"}, "label": file.parent.name} for file in files]
    table(tmp_path / "train.parquet", rows)
    for name, part in (("same", rows[:2]), ("other", [{**row, "image": encoded(files[0])} for row in rows[-1:]])):
        config = tiny.config(
            TASK,
            train_data=str(tmp_path / "train.parquet"),
            validation_data=str(table(tmp_path / f"{name}.parquet", part)),
            label_names=("bad", "good"),
        )
        told = [line for line in notes(load_rows(config), config, 1) if "training rows too" in line]
        assert bool(told) is (name == "same")


# Pixels


def saved(image: Image.Image, path: Path, **options: Any) -> Path:
    image.save(path, **options)
    return path


def painted(mode: str = "RGB") -> Image.Image:
    values = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3) * 3
    return Image.fromarray(values).convert(mode)


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("RGB", "png"),
        ("L", "png"),
        ("LA", "png"),
        ("1", "png"),
        ("P", "gif"),
        ("RGBA", "png"),
        ("RGBA", "webp"),
        ("CMYK", "jpg"),
        ("CMYK", "tif"),
        ("YCbCr", "jpg"),
        ("RGB", "bmp"),
    ],
)
def test_any_image_becomes_the_rgb_that_transformers_would_load(mode: str, suffix: str, tmp_path: Path) -> None:
    path = saved(painted(mode), tmp_path / f"x.{suffix}")
    found = pixels(stored(str(path), "w"))
    assert (found.mode, found.size) == ("RGB", (6, 4))
    assert np.array_equal(np.asarray(found), np.asarray(load_image(str(path))))


def test_a_camera_that_was_held_sideways_is_heeded(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = saved(painted(), tmp_path / "x.png", exif=exif)
    found = pixels(stored(str(path), "w"))
    assert found.size == (4, 6)
    assert np.array_equal(np.asarray(found), np.asarray(painted().transpose(Image.Transpose.ROTATE_270)))


def test_an_image_is_decoded_for_its_batch_only(folder: Path, tiny: Tiny) -> None:
    data = load_data(settings(tiny, folder))
    examples = [example for example in data.train if example.image is not None]
    assert all(image.data is None and Path(image.path).is_absolute() for image in (e.image for e in examples) if image)
    assert [example.length for example in examples] == [1] * 6
    assert [example.input_ids.tolist() for example in examples] == [[]] * 6


# What is wrong


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("gone.png", "the image {folder}/gone.png cannot be read as an image (no such file)"),
        (
            "text.png",
            "the image {folder}/text.png cannot be read as an image (cannot identify image file '{folder}/text.png')",
        ),
        ("empty.png", "the image {folder}/empty.png cannot be read as an image (cannot identify image file"),
        (".", "the image {folder} cannot be read as an image (Is a directory: {folder})"),
        (
            "deep.png",
            "the image {folder}/deep.png has pixels of more than 8 bits (mode I;16); convert it to 8 bits",
        ),
        (
            "float.tif",
            "the image {folder}/float.tif has pixels of more than 8 bits (mode F); convert it to 8 bits",
        ),
        (7, "must be an image or the path of one, not int"),
        (["x.png"], "must be an image or the path of one, not list"),
        ({"bytes": None, "path": None}, "must be an image or the path of one, not dict"),
        ("", "must be an image or the path of one, not str"),
        (None, "column 'image' has no value"),
    ],
)
def test_an_image_that_cannot_be_read_is_named_with_its_row(
    value: Any, problem: str, tiny: Tiny, tmp_path: Path
) -> None:
    saved(painted(), tmp_path / "x.png")
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").touch()
    Image.fromarray(np.full((2, 2), 40_000, dtype=np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(np.zeros((2, 2), dtype=np.float32)).save(tmp_path / "float.tif")
    rows = [{"image": "x.png", "label": "a"}, {"image": value, "label": "b"}]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    assert refused(tiny, data).startswith(f"{data}, line 2: {problem.format(folder=tmp_path)}")


def test_an_image_whose_end_is_missing_is_told_when_it_is_needed(tiny: Tiny, tmp_path: Path) -> None:
    path = saved(Image.effect_noise((64, 64), 50), tmp_path / "x.png")
    path.write_bytes(path.read_bytes()[:1000])
    image = stored(str(path), "rows.jsonl, line 9")
    with pytest.raises(UserError) as caught:
        pixels(image)
    assert str(caught.value).startswith(f"rows.jsonl, line 9: the image {path} cannot be read as an image (")
    rows = [{"image": "x.png", "label": label} for label in "ab"]
    config = settings(tiny, write_rows(tmp_path / "rows.jsonl", rows))
    with pytest.raises(UserError, match=r"rows.jsonl, line [12]: the image .*x.png cannot be read as an image"):
        run_fit(config, tmp_path / "trial")


def test_bytes_that_are_no_image_are_named_with_their_row(tiny: Tiny, tmp_path: Path) -> None:
    good = io.BytesIO()
    painted().save(good, "PNG")
    rows = [{"image": {"bytes": data, "path": None}, "label": "a"} for data in (good.getvalue(), b"no image")]
    data = table(tmp_path / "x.parquet", rows)
    problem = refused(tiny, data, label_names=("a", "b"))
    assert problem.startswith(f"{data}, row 2: the image cannot be read as an image (cannot identify image file")


def test_without_pillow_the_extra_is_named(folder: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    to_import = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == "PIL":
            raise ImportError(name)
        return to_import(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    line = "task: images need the package Pillow: pip install 'bilora-ray[images]'"
    assert refused(tiny, folder) == line


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        (["a/x.png", "a/notes.txt"], "{folder}/a/notes.txt is among images and has the suffix of none; allowed: .bmp,"),
        (["a/x.png", "y.png"], "{folder}/y.png must be in a folder of {folder} that its label names"),
        (
            ["metadata.csv", "y.png"],
            "{folder}/y.png must be in a folder of {folder} that its label names; did you mean {folder}/metadata.csv, "
            "with image_column: file_name?",
        ),
        (
            ["test/a/x.png", "train/a/x.png"],
            "{folder}/test/a/x.png must be in a folder of {folder} that its label names; did you mean {folder}/test?",
        ),
        (["a/.hidden/x.png", ".b/x.png"], "no images in {folder}; each must be in a folder that its label names"),
    ],
)
def test_a_folder_that_is_arranged_otherwise_is_told(
    files: list[str], problem: str, tiny: Tiny, tmp_path: Path
) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        saved(painted(), tmp_path / name, format="PNG")
    assert refused(tiny, tmp_path).startswith(f"train_data: {problem.format(folder=tmp_path)}")


def test_what_file_managers_and_people_leave_beside_images_is_passed_over(
    folder: Path, tiny: Tiny, tmp_path: Path
) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    for name in ("README.md", "bad/Thumbs.db", "bad/.DS_Store", "good/desktop.ini", ".git/x.png"):
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).touch()
    assert len(load_rows(settings(tiny, copy)).train) == 6


def test_a_text_task_takes_no_folder_of_images(folder: Path, tiny: Tiny) -> None:
    with pytest.raises(UserError, match="is a folder"):
        load_rows(tiny.config("causal-lm", train_data=str(folder)))


# Models

SWIN = SwinConfig(image_size=16, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2)
CONVNEXT = ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)
SIZES: dict[str, Any] = {"hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 2, 2], "key_dim": [4, 4, 4]}
LEVIT = LevitConfig(image_size=16, depths=[1, 1, 1], **SIZES)
RESNET = ResNetConfig(hidden_sizes=[8, 16], depths=[1, 1], embedding_size=8, layer_type="basic")


def other_model(kind: Any, config: Any, tiny: Tiny, path: Path) -> str:
    torch.manual_seed(0)
    kind(config).save_pretrained(path)
    shutil.copy(tiny.model(TASK) / "preprocessor_config.json", path)
    return str(path)


@pytest.mark.parametrize(
    ("kind", "config", "precision"),
    [
        (SwinForImageClassification, SWIN, "fp32"),
        # Convolutions, which do not round what they read by themselves.
        (ConvNextForImageClassification, CONVNEXT, "bf16"),
        # Batch normalisation, whose statistics no adapter holds.
        (LevitForImageClassification, LEVIT, "fp32"),
    ],
    ids=["swin", "convnext", "levit"],
)
def test_other_architectures_train_and_are_exported(
    kind: Any, config: Any, precision: str, tiny: Tiny, tmp_path: Path
) -> None:
    model = other_model(kind, config, tiny, tmp_path / "model")
    trial = tiny.config(TASK, model_name_or_path=model, precision=precision, max_steps=6, eval_steps=3)
    rehearse(trial)
    reports, progress = run_fit(trial, tmp_path / "trial")
    adapter = TrialFolder(tmp_path / "trial").best_adapter()
    best = next(report for report in reports if report["step"] == progress.best_step)
    assert evaluate_adapter(adapter, trial) == {name: best[name] for name in trial.available_metrics}


def test_a_network_without_linear_layers_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    model = other_model(ResNetForImageClassification, RESNET, tiny, tmp_path / "model")
    for targets, problem in (
        ("all-linear", "adapters are on linear layers, and ResNetForImageClassification has none beside its head"),
        (("convolution",), "the auxiliary perturbs linear layers only, not "),
    ):
        with pytest.raises(UserError) as caught:
            rehearse(tiny.config(TASK, model_name_or_path=model, target_modules=targets))
        assert str(caught.value).startswith(f"target_modules: {problem}")


def test_a_base_without_an_image_processor_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny.model(TASK), tmp_path / "model")
    (copy / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=f"^model_name_or_path: cannot load '{copy}' "):
        load_data(tiny.config(TASK, model_name_or_path=str(copy)))


def test_positions_of_a_models_texts_do_not_limit_images(tiny: Tiny, tmp_path: Path) -> None:
    from bilora_ray.search.preflight import positions

    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"max_position_embeddings": 8}}))
    assert positions(tiny.config(TASK, model_name_or_path=str(tmp_path))) is None


def test_real_digits_are_learned(tiny: Tiny, tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    for number, (image, label) in enumerate(zip(digits.images[:400], digits.target, strict=False)):
        path = tmp_path / ("train" if number < 300 else "test") / str(label) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15.9).astype(np.uint8)).save(path)
    data = {"train_data": str(tmp_path / "train"), "validation_data": str(tmp_path / "test")}
    config = tiny.config(TASK, **data, max_steps=60, eval_steps=60, metric="eval_accuracy", learning_rate=5e-3)
    _, progress = run_fit(config, tmp_path / "trial")
    majority = max(np.bincount(digits.target[300:400])) / 100
    assert majority < 0.2
    assert progress.best_value is not None
    assert progress.best_value > 0.6


# From the command line


@pytest.fixture(scope="module")
def adapter(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapter")
    run_fit(tiny.config(TASK, max_steps=12, eval_steps=12), path)
    found = TrialFolder(path).best_adapter()
    assert found is not None
    return found


def test_an_adapter_is_evaluated_on_a_folder(adapter: Path, folder: Path) -> None:
    arguments = ["evaluate", str(adapter), "--data", str(folder), "--json", "--examples", "6"]
    found = json.loads(CliRunner().invoke(main, arguments, catch_exceptions=False).stdout)
    files = sorted(folder.rglob("*.png"))
    assert [example["input"] for example in found["examples"]] == list(map(str, files))
    assert [example["reference"] for example in found["examples"]] == [file.parent.name for file in files]
    right = sum(example["prediction"] == example["reference"] for example in found["examples"])
    assert found["eval_accuracy"] == right / 6


def test_what_plain_transformers_makes_of_a_file_is_what_was_measured(adapter: Path, folder: Path, tiny: Tiny) -> None:
    from peft import PeftModel
    from transformers import AutoModelForImageClassification

    base = AutoModelForImageClassification.from_pretrained(tiny.model(TASK), num_labels=2)
    model = PeftModel.from_pretrained(base, str(adapter)).eval()
    processor = AutoImageProcessor.from_pretrained(tiny.model(TASK), backend="pil")
    data = {"train_data": str(folder), "validation_data": str(folder)}
    metrics = evaluate_adapter(adapter, evaluation_config(adapter, data))
    losses = []
    for file in sorted(folder.rglob("*.png")):
        with torch.inference_mode():
            logits = model(**processor(load_image(str(file)), return_tensors="pt")).logits[0]
        losses.append(-float(logits.double().log_softmax(-1)[("bad", "good").index(file.parent.name)]))
    assert metrics["eval_loss"] == pytest.approx(sum(losses) / 6, rel=1e-4)


def test_stored_images_are_told_apart_by_content_or_path() -> None:
    one, other = StoredImage("x.png", b"1", "w"), StoredImage("x.png", b"2", "w")
    assert repr(one) != repr(other)
    assert repr(one) == repr(StoredImage("y.png", b"1", "v"))
    assert repr(StoredImage("x.png", None, "w")) == "x.png"
