"""`evaluate` against the same numbers counted by hand, one row at a time and without a batch."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from sklearn.metrics import f1_score, matthews_corrcoef
from tiny_trials import KINDS, TASKS, Tiny, evaluate_adapter, run_fit
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
)

from bilora_ray.config import TrialConfig
from bilora_ray.errors import UserError
from bilora_ray.measures import Task
from bilora_ray.recipe import evaluation_config
from bilora_ray.training.data.sources import read_validation
from bilora_ray.training.evaluate import evaluate, load_adapted, predict
from bilora_ray.training.folder import TrialFolder
from bilora_ray.training.loading import load_data, prepare
from bilora_ray.training.loop import Run
from bilora_ray.training.rehearsal import rehearse
from bilora_ray.training.rows import load_rows, notes

AUTO = {"causal-lm": AutoModelForCausalLM, "seq2seq-lm": AutoModelForSeq2SeqLM}
COLOURS = ("red", "green", "blue")
# Far enough for some answers to be right, and not all.
STEPS: dict[Task, dict[str, Any]] = {
    "causal-lm": {"max_steps": 14, "learning_rate": 1e-2},
    "seq2seq-lm": {"max_steps": 40, "learning_rate": 3e-2},
}


def answering(tiny: Tiny, task: Task, **settings: Any) -> TrialConfig:
    """A trial whose completions end with '# colour'."""
    defaults: dict[str, Any] = {
        "train_data": str(tiny.folder / "colours-train.jsonl"),
        "validation_data": str(tiny.folder / "colours-validation.jsonl"),
        "predict_with_generate": True,
        "max_new_tokens": 12,
        "answer_pattern": r"#\s*(\w+)",
        "per_device_eval_batch_size": 7,
        "eval_steps": 100,
        "lr_scheduler_type": "constant",
    }
    return tiny.config(task, **defaults | STEPS[task] | settings)


def generated(config: TrialConfig, adapter: Path) -> list[str]:
    """What the adapter writes for each validation row, alone in its batch, with plain libraries."""
    tokenizer = AutoTokenizer.from_pretrained(config.model_name_or_path)
    base = AUTO[config.task].from_pretrained(config.model_name_or_path)
    model = PeftModel.from_pretrained(base, str(adapter)).eval()
    texts = []
    for line in Path(config.validation_data or "").read_text().splitlines():
        inputs = tokenizer(json.loads(line)["prompt"], return_tensors="pt", return_token_type_ids=False)
        output = model.generate(**inputs, max_new_tokens=config.max_new_tokens, do_sample=False)[0]
        if config.task == "causal-lm":
            output = output[inputs["input_ids"].shape[1] :]
        texts.append(tokenizer.decode(output, skip_special_tokens=True))
    return texts


@pytest.mark.parametrize("task", ["causal-lm", "seq2seq-lm"])
def test_exact_match_and_label_metrics_are_what_a_hand_counts(task: Task, tiny: Tiny, tmp_path: Path) -> None:
    config = answering(tiny, task, label_names=COLOURS)
    reports, _ = run_fit(config, tmp_path)
    adapter = TrialFolder(tmp_path).best_adapter()
    assert adapter is not None
    found = [re.findall(r"#\s*(\w+)", text) for text in generated(config, adapter)]
    given = [answers[-1] if answers else "" for answers in found]
    lines = Path(config.validation_data or "").read_text().splitlines()
    wanted = [json.loads(line)["colour"] for line in lines]
    right = sum(a == b for a, b in zip(given, wanted, strict=True))
    assert right > 0 or task == "seq2seq-lm"  # whose tiny model learns nothing in so few steps
    metrics = reports[-1]
    assert metrics["eval_exact_match"] == metrics["eval_accuracy"] == right / len(wanted)
    indices = [COLOURS.index(colour) if colour in COLOURS else -1 for colour in given]
    truth = [COLOURS.index(colour) for colour in wanted]
    occurring = sorted({*indices, *truth} - {-1})
    expected = f1_score(truth, indices, labels=occurring, average="macro", zero_division=0)
    assert metrics["eval_f1"] == pytest.approx(expected)
    assert metrics["eval_matthews_correlation"] == pytest.approx(matthews_corrcoef(truth, indices))
    assert metrics.keys() >= set(config.available_metrics)


def test_without_labels_only_exact_match_is_added(tiny: Tiny, tmp_path: Path) -> None:
    config = answering(tiny, "causal-lm", max_steps=1, metric="eval_exact_match")
    reports, progress = run_fit(config, tmp_path)
    assert {key for key in reports[0] if key.startswith("eval_")} == {
        "eval_loss",
        "eval_perplexity",
        "eval_token_accuracy",
        "eval_exact_match",
    }
    assert progress.best_value == reports[0]["eval_exact_match"]


@pytest.mark.parametrize("task", ["causal-lm", "seq2seq-lm"])
def test_the_loss_is_the_mean_over_all_target_tokens(task: Task, tiny: Tiny, tmp_path: Path) -> None:
    run = Run(tiny.config(task, per_device_eval_batch_size=5), TrialFolder(tmp_path))
    run.train_step()
    metrics = evaluate(run.model, run.data.validation, run.config, run.data.tokenizer)
    run.model.eval()
    losses, hits = [], []
    for example in run.data.validation:
        ids, labels = torch.tensor([example.input_ids.tolist()]), torch.tensor([example.labels.tolist()])
        with torch.inference_mode():
            scores = run.model(input_ids=ids, labels=labels).logits.log_softmax(-1)[0]
        if task == "causal-lm":
            scores, labels = scores[:-1], labels[:, 1:]
        for score, label in zip(scores, labels[0].tolist(), strict=True):
            if label != -100:
                losses.append(-float(score[label]))
                hits.append(int(score.argmax()) == label)
    assert metrics["eval_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert metrics["eval_perplexity"] == math.exp(metrics["eval_loss"])
    assert metrics["eval_token_accuracy"] == sum(hits) / len(hits)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_in_its_mode(training: bool, tiny: Tiny, tmp_path: Path) -> None:
    run = Run(tiny.config("causal-lm"), TrialFolder(tmp_path))
    run.model.train(training)
    evaluate(run.model, run.data.validation, run.config, run.data.tokenizer)
    assert {module.training for module in run.model.modules()} == {training}
    for parameter in run.model.parameters():
        assert not parameter.is_inference()


def test_the_mode_is_restored_when_an_evaluation_fails(tiny: Tiny, tmp_path: Path) -> None:
    run = Run(tiny.config("causal-lm"), TrialFolder(tmp_path))
    run.model.train()
    with pytest.raises(AttributeError):
        evaluate(run.model, [None], run.config, run.data.tokenizer)  # type: ignore[list-item]
    assert run.model.training


def test_an_evaluation_draws_no_random_numbers_and_changes_no_weight(tiny: Tiny, tmp_path: Path) -> None:
    run = Run(answering(tiny, "causal-lm", lora_dropout=0.5), TrialFolder(tmp_path))
    run.train_step()
    random = torch.get_rng_state()
    before = {name: parameter.clone() for name, parameter in run.model.named_parameters()}
    first = evaluate(run.model, run.data.validation, run.config, run.data.tokenizer)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(before[name], parameter) for name, parameter in run.model.named_parameters())
    assert evaluate(run.model, run.data.validation, run.config, run.data.tokenizer) == first


@pytest.mark.parametrize("task", TASKS)
def test_the_auxiliary_does_not_count(task: Task, tiny: Tiny, tmp_path: Path) -> None:
    run = Run(tiny.config(task, rho=5.0, warmup_ratio=0), TrialFolder(tmp_path))
    run.train_step()
    config = run.config.model_copy(update={"label_names": run.data.label_names})
    before = evaluate(run.model, run.data.validation, config, run.data.tokenizer)
    with torch.no_grad():
        for name, parameter in run.model.named_parameters():
            if "auxiliary" in name:
                parameter.normal_()
    assert evaluate(run.model, run.data.validation, config, run.data.tokenizer) == before


def test_the_batch_size_does_not_matter(tiny: Tiny, tmp_path: Path) -> None:
    config = answering(tiny, "causal-lm")
    run_fit(config, tmp_path)
    adapter = TrialFolder(tmp_path).best_adapter()
    alone, together = (
        evaluate_adapter(adapter, config.model_copy(update={"per_device_eval_batch_size": size})) for size in (1, 64)
    )
    assert alone == pytest.approx(together, rel=1e-5)


def test_validation_rows_are_those_of_the_recipe(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny.config("causal-lm", validation_data=None, validation_fraction=0.3, max_eval_samples=9, seed=4)
    run = Run(config, TrialFolder(tmp_path))
    assert len(run.data.validation) == 9
    again = prepare(load_rows(config), config, run.data.tokenizer)
    assert again.validation == run.data.validation


@pytest.mark.parametrize("task", TASKS)
def test_a_prediction_is_what_is_measured(task: Task, tiny: Tiny, tmp_path: Path) -> None:
    data = {f"{split}_data": str(tiny.folder / f"colours-{split}.jsonl") for split in ("train", "validation")}
    # Which are shown whether or not all rows are generated from.
    settings = {} if task in KINDS else {**data, "predict_with_generate": True, "max_new_tokens": 9}
    config = tiny.config(task, max_steps=24, **settings)
    run_fit(config, tmp_path)
    adapter = TrialFolder(tmp_path).best_adapter()
    model, loaded, _ = load_adapted(adapter, config)
    named = config.model_copy(update={"label_names": loaded.label_names})
    metrics = evaluate(model, loaded.validation, named, loaded.tokenizer)
    predictions = predict(model, loaded, config, 1000)
    assert len(predictions) == len(loaded.validation)
    row = read_validation(config).records[0].columns
    if task == "regression":
        errors = [(float(row.prediction) - float(row.reference)) ** 2 for row in predictions]
        assert sum(errors) / len(errors) == pytest.approx(metrics["eval_mse"], rel=1e-4)
        assert predictions[0].reference == f"{row['label']:g}"
    else:
        if task == "token-classification":  # of each word
            each = (zip(row.prediction.split(), row.reference.split(), strict=True) for row in predictions)
            pairs = [pair for pairs in each for pair in pairs]
        else:
            pairs = [(row.prediction.strip(), row.reference.strip()) for row in predictions]
        right = sum(found == wanted for found, wanted in pairs)
        name = "eval_accuracy" if task in KINDS else "eval_exact_match"
        assert right / len(pairs) == pytest.approx(metrics[name])
        assert right > 0 or task == "seq2seq-lm"  # whose tiny model learns nothing in so few steps
        reference = row["label" if task in KINDS else "completion"]
        written = predictions[0].reference
        separator = " " if task == "token-classification" else ", "
        assert sorted(written.split(separator)) == sorted([reference] if isinstance(reference, str) else reference)
    read = next(row[column] for column in ("prompt", "text", "image") if column in row)
    assert joined(read) in predictions[0].input
    assert predict(model, loaded, config, 2) == predictions[:2]


def joined(value: str | list[str]) -> str:
    return value if isinstance(value, str) else " ".join(value)


def with_positions(tiny: Tiny, task: Task, folder: Path) -> Path:
    """A model of `task` that has learned 32 positions, with the tokenizer of the task's tiny one."""
    tokenizer = AutoTokenizer.from_pretrained(tiny.model(task))
    ids = {key: getattr(tokenizer, key) for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
    bart = {
        f"{part}_{kind}": size for part in ("encoder", "decoder") for kind, size in (("layers", 1), ("ffn_dim", 32))
    }
    bart |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_start_token_id": ids["eos_token_id"]}
    shape = {"vocab_size": len(tokenizer), **ids}
    torch.manual_seed(0)
    if task == "causal-lm":
        GPT2LMHeadModel(GPT2Config(n_positions=32, n_embd=16, n_layer=1, n_head=2, **shape)).save_pretrained(folder)
    else:
        config = BartConfig(max_position_embeddings=32, d_model=16, forced_eos_token_id=None, **bart, **shape)
        BartForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def generating(tiny: Tiny, task: Task, model: Path, **settings: Any) -> TrialConfig:
    """A trial on texts of which some have more than 32 tokens."""
    targets = ["c_attn"] if task == "causal-lm" else "all-linear"
    defaults = {"model_name_or_path": str(model), "target_modules": targets, "max_length": 32, "max_steps": 1}
    return tiny.config(task, **defaults | settings)


@pytest.mark.parametrize("task", ["causal-lm", "seq2seq-lm"])
@pytest.mark.parametrize("measured", [True, False])
def test_what_is_written_has_room_in_the_models_positions(
    task: Task, measured: bool, tiny: Tiny, tmp_path: Path
) -> None:
    template = {"prompt_template": "{prompt} {prompt} {prompt}"}
    settings = {**template, "predict_with_generate": measured, "max_new_tokens": 24 if measured else 64}
    config = generating(tiny, task, with_positions(tiny, task, tmp_path / "model"), **settings)
    reports, _ = run_fit(config, tmp_path / "trial")
    assert ("eval_exact_match" in reports[0]) is measured
    adapter = TrialFolder(tmp_path / "trial").best_adapter()
    model, loaded, _ = load_adapted(adapter, config)
    predictions = predict(model, loaded, config, 1000)
    assert len(predictions) == len(loaded.validation)
    if task == "causal-lm":
        assert max(len(example.prompt_ids or ()) for example in loaded.validation) == (8 if measured else 16)


def test_what_is_written_is_no_longer_than_what_was_trained(tiny: Tiny, tmp_path: Path) -> None:
    """Nothing would end a model with rotary positions."""
    config = answering(tiny, "causal-lm", max_length=16, max_new_tokens=12)
    run = Run(config, TrialFolder(tmp_path))
    base, lengths = run.model.get_base_model(), []
    generate = base.generate

    def measured(*arguments: Any, **options: Any) -> Any:
        if "generation_config" not in options:  # a look at how the model writes
            return generate(*arguments, **options)
        most = options["generation_config"].max_new_tokens
        lengths.append(generate(*arguments, **options, min_new_tokens=most).shape[1])
        return generate(*arguments, **options)

    base.generate = measured
    evaluate(run.model, run.data.validation, config, run.data.tokenizer)
    assert set(lengths) == {16}


def test_a_text_without_positions_is_refused_before_anything_is_trained(tiny: Tiny, tmp_path: Path) -> None:
    config = generating(tiny, "seq2seq-lm", with_positions(tiny, "seq2seq-lm", tmp_path / "model"), max_new_tokens=40)
    rehearse(config)  # which writes nothing
    writes = config.model_copy(update={"predict_with_generate": True})
    for refuse in (rehearse, lambda writes: Run(writes, TrialFolder(tmp_path / "trial"))):
        with pytest.raises(UserError) as error:
            refuse(writes)
        assert str(error.value) == "max_new_tokens: 40 is more than the model's 32 positions; write 32 or less"


def test_a_text_that_would_leave_no_room_for_its_prompt_is_told_and_measured(tiny: Tiny, tmp_path: Path) -> None:
    config = generating(tiny, "causal-lm", with_positions(tiny, "causal-lm", tmp_path / "model"), max_new_tokens=40)
    writes = config.model_copy(update={"predict_with_generate": True})
    (note,) = notes(load_rows(writes), writes, 1)
    assert note == "max_new_tokens: 40 leaves no room for a prompt in max_length (32); a text gets 16"
    run = Run(writes, TrialFolder(tmp_path / "trial"))
    assert "eval_exact_match" in evaluate(run.model, run.data.validation, writes, run.data.tokenizer)


def test_a_chat_is_asked_as_it_would_be_served_and_ends_with_its_turn(tiny: Tiny, tmp_path: Path) -> None:
    """With a template that shortens earlier turns, and ends them with another token than the model's."""
    (tmp_path / "own.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: "
        "{{ m.content if loop.last or m.role == 'user' else m.content[:1] }}{{ bos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    data = {f"{split}_data": str(tiny.folder / f"chats-{split}.jsonl") for split in ("train", "validation")}
    config = tiny.config(
        "causal-lm",
        **data,
        chat_template=str(tmp_path / "own.jinja"),
        predict_with_generate=True,
        max_new_tokens=9,
        max_steps=24,
        eval_steps=24,
    )
    (reported,), _ = run_fit(config, tmp_path / "run")
    adapter = TrialFolder(tmp_path / "run").best_adapter()
    assert adapter is not None
    model, loaded, _ = load_adapted(adapter, evaluation_config(adapter, {}))
    assert (
        load_data(config)
        .notes[0]
        .startswith("format: 44 chats are 88 training rows, one for each turn of the assistant")
    )
    chats = [json.loads(line)["messages"] for line in Path(data["validation_data"]).read_text().splitlines()]
    right = 0
    for chat, shown in zip(chats, predict(model, loaded, evaluation_config(adapter, {}), 1000), strict=True):
        asked = loaded.tokenizer.apply_chat_template(chat[:-1], add_generation_prompt=True, return_tensors="pt")
        written = model.generate(**asked, max_new_tokens=9, do_sample=False, eos_token_id=[1, 2])
        text = loaded.tokenizer.decode(written[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)
        assert (shown.prediction, shown.reference.strip()) == (text, chat[-1]["content"])
        right += text.strip() == chat[-1]["content"]
    assert reported["eval_exact_match"] == right / len(chats)
