"""What `predict` answers: exactly what an evaluation of the same rows shows, whatever else there is beside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tiny_trials import TASKS, Tiny, run_fit, write_rows

from bilora_ray.cli import answers as answering
from bilora_ray.cli.main import main
from bilora_ray.measures import TASK_FACTS, Task
from bilora_ray.release.export import export_merged
from bilora_ray.training.folder import TrialFolder
from bilora_ray.training.prediction.answers import Asked

CHAT: dict[str, Any] = {"format": "openai"}
KINDS = (*TASKS, "chats")


def run(*arguments: str | Path, typed: str | None = None) -> Result:
    return CliRunner().invoke(main, ["predict", *map(str, arguments)], input=typed)


def ran(*arguments: str | Path, typed: str | None = None) -> str:
    result = run(*arguments, typed=typed)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def error(*arguments: str | Path, typed: str | None = None) -> str:
    result = run(*arguments, typed=typed)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    return result.stderr.removeprefix("Error: ").removesuffix("\n")


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def shown(adapter: Path, data: Path, *more: str) -> list[dict[str, str]]:
    """What an evaluation shows of all rows of `data`."""
    typed = ["evaluate", str(adapter), "--data", str(data), "--examples", "100", "--json", *more]
    result = CliRunner().invoke(main, typed)
    assert result.exit_code == 0, result.stderr
    found: list[dict[str, str]] = json.loads(result.stdout)["examples"]
    return found


@pytest.fixture(scope="module")
def trained(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A short training's adapter, by task; or of causal-lm by what it has learned."""
    known: dict[str, Path] = {}

    def adapter(kind: str) -> Path:
        if kind not in known:
            rows = tiny.folder / f"{kind}-train.jsonl"
            settings: dict[str, Any] = {} if kind in TASKS else {"train_data": str(rows), **CHAT}
            if kind == "chats":
                settings["validation_data"] = str(tiny.folder / "chats-validation.jsonl")
            folder = tmp_path_factory.mktemp("trial")
            task: Any = kind if kind in TASKS else "causal-lm"
            run_fit(tiny.config(task, max_steps=4, max_length=64, max_new_tokens=8, **settings), folder)
            found = TrialFolder(folder).best_adapter()
            assert found is not None
            known[kind] = found
        return known[kind]

    return adapter


def validation(tiny: Tiny, kind: Any) -> Path:
    if kind == "chats":
        return tiny.folder / "chats-validation.jsonl"
    return Path(str(tiny.config(kind).validation_data))


def without_answers(data: Path, folder: Path) -> Path:
    """The rows of `data` as who has no answers has them."""
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for row in rows:
        for column in ("completion", "label"):
            row.pop(column, None)
        if "messages" in row:
            row["messages"].pop()
        if "image" in row:
            row["image"] = str(data.parent / row["image"])
    return write_rows(folder / "questions.jsonl", rows)


def as_shown(prediction: Any, kind: str) -> str:
    """A prediction as people read it."""
    if isinstance(prediction, list):
        return (" " if kind == "token-classification" else ", ").join(prediction)
    return f"{prediction:.4f}" if isinstance(prediction, float) else str(prediction)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_answered_as_an_evaluation_shows_it(
    kind: str, trained: Callable[[str], Path], tiny: Tiny, tmp_path: Path
) -> None:
    adapter, data = trained(kind), validation(tiny, kind)
    expected = [row["prediction"] for row in shown(adapter, data)]
    if kind == "regression":
        expected = [f"{float(number):.4f}" for number in expected]
    assert len(set(expected)) > 1 or kind.endswith("classification")
    for rows in (data, without_answers(data, tmp_path)):
        found = lines(ran(adapter, "--data", rows))
        assert [as_shown(row["prediction"], kind) for row in found] == expected
        assert all("probabilities" in row for row in found) is (kind in TASKS and not _writes_or_counts(kind))


def _writes_or_counts(kind: Any) -> bool:
    return kind == "regression" or TASK_FACTS[kind].generates


@pytest.mark.parametrize("kind", ["causal-lm", "sequence-classification", "chats"])
def test_the_base_model_is_shown_beside_it(kind: str, trained: Callable[[str], Path], tiny: Tiny) -> None:
    adapter, data = trained(kind), validation(tiny, kind)
    found = lines(ran(adapter, "--data", data, "--base-model"))
    expected = [row["prediction"] for row in shown(adapter, data, "--base-model")]
    assert [row["base_model_prediction"] for row in found] == expected
    assert [row["prediction"] for row in found] == [row["prediction"] for row in shown(adapter, data)]
    if kind != "sequence-classification":
        assert expected != [row["prediction"] for row in found]


@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification"])
def test_a_merged_model_answers_as_its_adapter_does(
    task: Task, trained: Callable[[str], Path], tiny: Tiny, tmp_path: Path
) -> None:
    adapter, data = trained(task), validation(tiny, task)
    export_merged(adapter, tmp_path / "merged", {})
    asked = ("--data", data, "--base-model")
    base = f"--set=model_name_or_path={tiny.model(task)}"  # which what is exported does not name
    for merged, own in zip(lines(ran(tmp_path / "merged", *asked, base)), lines(ran(adapter, *asked)), strict=True):
        for key in ("prediction", "base_model_prediction"):
            assert merged[key] == own[key]


def test_labels_come_with_how_likely_each_is(trained: Callable[[str], Path], tiny: Tiny) -> None:
    for row in lines(ran(trained("sequence-classification"), "--data", validation(tiny, "sequence-classification"))):
        assert set(row["probabilities"]) == {"bad", "good"}
        assert sum(row["probabilities"].values()) == pytest.approx(1)
        assert row["prediction"] == max(row["probabilities"], key=row["probabilities"].__getitem__)
    sets = lines(ran(trained("multi-label-classification"), "--data", validation(tiny, "multi-label-classification")))
    for row in sets:
        assert row["prediction"] == [name for name, share in row["probabilities"].items() if share > 0.5]
    for row in lines(ran(trained("token-classification"), "--data", validation(tiny, "token-classification"))):
        assert [max(word, key=word.__getitem__) for word in row["probabilities"]] == row["prediction"]
        assert len(row["prediction"]) == len(row["text"])


# A prompt


def test_a_prompt_is_answered_as_the_row_that_holds_it(trained: Callable[[str], Path], tiny: Tiny) -> None:
    adapter = trained("causal-lm")
    row = lines(ran(adapter, "--data", validation(tiny, "causal-lm")))[0]
    expected = row["prediction"]
    assert ran(adapter, row["prompt"]) == f"{expected}\n"
    assert json.loads(ran(adapter, row["prompt"], "--json")) == {"prediction": expected}
    for arguments in ((), ("-",)):
        assert ran(adapter, *arguments, typed=f"{row['prompt']}\n") == f"{expected}\n"
    both = ran(adapter, row["prompt"], "--base-model")
    assert both.startswith(f"{adapter}:\n{expected}\n\nbase model:\n")


def test_a_prompt_of_who_learned_chats_is_the_users_message(trained: Callable[[str], Path], tmp_path: Path) -> None:
    adapter = trained("chats")
    chat = [{"role": "user", "content": "say red 1 times:"}]
    rows = write_rows(tmp_path / "rows.jsonl", [{"messages": chat}])
    assert (
        json.loads(ran(adapter, "say red 1 times:", "--json"))["prediction"]
        == lines(ran(adapter, "--data", rows))[0]["prediction"]
    )
    # With another system turn it is another prompt; and a turn that is there is asked for anew.
    told = write_rows(tmp_path / "told.jsonl", [{"messages": [{"role": "system", "content": "very so well"}, *chat]}])
    expected = lines(ran(adapter, "--data", told))[0]["prediction"]
    set_ = ("--set", "system_prompt=very so well")
    assert json.loads(ran(adapter, "say red 1 times:", "--json", *set_))["prediction"] == expected


def test_a_prompt_fills_the_one_column_of_the_template(trained: Callable[[str], Path], tiny: Tiny) -> None:
    adapter = trained("causal-lm")
    template = ("--set", "prompt_template='so {colour} 1 times:'")
    expected = ran(adapter, "so red 1 times:")
    assert ran(adapter, "red", *template) == expected
    two = ("--set", "prompt_template='so {colour} {count} times:'")
    assert ran(adapter, '{"colour": "red", "count": 1}', *two) == expected
    line = (
        'the prompt: a question has the columns colour, count; give all as JSON: \'{"colour": "...", "count": "..."}\''
    )
    assert error(adapter, "red", *two) == line
    assert error(adapter, '{"colour": "red"}', *two) == line


def test_a_prompt_is_a_text_words_or_an_image(
    trained: Callable[[str], Path], tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = lines(ran(trained("sequence-classification"), "--data", validation(tiny, "sequence-classification")))[0]
    first, *shares = ran(trained("sequence-classification"), row["text"]).splitlines()
    assert first == row["prediction"]
    assert [line.split()[0] for line in shares] == sorted(
        row["probabilities"], key=lambda one: -row["probabilities"][one]
    )
    row = lines(ran(trained("token-classification"), "--data", validation(tiny, "token-classification")))[0]
    tagged = [line.split()[:2] for line in ran(trained("token-classification"), " ".join(row["text"])).splitlines()]
    assert tagged == [list(pair) for pair in zip(row["text"], row["prediction"], strict=True)]
    row = lines(ran(trained("image-classification"), "--data", validation(tiny, "image-classification")))[0]
    image = Path(row["image"])
    monkeypatch.chdir(image.parent)
    found = json.loads(ran(trained("image-classification"), image.name, "--json"))
    assert found["probabilities"] == pytest.approx(row["probabilities"], abs=1e-5)
    number = float(ran(trained("regression"), "red lovely"))
    assert number == pytest.approx(json.loads(ran(trained("regression"), "red lovely", "--json"))["prediction"], 1e-4)


def test_a_longer_text_begins_with_the_shorter_one(trained: Callable[[str], Path], tiny: Tiny) -> None:
    for kind in ("causal-lm", "seq2seq-lm"):
        task: Any = kind
        texts = [
            [row["prediction"] for row in lines(ran(trained(kind), "--data", validation(tiny, task), *more))]
            for more in ((), ("--max-new-tokens", "3"), ("--max-new-tokens", "20"))
        ]
        for text, short, long in zip(*texts, strict=True):  # a character may be cut in its midst
            assert long.startswith(text.rstrip("\ufffd"))
            assert text.startswith(short.rstrip("\ufffd"))
        assert texts[0] != texts[1]
        assert texts[0] != texts[2]


# Drawn


def test_what_is_drawn_follows_from_the_seed_and_the_rows_number(
    trained: Callable[[str], Path], tiny: Tiny, tmp_path: Path
) -> None:
    adapter, data = trained("causal-lm"), validation(tiny, "causal-lm")

    def texts(*more: str, data: Path = data) -> list[str]:
        return [row["prediction"] for row in lines(ran(adapter, "--data", data, "--temperature", "1.5", *more))]

    expected = texts("--seed", "1")
    assert texts("--seed", "1") == expected
    assert texts("--seed", "1", "--set", "per_device_generation_batch_size=1") == expected
    assert texts("--seed", "2") != expected
    assert texts() == texts("--seed", "0")
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    beside_others = write_rows(tmp_path / "rows.jsonl", [*rows[:2], *rows[:1] * 5])
    found = texts("--seed", "1", data=beside_others)
    assert found[:2] == expected[:2]
    assert len(set(found[2:])) > 1, "each row is drawn by itself"
    assert ran(adapter, rows[0]["prompt"], "--temperature", "1.5", "--seed", "1") == f"{expected[0]}\n"


def test_of_a_share_that_only_the_likeliest_token_has_the_text_is_greedy(
    trained: Callable[[str], Path], tiny: Tiny
) -> None:
    adapter, data = trained("causal-lm"), validation(tiny, "causal-lm")
    greedy = [row["prediction"] for row in lines(ran(adapter, "--data", data))]
    assert [row["prediction"] for row in lines(ran(adapter, "--data", data, "--top-p", "1e-9"))] == greedy
    assert [row["prediction"] for row in lines(ran(adapter, "--data", data, "--top-p", "1.0"))] != greedy


# A file


def test_rows_come_out_with_their_own_columns(trained: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("id,prompt\n7,say red 1 times:\n8,so say blue 2 times:\n")
    output = tmp_path / "out.jsonl"
    said = ran(trained("causal-lm"), "--data", tmp_path / "rows.csv", "--output", output)
    assert said.startswith("2 rows answered in ")
    assert said.endswith(f"they are in {output}\n")
    found = lines(output.read_text())
    assert [list(row) for row in found] == [["id", "prompt", "prediction"]] * 2
    assert [row["id"] for row in found] == ["7", "8"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_file_is_whole_or_not_there(
    trained: Callable[[str], Path], tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, data = trained("causal-lm"), validation(tiny, "causal-lm")
    expected = lines(ran(adapter, "--data", data))
    monkeypatch.setattr(answering, "AT_ONCE", 5)
    assert lines(ran(adapter, "--data", data)) == expected
    calls: list[int] = []
    answers = Asked.answers

    def interrupted(*arguments: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return answers(*arguments, **more)

    monkeypatch.setattr(Asked, "answers", interrupted)
    result = run(adapter, "--data", data, "--output", tmp_path / "out.jsonl")
    assert (result.exit_code, list(tmp_path.iterdir())) == (130, [])


def test_a_log_hears_how_far_it_is(trained: Callable[[str], Path], tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "LOG_EVERY_S", 0)
    few = ("--set", "per_device_generation_batch_size=4", "--set", "per_device_eval_batch_size=4", "--base-model")
    said = run(trained("causal-lm"), "--data", validation(tiny, "causal-lm"), *few).stderr.splitlines()
    told = [line.partition(", about ")[0] for line in said]
    done = (4, 8, 12, 16, 18, 22, 26, 30, 34)  # of 18 rows and two models
    assert told == [f"{count} of 36 answers" for count in done]
    labels = run(
        trained("sequence-classification"), "--data", validation(tiny, "sequence-classification"), *few
    ).stderr.splitlines()
    assert labels[0].startswith("Note: the head of base model ")
    assert len(labels) > 5
    assert all(" of 36 answers, about " in line for line in labels[1:])


def test_a_wrong_row_is_found_before_the_model_is_loaded(
    trained: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Asked, "load", lambda *_: pytest.fail("loaded"))
    adapter, rows = trained("causal-lm"), tmp_path / "rows.jsonl"

    def line(*found: dict[str, Any], of: Path = adapter) -> str:
        write_rows(rows, [{"prompt": "say red", "text": "red", "messages": []}, *found][1:])
        return error(of, "--data", rows).removeprefix(f"{rows}, line 2")

    good = {"prompt": "say red"}
    assert line(good, {"prompt": "  "}) == ": is empty; there is nothing to ask"
    assert line(good, {"promt": "red"}).startswith(": no column 'prompt' (prompt_template); did you mean 'promt'?")
    taken = ": has a column 'prediction', which is what the answer is called; rename it"
    assert line(good, {**good, "prediction": "red"}) == taken
    chat = {"messages": [{"role": "user", "content": "hello"}]}
    assert "must be a list of messages" in line(chat, {"messages": "hello"}, of=trained("chats"))
    assert "the first message is the assistant's" in line(
        chat, {"messages": [{"role": "assistant", "content": "hi"}]}, of=trained("chats")
    )


# What is asked


@pytest.mark.slow
def test_a_study_gives_its_best_adapter(
    trained: Callable[[str], Path], tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = tiny.config("causal-lm", max_steps=2, max_new_tokens=8).model_dump(exclude_unset=True)
    typed = ["train", "--name=one", *(f"--set={key}={value}" for key, value in settings.items())]
    assert CliRunner().invoke(main, typed).exit_code == 0
    assert CliRunner().invoke(main, ["export", "one", "--output=exported"]).exit_code == 0
    (tmp_path / "one").mkdir()  # a folder that is no adapter is not meant
    data = validation(tiny, "causal-lm")
    before = sorted(tmp_path.rglob("*"))
    there = f"model_name_or_path={tiny.model('causal-lm')}"  # of which an export names no path
    expected = ran("exported", "--data", data, "--set", there)
    assert ran("one", "--data", data) == ran("one", "--trial", "0", "--data", data) == expected
    assert sorted(tmp_path.rglob("*")) == before, "to ask writes nothing"
    assert error("one", "hello", "--trial", "3") == "study 'one': no trial 3; it has 0 to 0"
    runs = tmp_path / "runs"
    assert error("oen", "hello") == f"oen: no such folder, and no study of {runs}; did you mean 'one'?"
    adapter = next(runs.glob("studies/one/trials/0000/adapters/*"))
    shutil.rmtree(adapter)
    assert error("one", "hello") == f"study 'one': the adapter of trial 0 is gone; it was in {adapter}"


def test_what_is_neither_an_adapter_nor_a_study_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert error("one", "hello") == f"one: no such folder, and no study of {tmp_path / 'runs'}"
    assert error("one", "hello", "--trial", "0") == f"study 'one': not in {tmp_path / 'runs'}"
    assert error("some/one", "hello") == "some/one: no such folder"
    assert error("~nobody-here/one", "hello") == "~nobody-here/one: Could not determine home directory."
    (tmp_path / "one").mkdir()
    assert error("one", "hello") == "one: no adapter here (adapter_config.json is missing)"
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_an_adapter_whose_base_is_gone_says_how_to_name_it(
    trained: Callable[[str], Path], tiny: Tiny, tmp_path: Path
) -> None:
    adapter = shutil.copytree(trained("causal-lm"), tmp_path / "adapter")
    recipe = json.loads((adapter / "bilora_ray.json").read_text())
    recipe["settings"]["model_name_or_path"] = "/gone"
    (adapter / "bilora_ray.json").write_text(json.dumps(recipe))
    line = "its base model is gone: no such folder: /gone; --set model_name_or_path=FOLDER says where it is now"
    assert error(adapter, "say red") == f"{adapter}: {line}"
    there = f"model_name_or_path={tiny.model('causal-lm')}"
    assert ran(adapter, "say red", "--set", there) == ran(trained("causal-lm"), "say red")


def test_what_a_row_loses_is_told(trained: Callable[[str], Path], tmp_path: Path) -> None:
    result = run(trained("causal-lm"), "so very well " * 40)
    assert result.exit_code == 0
    assert result.stderr == "Note: max_length: 1 of 1 rows lost tokens, as in an evaluation (64 with the text)\n"
    assert run(trained("causal-lm"), "so very well").stderr == ""
    # A long answer that is known takes nothing from what is asked.
    long = "so very well " * 40
    chat = [{"role": "user", "content": "say red"}, {"role": "assistant", "content": long}]
    rows = write_rows(tmp_path / "rows.jsonl", [{"messages": chat, "prompt": "say red", "completion": long}])
    for kind in ("causal-lm", "chats"):
        said = run(trained(kind), "--data", rows)
        assert (said.exit_code, said.stderr) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["hi", "--data", "x.jsonl"], "--data: is asked instead of a prompt; leave one out"),
        (["hi", "--output", "x.jsonl"], "--output: is for the rows of --data; a prompt's answer is printed"),
        (
            ["--data", "x", "--output", "x.csv"],
            "--output x.csv: is written as JSON lines; its name must end with .jsonl",
        ),
        (["hi", "--seed", "1"], "--seed: decides nothing of greedy texts; give --temperature or --top-p"),
        (["hi", "--temperature", "nan"], "--temperature nan: must be a finite number"),
        (["hi", "--top-p", "nan"], "--top-p nan: must be a finite number"),
        (["hi", "--set", "train_data=x.jsonl"], "--set train_data=x.jsonl: is --data here"),
        (["hi", "--model", "x"], "--model: is what a server calls the adapter; give --server"),
        (
            ["hi", "--server", "http://x", "--top-p", "0.5"],
            "--top-p: says nothing beside --server, whose greedy answers are compared",
        ),
        (["hi", "--set", "rank=8"], "--set rank=8: changes nothing in a prediction, which trains nothing"),
        (["hi", "--set", "study.seed=8"], "--set study.seed=8: a prediction has settings of a trial only"),
        ([""], "the prompt is empty; there is nothing to ask"),
        (["--data", "missing.jsonl"], "--data: no such file: {here}/missing.jsonl"),
        (["--data", "empty.jsonl"], "--data: no rows in {here}/empty.jsonl"),
    ],
)
def test_what_does_not_go_together_is_a_line(
    arguments: Sequence[str],
    line: str,
    trained: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").touch()
    assert error(trained("causal-lm"), *arguments) == line.format(here=tmp_path)


def test_labels_are_neither_drawn_nor_as_long_as_asked(trained: Callable[[str], Path]) -> None:
    adapter = trained("sequence-classification")
    for given in (("--temperature", "1"), ("--top-p", "0.5"), ("--max-new-tokens", "3"), ("--server", "http://x")):
        assert error(adapter, "red", *given) == f"{given[0]}: sequence-classification writes no text"
