"""Examples and batches with tokenizers small enough to read: one word is one token."""

from array import array
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from bilora_ray.checking import before
from bilora_ray.config import TrialConfig
from bilora_ray.errors import UserError
from bilora_ray.training.data.batches import eval_batches, in_row_order, train_batch
from bilora_ray.training.data.truncation import MOST_LEARNED, Truncation, is_gone
from bilora_ray.training.loading import Prepared, prepare
from bilora_ray.training.tasks import TASKS
from bilora_ray.training.tasks.base import Dataset, Row, padded
from bilora_ray.training.tasks.sequence_classification import LabelledRow
from bilora_ray.training.tasks.text import TextRow

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *"abcdefghij"]
PAD, BOS, EOS = 0, 1, 2
A, B, C, D, E = range(4, 9)


def word_tokenizer(single: str = "<s> $A", pair: str = "<s> $A </s> $B:1", **special: Any) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def config(task: str = "causal-lm", **settings: Any) -> TrialConfig:
    return TrialConfig(**{"model_name_or_path": "m", "train_data": "d", "task": task, **settings})


def prepared(rows: list[Row], tokenizer: Any = None, **settings: Any) -> Prepared:
    return prepare(Dataset(rows, rows, None, {}), config(**settings), tokenizer or word_tokenizer())


def text(prompt: str, completion: str = "") -> TextRow:
    return TextRow(prompt, completion, "d.jsonl, line 7")


def lists(example: Any) -> tuple[Any, ...]:
    prompt = None if example.prompt_ids is None else example.prompt_ids.tolist()
    return example.input_ids.tolist(), example.labels.tolist(), prompt


# causal-lm


@pytest.mark.parametrize("single", ["<s> $A", "<s> $A </s>"])
def test_a_completion_is_learned_with_its_end_and_the_prompt_is_not(single: str) -> None:
    data = prepared([text("a b", "c d")], word_tokenizer(single), predict_with_generate=True)
    assert lists(data.train[0]) == ([BOS, A, B, C, D, EOS], [-100, -100, -100, C, D, EOS], None)
    assert lists(data.validation[0]) == ([BOS, A, B, C, D, EOS], [-100, -100, -100, C, D, EOS], [BOS, A, B])
    assert data.validation[0].reference == "c d"
    assert data.truncation == {"train": Truncation(1, 0, 0), "validation": Truncation(1, 0, 0)}


def taken(**counts: int) -> Truncation:
    """That of one row, which is cut if it lost anything."""
    return Truncation(1, cut=int(bool(counts)), **counts)


# As 0.1.0 had it.
@pytest.mark.parametrize(
    ("single", "row", "limit", "ids", "prompt"),
    [
        ("$A", text("a b c", "d e"), 6, [A, B, C, D, E, EOS], [A, B, C]),
        ("$A", text("a b c", "d e"), 5, [B, C, D, E, EOS], [A, B, C]),
        ("<s> $A", text("a b c", "d e"), 5, [BOS, C, D, E, EOS], [BOS, A, B, C]),
        ("<s> $A", text("a b c d e", "d"), 4, [BOS, E, D, EOS], [BOS, D, E]),
        ("<s> $A", text("a b c", "a b c d"), 5, [BOS, C, A, B, C], [BOS, A, B, C]),
        ("$A", text("a b c", "a b c d"), 5, [C, A, B, C, D], [A, B, C]),
        ("<s> $A", text("", "a b c d"), 4, [BOS, A, B, C], [BOS]),
    ],
)
def test_what_is_cut(single: str, row: TextRow, limit: int, ids: list[int], prompt: list[int]) -> None:
    settings = {"truncation": "completion-first", "predict_with_generate": True, "max_new_tokens": 1}
    data = prepared([row], word_tokenizer(single), max_length=limit, **settings)
    example = data.validation[0]
    assert (example.input_ids.tolist(), lists(example)[2]) == (ids, prompt)
    whole = len((row.prompt + " " + row.completion).split()) + 1 + ("<s>" in single)
    assert data.truncation["validation"].cut == int(len(ids) < whole)
    assert data.truncation["validation"].completion_cut == int(ids[-1] != EOS)
    first = next(i for i, label in enumerate(example.labels) if label != -100)
    assert example.labels.tolist() == [-100] * first + ids[first:]


@pytest.mark.parametrize(
    ("truncation", "row", "ids", "counts"),
    [
        # What is not too long is whole whatever the rule is, and so is a completion that leaves the prompt its share.
        *[(rule, text("a", "a b c d e f"), [BOS, A, *range(A, A + 6), EOS], {}) for rule in MOST_LEARNED],
        ("completion-first", text("a b c d", "a b c d"), [BOS, C, D, A, B, C, D, EOS], {"prompt_cut": 1}),
        ("both", text("a b c d", "a b c d"), [BOS, C, D, A, B, C, D, EOS], {"prompt_cut": 1}),
        ("prompt-first", text("a b c d", "a b c d"), [BOS, A, B, C, D, A, B, C], {"completion_cut": 1}),
        # The prompt has its share, or less if it needs no more.
        (
            "both",
            text("a b c d", "a b c d e f g h i"),
            [BOS, C, D, *range(A, A + 5)],
            {"prompt_cut": 1, "completion_cut": 1},
        ),
        ("both", text("a", "a b c d e f g h i"), [BOS, A, *range(A, A + 6)], {"completion_cut": 1}),
        (
            "completion-first",
            text("a b c d", "a b c d e f g h i"),
            [BOS, D, *range(A, A + 6)],
            {"prompt_gone": 1, "completion_cut": 1},
        ),
        # One token of what is cut first is left.
        (
            "prompt-first",
            text("a b c d e f g h i", "a b"),
            [BOS, *range(A + 3, A + 9), A],
            {"prompt_cut": 1, "completion_cut": 1},
        ),
        ("completion-first", text("", "a b c d e f g h"), [BOS, *range(A, A + 7)], {"completion_cut": 1}),
        ("both", text("", "a b c d e f g h"), [BOS, *range(A, A + 7)], {"completion_cut": 1}),
        ("prompt-first", text("", "a b c d e f g h"), [BOS, *range(A, A + 7)], {"completion_cut": 1}),
    ],
)
def test_each_rule_of_truncation(truncation: str, row: TextRow, ids: list[int], counts: dict[str, int]) -> None:
    data = prepared([row], max_length=8 if counts else 9, truncation=truncation)
    assert data.train[0].input_ids.tolist() == ids
    assert data.truncation["train"] == taken(**counts)


def test_both_keep_a_share_unless_a_study_says_otherwise() -> None:
    row = text("a b c d", "a b c d e f g h i")
    assert prepared([row], max_length=8) == prepared([row], max_length=8, truncation="both")
    assert before(TrialConfig)["truncation"] == "completion-first"


def test_what_leaves_both_their_share_has_the_same_ids_as_before() -> None:
    for prompt, completion, length in product(range(1, 9), range(1, 7), range(8, 16)):
        row = text(" ".join("abcdefgh"[:prompt]), " ".join("abcdefgh"[:completion]))
        both, first = (prepared([row], max_length=length, truncation=rule) for rule in ("both", "completion-first"))
        room = length - 1
        fits = prompt + completion + 1 <= room or completion + 1 <= room * 3 // 4
        assert (both == first) or not fits


def test_rows_that_are_too_long_are_dropped_where_that_is_asked_for() -> None:
    rows: list[Row] = [text("a b c", "d e"), text("a b c d", "d e"), text("a", "b")]
    data = prepared(rows, max_length=7, truncation="drop", predict_with_generate=True, max_new_tokens=4)
    assert [lists(example)[0] for example in data.train] == [[BOS, A, B, C, D, E, EOS], [BOS, A, B, EOS]]
    assert data.truncation["train"] == Truncation(3, dropped=1)
    # A prompt makes room for what is written all the same.
    assert [lists(example)[2] for example in data.validation] == [[BOS, B, C], [BOS, A]]
    assert data.truncation["validation"] == Truncation(3, cut=1, dropped=1, prompt_cut=1)
    with pytest.raises(UserError) as caught:
        prepared(rows[:1], max_length=6, truncation="drop")
    assert str(caught.value) == "train_data: no row has max_length (6) tokens or less, and a token to predict"


def test_texts_and_pairs_that_are_too_long_are_dropped_too() -> None:
    rows: list[Row] = [text("a b c", "d e"), text("a b c d", "d"), text("a", "a b c d")]
    data = prepared(rows, word_tokenizer("$A </s>"), task="seq2seq-lm", max_length=4, truncation="drop")
    assert [lists(example)[:2] for example in data.train] == [([A, B, C, EOS], [D, E, EOS])]
    assert data.truncation["train"] == Truncation(3, dropped=2)
    labelled: list[Row] = [LabelledRow("a b", "c", 1, "w"), LabelledRow("a b c", "d e", 0, "w")]
    data = prepared(labelled, task="sequence-classification", max_length=5, truncation="drop")
    assert data.truncation["train"] == Truncation(2, dropped=1)


@pytest.mark.parametrize(
    ("kept", "whole", "gone"),
    [
        (0, 0, False),
        (1, 1, False),
        (0, 1, True),
        (1, 3, False),
        (1, 4, True),
        (1, 40, True),
        (7, 27, False),
        (7, 28, True),
        (8, 100, False),
    ],
)
def test_a_prompt_is_gone_that_keeps_next_to_nothing(kept: int, whole: int, gone: bool) -> None:
    assert is_gone(kept, whole) is gone


def test_a_prompt_that_leaves_what_is_written_its_room_may_be_gone() -> None:
    settings = {"max_length": 64, "predict_with_generate": True, "max_new_tokens": 60}
    data = prepared([text("a b c d e f g h i j a b", "b")], **settings)
    assert data.truncation == {"train": Truncation(1), "validation": taken(prompt_gone=1)}


def test_what_is_told_of_truncation() -> None:
    settings = {"max_length": 8, "truncation": "completion-first", "predict_with_generate": True}
    many = Truncation(100, cut=9, dropped=3, prompt_gone=2, prompt_cut=7, completion_cut=1)
    assert many.in_words(settings) == (
        "9 are cut to max_length 8 (whole prompt: 2, part of the input: 7, end of the completion: 1), "
        "3 have nothing to predict and are left out"
    )
    assert many.in_words(settings | {"truncation": "drop"}).endswith(
        ", 3 are too long or have nothing to predict and are left out"
    )
    assert list(many.notes(settings)) == [
        "max_length: 2 of 100 rows (2%) lose their whole prompt; "
        "raise it, or change truncation (completion-first) or max_new_tokens"
    ]
    assert Truncation.told_by(many.metrics()) == many
    assert Truncation.of([many, many]) == Truncation(200, 18, 6, 4, 14, 2)
    assert Truncation(100).in_words(settings) == "0 are cut to max_length 8"


@pytest.mark.parametrize(
    ("generates", "new", "prompt"),
    [
        (True, 1, [BOS, A, B, C, D]),
        (True, 3, [BOS, A, B, C, D]),
        (True, 4, [BOS, B, C, D]),
        (True, 6, [BOS, D]),
        # What is written for people only takes half of the room at the most.
        (False, 3, [BOS, A, B, C, D]),
        (False, 4, [BOS, B, C, D]),
        (False, 64, [BOS, B, C, D]),
    ],
)
def test_a_prompt_leaves_room_for_what_is_written(generates: bool, new: int, prompt: list[int]) -> None:
    settings = {"max_length": 8, "max_new_tokens": new, "predict_with_generate": generates}
    data = prepared([text("a b c d", "e")], **settings)
    assert lists(data.validation[0]) == ([BOS, A, B, C, D, E, EOS], [-100] * 5 + [E, EOS], prompt)
    kind = {"prompt_gone" if len(prompt) == 2 else "prompt_cut": 1} if generates and len(prompt) < 5 else {}
    assert data.truncation == {"train": Truncation(1), "validation": taken(**kind)}


@pytest.mark.parametrize("new", [7, 8, 64])
@pytest.mark.parametrize("generates", [True, False])
def test_a_text_that_would_leave_no_room_for_a_prompt_gets_half(generates: bool, new: int) -> None:
    settings = {"max_length": 8, "max_new_tokens": new, "predict_with_generate": generates}
    assert lists(prepared([text("a b c d", "e")], **settings).validation[0])[2] == [BOS, B, C, D]
    prepared([text("a", "e")], word_tokenizer("$A </s>"), task="seq2seq-lm", **settings)


def test_a_row_with_nothing_to_predict_is_dropped() -> None:
    rows: list[Row] = [text("", ""), text("a", ""), text("", "b")]
    data = prepared(rows, word_tokenizer("$A"))
    assert [example.input_ids.tolist() for example in data.train] == [[A, EOS], [B, EOS]]
    assert data.truncation["train"] == Truncation(3, 0, 1)


def test_what_cannot_be_prepared() -> None:
    def error(rows: list[Row], tokenizer: Any = None, **settings: Any) -> str:
        with pytest.raises(UserError) as caught:
            prepared(rows, tokenizer, **settings)
        return str(caught.value)

    plain = word_tokenizer("$A")
    assert error([text("", "")], plain) == "train_data: no row has a token to predict"
    assert error([text("", "a b")], plain, predict_with_generate=True) == "d.jsonl, line 7: there is no text to read"
    assert error([text("", "a")], plain, task="seq2seq-lm") == "d.jsonl, line 7: there is no text to read"
    assert error([text("a", "b")], word_tokenizer(eos_token=None)) == (
        "model_name_or_path: the tokenizer of m has no end of sequence"
    )
    problem = "messages_column: the tokenizer of m has no chat template; name a file in chat_template"
    assert error([text("a", "b")], messages_column="chat") == problem
    labelled: list[Row] = [LabelledRow("", None, 0, "d.tsv, line 2")]
    assert error(labelled, plain, task="sequence-classification") == "d.tsv, line 2: there is no text to read"


def test_a_leading_special_token_may_be_the_end_of_sequence() -> None:
    tokenizer = word_tokenizer("</s> $A", bos_token="</s>")
    data = prepared([text("", "a b"), text("c", "a")], tokenizer, predict_with_generate=True)
    assert lists(data.validation[0]) == ([EOS, A, B, EOS], [-100, A, B, EOS], [EOS])
    assert lists(data.validation[1]) == ([EOS, C, A, EOS], [-100, -100, A, EOS], [EOS, C])


# seq2seq-lm and sequence-classification


def test_seq2seq() -> None:
    rows: list[Row] = [text("a b", "c"), text("a b c d e", "a b c d e"), text("a", "a b c d")]
    tokenizer = word_tokenizer("$A </s>")
    data = prepared(rows, tokenizer, task="seq2seq-lm", max_length=4, predict_with_generate=True)
    assert lists(data.validation[0]) == ([A, B, EOS], [C, EOS], [A, B, EOS])
    assert lists(data.validation[1]) == ([A, B, C, EOS], [A, B, C, D], [A, B, C, EOS])
    assert lists(data.train[1]) == ([A, B, C, EOS], [A, B, C, D], None)
    assert lists(data.train[2]) == ([A, EOS], [A, B, C, D], None)
    assert data.truncation["train"] == Truncation(3, cut=2, prompt_cut=1, completion_cut=2)


def test_classification() -> None:
    rows: list[Row] = [LabelledRow("a b", None, 1, "w"), LabelledRow("a b c d e", None, 0, "w")]
    data = prepared(rows, word_tokenizer("<s> $A </s>"), task="sequence-classification", max_length=5)
    assert lists(data.train[0]) == ([BOS, A, B, EOS], [1], None)
    assert lists(data.train[1]) == ([BOS, A, B, C, EOS], [0], None)
    assert data.train[0].token_type_ids is None
    assert data.truncation["train"] == Truncation(2, cut=1, prompt_cut=1)


@pytest.mark.parametrize("has_types", [True, False])
def test_pairs(has_types: bool) -> None:
    inputs = ["input_ids", "attention_mask"] + ["token_type_ids"] * has_types
    rows: list[Row] = [LabelledRow("a", "b c", 1, "w"), LabelledRow("a b c d", "e", 0, "w")]
    tokenizer = word_tokenizer(model_input_names=inputs)
    data = prepared(rows, tokenizer, task="sequence-classification", max_length=5)
    assert [example.input_ids.tolist() for example in data.train] == [[BOS, A, EOS, B, C], [BOS, A, B, EOS, E]]
    batch = TASKS["sequence-classification"].collate(data.train, tokenizer)
    assert ("token_type_ids" in batch) is has_types
    if has_types:
        assert batch["token_type_ids"].tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]


def test_the_real_minilm_tokenizer(minilm: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    rows: list[Row] = [LabelledRow("a fine film", "yes", 1, "w"), LabelledRow("fine " * 400, "no", 0, "w")]
    data = prepared(rows, tokenizer, task="sequence-classification", max_length=300)
    assert tokenizer.decode(data.train[0].input_ids.tolist()) == "[CLS] a fine film [SEP] yes [SEP]"
    assert data.train[0].token_type_ids is not None
    assert data.train[0].token_type_ids.tolist() == [0, 0, 0, 0, 0, 1, 1]
    assert len(data.train[1].input_ids) == 300
    assert data.truncation["train"] == Truncation(2, cut=1, prompt_cut=1)


# Batches


@pytest.mark.parametrize(("num_rows", "size"), [(1, 4), (8, 4), (10, 4), (10, 1), (3, 100)])
def test_an_epoch_has_every_row_once(num_rows: int, size: int) -> None:
    batches = [train_batch(num_rows, size, 0, 0, index) for index in range(-(-num_rows // size))]
    assert sorted(row for batch in batches for row in batch) == list(range(num_rows))
    assert [len(batch) for batch in batches[:-1]] == [size] * (len(batches) - 1)
    assert not train_batch(num_rows, size, 0, 0, len(batches))


def test_the_order_is_that_of_seed_and_epoch() -> None:
    assert train_batch(5, 2, 0, 0, 1) == train_batch(5, 2, 0, 0, 1)
    orders = {tuple(train_batch(50, 50, seed, epoch, 0)) for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 10), (1, 1))}
    assert len(orders) == 5


def test_evaluation_is_grouped_by_length_and_put_back() -> None:
    lengths = [3, 9, 1, 9, 4, 7, 2]
    batches = eval_batches(lengths, 3)
    assert batches == [[1, 3, 5], [4, 0, 6], [2]]
    assert all(a >= b for a, b in pairwise(lengths[row] for batch in batches for row in batch))
    outputs = [f"row {row}" for batch in batches for row in batch]
    assert in_row_order(batches, outputs) == [f"row {row}" for row in range(7)]
    with pytest.raises(ValueError, match="shorter"):
        in_row_order(batches, outputs[:-1])


def test_collate_pads_at_the_right_and_prompts_at_the_left() -> None:
    rows: list[Row] = [text("a b c", "d"), text("a", "e")]
    # The padding token is the end of sequence, as it often is: the real end must stay visible and learned.
    examples = prepared(rows, predict_with_generate=True).validation
    batch = TASKS["causal-lm"].collate(examples, word_tokenizer(pad_token="</s>"))
    assert batch["input_ids"].tolist() == [[BOS, A, B, C, D, EOS], [BOS, A, E, EOS, EOS, EOS]]
    assert batch["attention_mask"].tolist() == [[1] * 6, [1, 1, 1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100] * 4 + [D, EOS], [-100, -100, E, EOS, -100, -100]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    prompts = padded([example.prompt_ids or array("i") for example in examples], PAD, left=True)
    assert prompts["input_ids"].tolist() == [[BOS, A, B, C], [PAD, PAD, BOS, A]]
    assert prompts["attention_mask"].tolist() == [[1] * 4, [0, 0, 1, 1]]
    assert TASKS["causal-lm"].target_count(examples) == 4


def test_collate_seq2seq_and_classification() -> None:
    rows: list[Row] = [text("a b c", "d"), text("a", "e b")]
    examples = prepared(rows, word_tokenizer("$A </s>"), task="seq2seq-lm", predict_with_generate=True).validation
    batch = TASKS["seq2seq-lm"].collate(examples, word_tokenizer())
    assert batch["input_ids"].tolist() == [[A, B, C, EOS], [A, EOS, PAD, PAD]]
    assert batch["labels"].tolist() == [[D, EOS, -100], [E, B, EOS]]
    assert TASKS["seq2seq-lm"].target_count(examples) == 5
    prompts = padded([example.prompt_ids or array("i") for example in examples], PAD)
    assert torch.equal(prompts["input_ids"], batch["input_ids"])
    labelled: list[Row] = [LabelledRow("a", None, 1, "w"), LabelledRow("b c", None, 0, "w")]
    examples = prepared(labelled, task="sequence-classification").train
    batch = TASKS["sequence-classification"].collate(examples, word_tokenizer())
    assert batch["labels"].tolist() == [1, 0]
    assert TASKS["sequence-classification"].target_count(examples) == 2


def test_a_causal_target_at_the_first_position_is_not_counted() -> None:
    examples = prepared([text("", "a b")], word_tokenizer("$A")).train
    assert TASKS["causal-lm"].target_count(examples) == 2
