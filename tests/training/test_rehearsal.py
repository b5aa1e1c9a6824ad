"""A dry run refuses what a trial would refuse, and loads no weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_trials import METHODS, TASKS, Tiny
from transformers import AutoTokenizer, RobertaConfig, RobertaForSequenceClassification

from bilora_ray.errors import UserError
from bilora_ray.measures import Task
from bilora_ray.training.folder import TrialFolder
from bilora_ray.training.loop import fit
from bilora_ray.training.rehearsal import rehearse


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task", TASKS)
def test_what_a_trial_takes_is_taken(task: Task, method: str, tiny: Tiny) -> None:
    found = rehearse(tiny.config(task, method=method))
    assert found.rows.keys() == {"train", "validation"}
    assert all(split.rows > 0 and split.cut == split.dropped == 0 for split in found.rows.values())


@pytest.mark.parametrize(
    ("task", "reads", "learns"),
    [
        ("causal-lm", "<s>{prompt}{completion}</s>", "{completion}</s>"),
        ("seq2seq-lm", "{prompt}</s>", "{completion}</s>"),
        ("sequence-classification", "<s>{text}</s>", "{label}"),
        ("multi-label-classification", "<s>{text}</s>", "{label[0]}"),
        ("regression", "<s>{text}</s>", "{label:g}"),
    ],
)
@pytest.mark.parametrize("label_names", [None, ("bad", "good", "red", "green", "blue")])
def test_it_shows_what_the_model_reads_and_learns(
    task: Task, reads: str, learns: str, label_names: tuple[str, ...] | None, tiny: Tiny
) -> None:
    config = tiny.config(task, label_names=label_names)
    row = json.loads(Path(config.train_data).read_text().splitlines()[0])
    found = rehearse(config)
    assert (found.input, found.target) == (reads.format(**row), learns.format(**row))


def test_rows_that_are_cut_are_counted(tiny: Tiny) -> None:
    found = rehearse(tiny.config("causal-lm", max_length=4))
    train = found.rows["train"]
    assert train.rows == train.cut == train.prompt_gone
    assert found.notes == (
        "max_length: 62 of 62 rows (100%) lose their whole prompt; raise it, or change truncation (both)",
        "max_length: 62 of 62 rows (100%) lose the end of their completion, so that they teach no end of sequence; "
        "raise it, or change truncation (both)",
    )
    assert rehearse(tiny.config("causal-lm")).notes == ()


def test_it_needs_no_weights(tiny: Tiny, tmp_path: Path) -> None:
    folder = Path(tiny.model("causal-lm"))
    shape = tmp_path / "shape"
    shape.mkdir()
    for file in folder.iterdir():
        if not file.name.endswith(".safetensors"):
            (shape / file.name).write_bytes(file.read_bytes())
    rehearse(tiny.config("causal-lm", model_name_or_path=str(shape)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"target_modules": ["nothing"]},
        {"target_modules": ["embed_tokens"]},
        {"max_length": 1_000_000},
        {"task": "seq2seq-lm"},
        {"prompt_template": "{nothing}"},
    ],
    ids=lambda wrong: " ".join(wrong),
)
def test_it_refuses_with_the_line_of_a_trial(wrong: dict[str, object], tiny: Tiny, tmp_path: Path) -> None:
    config = tiny.config("causal-lm").model_copy(update=wrong)
    with pytest.raises(UserError) as now:
        rehearse(config)
    with pytest.raises(UserError) as later:
        fit(config, TrialFolder(tmp_path), lambda _: True)
    assert str(now.value) == str(later.value)


def test_positions_that_begin_behind_the_paddings_are_fewer(tiny: Tiny, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny.model("sequence-classification"))
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = RobertaConfig(vocab_size=len(tokenizer), max_position_embeddings=34, pad_token_id=1, **shape)
    RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    settings = {"model_name_or_path": str(tmp_path), "target_modules": ("query",)}
    rehearse(tiny.config("sequence-classification", max_length=32, **settings))
    with pytest.raises(UserError, match="max_length: 33 is more than the model's 32 positions; write 32 or less"):
        rehearse(tiny.config("sequence-classification", max_length=33, **settings))
