"""Encoders with decoders of many families learn what they would write: in their own form, by their own shift.

Each is taught by transformers alone, as its documentation says, until it writes every answer right. So whoever scores
it lower, or its texts, has asked for something else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_trials import write_rows
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import MBart50Tokenizer, MBartTokenizer, NllbTokenizer, PreTrainedTokenizerFast

from bilora_ray.config import TrialConfig
from bilora_ray.errors import UserError
from bilora_ray.training.evaluate import evaluate, load_adapted, predict
from bilora_ray.training.loading import load_data
from bilora_ray.training.tasks.text import set_languages

COLOURS = ("red", "green", "blue", "black", "white", "brown")
ROWS = [
    {"prompt": f"say {a} {b}", "completion": " ".join((b, a, a)[:length])}
    for a, b, length in zip(COLOURS, COLOURS[1:] + COLOURS[:1], (1, 2, 3, 3, 2, 1), strict=True)
]
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
PIECES = [f"▁{word}" for word in ("say", *COLOURS)]
LANGUAGES = {"src_lang": "fr_XX", "tgt_lang": "de_DE"}


def words(form: str) -> PreTrainedTokenizerFast:
    """A word is a token, and a text has the `form`."""
    vocabulary = {word: number for number, word in enumerate((*SPECIAL, "say", *COLOURS))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single=form, special_tokens=[("<s>", 0), ("</s>", 2)])
    names = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def pieces(kind: Any, **languages: str) -> Any:
    """A tokenizer that writes language codes, of which a word is a token."""
    return kind(vocab=[(word, -1.0) for word in (*SPECIAL, *PIECES)], **languages)


def of_t5(tokenizer: Any) -> dict[str, Any]:
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
    return {**shape, "decoder_start_token_id": 1}


def of_bart(tokenizer: Any) -> dict[str, Any]:
    sides = ("encoder", "decoder")
    shape = {f"{side}_{key}": value for side in sides for key, value in (("layers", 1), ("ffn_dim", 16))}
    shape |= {f"{side}_attention_heads": 2 for side in sides}
    none = {
        "encoder_layerdrop": 0.0,
        "decoder_layerdrop": 0.0,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "forced_eos_token_id": None,
    }
    rest = {"d_model": 16, "max_position_embeddings": 32, "decoder_start_token_id": 2, "forced_eos_token_id": None}
    return {**shape, **none, **rest}


@dataclass(frozen=True)
class Family:
    """A kind of model, its tokenizer, and what its configuration has."""

    name: str
    tokenizer: Callable[[], Any]
    shape: Callable[[Any], dict[str, Any]] = of_bart
    more: dict[str, Any] = field(default_factory=dict)
    model: str = "ForConditionalGeneration"


def plain() -> Any:
    return words("$A </s>")


def begun() -> Any:
    return words("<s> $A </s>")


def mbart50() -> Any:
    return pieces(MBart50Tokenizer, **LANGUAGES)


def mbart() -> Any:
    return pieces(MBartTokenizer, **LANGUAGES)


LED = {"max_encoder_position_embeddings": 32, "max_decoder_position_embeddings": 32, "attention_window": 4}
FAMILIES = [
    Family("T5", plain, of_t5, {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    Family("MT5", plain, of_t5),
    Family("UMT5", plain, of_t5),
    Family("Bart", begun, more={"forced_bos_token_id": 0, "forced_eos_token_id": 2}),
    Family("Bart", begun),
    Family("Mvp", begun),
    Family("LED", begun, more=LED),
    Family("Pegasus", plain, more={"decoder_start_token_id": 1}),
    Family("PegasusX", plain, more={"decoder_start_token_id": 1, "block_size": 4, "num_global_tokens": 2}),
    Family("BigBirdPegasus", begun, more={"attention_type": "original_full"}),
    Family("Marian", plain, more={"decoder_start_token_id": 1, "bad_words_ids": [[1]]}, model="MTModel"),
    Family("Blenderbot", plain, more={"decoder_start_token_id": 0}),
    Family("BlenderbotSmall", plain, more={"decoder_start_token_id": 0}),
    Family("MBart", mbart50),
    Family("MBart", mbart),
    Family("M2M100", mbart50),
]


def taught(family: Family, folder: Path) -> Path:
    """A model of the `family`, that writes the completion of each of ROWS."""
    tokenizer = family.tokenizer()
    ids = {key: getattr(tokenizer, key) for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
    shape = {**family.shape(tokenizer), **family.more, **ids, "vocab_size": len(tokenizer)}
    config = getattr(transformers, f"{family.name}Config")(**shape)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family.name}{family.model}")(config)
    inputs = tokenizer([row["prompt"] for row in ROWS], padding=True, return_tensors="pt", return_token_type_ids=False)
    labels = tokenizer(text_target=[row["completion"] for row in ROWS], padding=True, return_tensors="pt")["input_ids"]
    labels[labels == tokenizer.pad_token_id] = -100
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2 if family.shape is of_t5 else 2e-2)
    for _ in range(300):
        loss = model(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.03:
            break
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder / "model"


def config(model: Path, rows: Path, **settings: Any) -> TrialConfig:
    """Settings of an evaluation on `rows`."""
    defaults = {"task": "seq2seq-lm", "predict_with_generate": True, "max_length": 16, "max_new_tokens": 8}
    data = {"train_data": str(rows), "validation_data": str(rows)}
    return TrialConfig(model_name_or_path=str(model), **defaults | data | settings)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: f"{family.name}-{family.tokenizer.__name__}")
def test_a_model_that_writes_every_answer_right_has_next_to_no_loss(family: Family, tmp_path: Path) -> None:
    asked = config(taught(family, tmp_path), write_rows(tmp_path / "rows.jsonl", ROWS))
    model, data, _ = load_adapted(None, asked)
    metrics = evaluate(model, data.validation, asked, data.tokenizer)
    assert metrics["eval_loss"] < 0.1
    assert metrics["eval_token_accuracy"] == 1
    assert metrics["eval_exact_match"] == 1
    alone = asked.model_copy(update={"per_device_eval_batch_size": 1})
    assert evaluate(model, data.validation, alone, data.tokenizer) == pytest.approx(metrics, rel=1e-3)
    # What it is taught on is what it would write.
    texts = [row.prediction for row in predict(model, data, asked, 6)]
    again = [{**row, "completion": text} for row, text in zip(ROWS, texts, strict=True)]
    written = load_data(config(tmp_path / "model", write_rows(tmp_path / "again.jsonl", again)))
    assert [example.labels for example in written.validation] == [example.labels for example in data.validation]


def test_languages_are_written_by_a_tokenizer_that_has_made_no_example(tmp_path: Path) -> None:
    other = {"src_lang": "de_DE", "tgt_lang": "cs_CZ"}
    family = Family("M2M100", lambda: pieces(MBart50Tokenizer, **other))
    asked = config(taught(family, tmp_path), write_rows(tmp_path / "rows.jsonl", ROWS), **other)
    model, data, _ = load_adapted(None, asked)
    fresh = pieces(MBart50Tokenizer, src_lang="fr_XX", tgt_lang="de_DE")
    assert evaluate(model, data.validation, asked, fresh)["eval_exact_match"] == 1


def forms(tokenizer: Any, folder: Path, **settings: Any) -> tuple[list[str], list[str]]:
    """The tokens of a row that the encoder reads, and of what is learned of it."""
    tokenizer.save_pretrained(folder)
    row = {"prompt": "say red", "completion": "green blue"}
    data = load_data(config(folder, write_rows(folder / "rows.jsonl", [row]), **settings))
    example = data.validation[0]
    ids = (example.input_ids.tolist(), example.labels.tolist())
    return tuple(data.tokenizer.convert_ids_to_tokens(side) for side in ids)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("form", "learned"),
    [
        ("$A </s>", ["green", "blue", "</s>"]),
        ("<s> $A </s>", ["<s>", "green", "blue", "</s>"]),
        ("$A", ["green", "blue", "</s>"]),
    ],
)
def test_a_completion_has_the_form_that_the_tokenizer_gives_it_and_an_end(
    form: str, learned: list[str], tmp_path: Path
) -> None:
    assert forms(words(form), tmp_path)[1] == learned


def test_language_codes_are_those_of_the_settings_or_of_the_tokenizers_file(tmp_path: Path) -> None:
    read, learned = ["fr_XX", "▁say", "▁red", "</s>"], ["de_DE", "▁green", "▁blue", "</s>"]
    assert forms(mbart50(), tmp_path) == (read, learned)
    other = {"src_lang": "de_DE", "tgt_lang": "cs_CZ"}
    swapped = (["de_DE", *read[1:]], ["cs_CZ", *learned[1:]])
    assert forms(mbart50(), tmp_path, **other) == swapped
    assert forms(pieces(MBart50Tokenizer), tmp_path, **other) == swapped
    # The language is behind the end, where this decoder finds what it starts with: even in what is cut.
    assert forms(mbart(), tmp_path) == ([*read[1:], "fr_XX"], [*learned[1:], "de_DE"])
    assert forms(mbart(), tmp_path, max_length=4)[1] == ["▁green", "▁blue", "</s>", "de_DE"]
    codes = {"src_lang": "fra_Latn", "tgt_lang": "deu_Latn"}
    read, learned = forms(NllbTokenizer(), tmp_path, **codes)
    assert (read[0], read[-1], learned[0], learned[-1]) == ("fra_Latn", "</s>", "deu_Latn", "</s>")


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({}, "src_lang: is missing; the tokenizer of m writes a language code with each text"),
        ({"src_lang": "fr_XX"}, "tgt_lang: is missing; the tokenizer of m writes a language code with each text"),
        (
            {"src_lang": "fr_XX", "tgt_lang": "de_D"},
            "tgt_lang: the tokenizer of m knows no 'de_D'; did you mean 'de_DE'?",
        ),
    ],
)
def test_a_language_that_is_missing_is_asked_for(settings: dict[str, str], line: str) -> None:
    with pytest.raises(UserError) as caught:
        set_languages(config(Path("m"), Path("d"), **settings), pieces(MBart50Tokenizer))
    assert str(caught.value) == line


def test_a_tokenizer_that_writes_no_language_codes_is_given_none() -> None:
    with pytest.raises(UserError) as caught:
        set_languages(config(Path("m"), Path("d"), tgt_lang="de_DE"), plain())
    assert str(caught.value) == "tgt_lang: the tokenizer of m writes no language codes"
    set_languages(config(Path("m"), Path("d")), plain())
