"""Tags of words: which token learns one, what an entity is, and that measures are those of all words at once."""

from __future__ import annotations

import io
import json.decoder
import tokenize
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from sklearn.metrics import f1_score
from tiny_trials import Tiny, run_fit, write_rows
from transformers import AutoTokenizer

from bilora_ray.config import TrialConfig
from bilora_ray.errors import UserError
from bilora_ray.training.data.order import shuffled
from bilora_ray.training.evaluate import evaluate, load_adapted, predict
from bilora_ray.training.folder import TrialFolder
from bilora_ray.training.loading import load_data
from bilora_ray.training.metrics import IGNORED
from bilora_ray.training.rehearsal import rehearse
from bilora_ray.training.rows import load_rows, notes
from bilora_ray.training.tasks.token_classification import entities, tag_f1

TASK = "token-classification"
NAMES = ("B-COLOUR", "I-COLOUR", "O")


def config(tiny: Tiny, path: Path, rows: list[dict[str, Any]], **settings: Any) -> TrialConfig:
    data = str(write_rows(path / "rows.jsonl", rows))
    return tiny.config(TASK, train_data=data, validation_data=data, **settings)


def labels_by_token(tiny: Tiny, path: Path, words: list[str], tags: list[Any]) -> list[tuple[str, Any]]:
    """Each token that the model reads, and the tag that it learns."""
    data = load_data(config(tiny, path, [{"text": words, "label": tags}], label_names=NAMES))
    tokens = [data.tokenizer.decode([token]) for token in data.train[0].input_ids]
    names = data.label_names or ()
    tags = [None if tag == IGNORED else names[tag] for tag in data.train[0].labels]
    return list(zip(tokens, tags, strict=True))


# What is learned


def test_the_first_token_of_a_word_learns_its_tag(tiny: Tiny, tmp_path: Path) -> None:
    # The tiny tokenizer knows " red" and " times", and spells what is at the beginning or that it does not know.
    found = labels_by_token(tiny, tmp_path, ["say", "red", "qed", "times"], ["O", "B-COLOUR", "I-COLOUR", "O"])
    assert [token for token, _ in found] == ["<s>", "s", "ay", " red", " ", "q", "e", "d", " times", "</s>"]
    # A space that is a token of its own is the end of the word before it.
    assert [tag for _, tag in found] == [None, "O", None, "B-COLOUR", None, "I-COLOUR", None, None, "O", None]


@pytest.mark.parametrize("seed", range(5))
def test_each_word_learns_its_tag_once_and_in_order(seed: int, tiny: Tiny, tmp_path: Path) -> None:
    random = Random(seed)
    words = ["".join(random.choices("abré日 ç🙂redsay", k=random.randrange(1, 6))) for _ in range(8)]
    tags = random.choices(NAMES, k=8)
    found = labels_by_token(tiny, tmp_path, words, tags)
    visible = [tag for word, tag in zip(words, tags, strict=True) if word.strip()]
    assert [tag for _, tag in found if tag is not None] == visible


def test_indices_stand_for_tags_whose_names_are_given(tiny: Tiny, tmp_path: Path) -> None:
    found = labels_by_token(tiny, tmp_path, ["say", "red"], [2, 0])
    assert [tag for _, tag in found if tag] == ["O", "B-COLOUR"]


def test_blank_words_and_those_without_a_tag_learn_nothing(tiny: Tiny, tmp_path: Path) -> None:
    found = labels_by_token(tiny, tmp_path, ["say", "", " ", "red", "times"], ["O", "O", "O", -100, "O"])
    assert [tag for _, tag in found if tag] == ["O", "O"]
    rows = load_rows(config(tiny, tmp_path, [{"text": ["a", "b", "c"], "label": [0, -100, 1]}]))
    assert rows.label_names == ("0", "1")


def test_a_row_that_is_too_long_loses_its_end_and_is_counted(tiny: Tiny, tmp_path: Path) -> None:
    rows = [{"text": ["say", *["red"] * count], "label": ["O"] * (count + 1)} for count in (1, 2, 40)]
    rows[0]["label"][0] = "B-X"
    data = load_data(config(tiny, tmp_path, rows, max_length=6))
    assert [len(example.input_ids) for example in data.train] == [5, 6, 6]
    assert [sum(tag != IGNORED for tag in example.labels) for example in data.train] == [2, 3, 3]
    assert (data.truncation["train"].cut, data.truncation["train"].dropped) == (1, 0)
    assert list(data.truncation["train"].notes({"truncation": "both", "predict_with_generate": False})) == []
    left = load_data(config(tiny, tmp_path, rows, max_length=6, truncation="drop"))
    assert (len(left.train), left.truncation["train"].dropped) == (2, 1)


def test_a_row_without_words_is_left_out(tiny: Tiny, tmp_path: Path) -> None:
    rows = [{"text": ["a", "b"], "label": ["x", "y"]}, {"text": [], "label": []}]
    data = load_data(config(tiny, tmp_path, rows))
    assert (len(data.train), data.truncation["train"].dropped) == (1, 1)


def test_a_dry_run_shows_the_words_and_their_tags(tiny: Tiny, tmp_path: Path) -> None:
    found = rehearse(config(tiny, tmp_path, [{"text": ["say", "red"], "label": ["O", "B-COLOUR"]}]))
    assert (found.input, found.target) == ("<s>say red</s>", "O B-COLOUR")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (
            {"text": "say red", "label": ["O", "O"]},
            ": column 'text' must be a list with an item for each word, not str",
        ),
        ({"text": ["a"], "label": "O"}, ": column 'label' must be a list with an item for each word, not str"),
        ({"text": ["a", "b"], "label": ["O"]}, ": 2 words in 'text' and 1 tags in 'label'"),
        ({"text": ["a", ["b"]], "label": ["O", "O"]}, ", word 2: column 'text' must be text or a number, not list"),
        (
            {"text": ["a", "b"], "label": ["O", "B-COLOR"]},
            ", word 2: label 'B-COLOR' is not among the labels (B-COLOUR, I-COLOUR, O)",
        ),
        ({"text": ["a"]}, ": no column 'label' (label_column); columns: text"),
    ],
)
def test_what_is_wrong_in_a_row_is_named_by_its_word(
    row: dict[str, Any], problem: str, tiny: Tiny, tmp_path: Path
) -> None:
    first = {"text": ["a", "b"], "label": ["O", "B-COLOUR"]}
    with pytest.raises(UserError) as caught:
        load_rows(config(tiny, tmp_path, [first, row], label_names=NAMES))
    assert str(caught.value) == f"{tmp_path}/rows.jsonl, line 2{problem}"


def test_a_tokenizer_that_does_not_know_places_is_refused(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny.model(TASK))
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(UserError, match=r"^model_name_or_path: the tokenizer of .* can't say where a word is$"):
        load_data(config(tiny, tmp_path, [{"text": ["a", "b"], "label": ["x", "y"]}]))


def test_numbers_for_tags_are_noted(tiny: Tiny, tmp_path: Path) -> None:
    line = "label_names: the tags are numbers; with names such as O, B-PER, I-PER eval_f1 would be that of entities"
    for tags, told in (([0, 1], True), (["O", "B-PER"], False)):
        trial = config(tiny, tmp_path, [{"text": ["a", "b"], "label": tags}])
        assert (line in list(notes(load_rows(trial), trial, 1))) is told


# What is measured


def conlleval(tags: list[str]) -> set[tuple[str, int, int]]:
    """Entities by the two questions of the CoNLL script: whether one ends before a word, whether one starts at it."""
    found, start = set(), None
    before, kind_before = "O", ""
    for place, tag in enumerate([*tags, "O"]):
        prefix, _, kind = tag.partition("-")
        ends = (
            (before == "B" and prefix in "BSO")
            or (before == "I" and prefix in "BSO")
            or before in ("E", "S")
            or (before != "O" and kind != kind_before)
        )
        starts = (
            prefix in ("B", "S")
            or (before in ("E", "S", "O") and prefix in ("E", "I"))
            or (prefix != "O" and kind != kind_before)
        )
        if ends and start is not None:
            found.add((kind_before, start, place))
            start = None
        if starts:
            start = place
        before, kind_before = prefix, kind
    return found


def test_entities_are_those_of_the_conll_script() -> None:
    tags = ["O", *(f"{prefix}-{kind}" for prefix in "BIES" for kind in ("PER", "LOC"))]
    for length in range(4):
        for row in product(tags, repeat=length):
            assert entities(row) == conlleval(list(row)), row
    random = Random(0)
    for _ in range(300):
        row = random.choices(tags, k=12)
        assert entities(row) == conlleval(row), row


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("B-PER I-PER O B-LOC", {("PER", 0, 2), ("LOC", 3, 4)}),
        ("I-PER I-PER I-LOC", {("PER", 0, 2), ("LOC", 2, 3)}),
        ("B-PER B-PER", {("PER", 0, 1), ("PER", 1, 2)}),
        ("B-PER I-PER L-PER U-LOC", {("PER", 0, 3), ("LOC", 3, 4)}),
        ("O O", set()),
        ("", set()),
    ],
)
def test_entities(tags: str, found: set[tuple[str, int, int]]) -> None:
    assert entities(tags.split()) == found


def test_f1_is_of_whole_entities() -> None:
    names = ("B-PER", "I-PER", "B-LOC", "O")
    reference = [["B-PER", "I-PER", "O"], ["B-LOC"], ["O", "B-PER"]]
    predicted = [["B-PER", "O", "O"], ["B-LOC"], ["O", "B-LOC"]]  # of three one is right, and three were found
    assert tag_f1(predicted, reference, names) == pytest.approx(2 * 1 / (3 + 3))
    assert tag_f1(reference, reference, names) == 1
    assert tag_f1([["O"]], [["O"]], names) == 0
    # An entity does not go on in the next row.
    assert tag_f1([["B-PER"], ["I-PER"]], [["B-PER", "I-PER"], []], names) == 0


@pytest.mark.parametrize("seed", range(5))
def test_f1_of_other_tags_is_the_mean_over_those_that_occur(seed: int) -> None:
    random = Random(seed)
    names = ("NOUN", "VERB", "DET", "O", "X")
    predicted, reference = ([random.choices(names[:4], k=7) for _ in range(3)] for _ in range(2))
    flat = [[tag for row in rows for tag in row] for rows in (reference, predicted)]
    assert tag_f1(predicted, reference, names) == pytest.approx(f1_score(*flat, average="macro"))


def test_an_evaluation_is_the_same_in_batches_of_any_size_and_that_of_all_words_at_once(
    tiny: Tiny, tmp_path: Path
) -> None:
    trial = tiny.config(TASK, max_steps=10, eval_steps=10)
    run_fit(trial, tmp_path)
    model, data, _ = load_adapted(TrialFolder(tmp_path).best_adapter(), trial)
    found = []
    for size in (1, 5, 30):
        named = trial.model_copy(update={"label_names": data.label_names, "per_device_eval_batch_size": size})
        found.append(evaluate(model, data.validation, named, data.tokenizer))
        assert found[-1] == pytest.approx(found[0], rel=1e-5)
    rows = predict(model, data, trial, 100)
    predicted, reference = ([getattr(row, side).split() for row in rows] for side in ("prediction", "reference"))
    pairs = [pair for row in zip(predicted, reference, strict=True) for pair in zip(*row, strict=True)]
    assert found[0]["eval_accuracy"] == sum(given == wanted for given, wanted in pairs) / len(pairs)
    ours, theirs = ([(n, *e) for n, row in enumerate(rows) for e in conlleval(row)] for rows in (predicted, reference))
    right = len(set(ours) & set(theirs))
    assert found[0]["eval_f1"] == pytest.approx(2 * right / (len(ours) + len(theirs)))
    losses = []
    for example in data.validation:
        with torch.inference_mode():
            ids = torch.tensor([example.input_ids.tolist()])
            scores = model(input_ids=ids).logits[0].double().log_softmax(-1)
        losses += [-float(scores[place, tag]) for place, tag in enumerate(example.labels) if tag != IGNORED]
    assert len(losses) == len(pairs)
    assert found[0]["eval_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_a_real_language_is_learned(minilm: Path, tiny: Tiny, tmp_path: Path) -> None:
    """The kinds of tokens in a module of Python's library: names, operators, strings and numbers."""
    source = Path(json.decoder.__file__).read_text(encoding="utf-8")
    kinds = {tokenize.NAME: "name", tokenize.OP: "operator", tokenize.STRING: "string", tokenize.NUMBER: "number"}
    words: dict[int, list[tuple[str, str]]] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in kinds and len(token.string) < 20:
            words.setdefault(token.start[0], []).append((token.string, kinds[token.type]))
    lines = [words[line] for line in sorted(words) if 3 < len(words[line]) < 12]
    rows = [{"text": [word for word, _ in line], "label": [kind for _, kind in line]} for line in lines]
    rows = [rows[number] for number in shuffled(len(rows), "lines")]
    data = [str(write_rows(tmp_path / f"{name}.jsonl", part)) for name, part in (("a", rows[40:]), ("b", rows[:40]))]
    given = {"model_name_or_path": str(minilm), "train_data": data[0], "validation_data": data[1]}
    steps = {"max_steps": 12, "eval_steps": 12, "learning_rate": 5e-3, "metric": "eval_accuracy"}
    _, progress = run_fit(tiny.config(TASK, **given, **steps), tmp_path / "trial")
    tags = [kind for row in rows[:40] for kind in row["label"]]
    majority = max(tags.count(kind) for kind in set(tags)) / len(tags)
    assert majority < 0.65
    assert progress.best_value is not None
    assert progress.best_value > 0.9
