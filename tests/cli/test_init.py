"""`init`: what a data file becomes, what is told of it, and that it is ready to run."""

from __future__ import annotations

import csv
import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from tiny_trials import Tiny, write_rows

from bilora_ray.cli.main import main
from bilora_ray.measures import TASK_FACTS
from bilora_ray.search.drafting import bases
from bilora_ray.search.drafting.columns import Column, look_at
from bilora_ray.search.drafting.firsts import FIRSTS
from bilora_ray.search.drafting.text import _flow
from bilora_ray.search.readiness import machine
from bilora_ray.search.space_file import load_space
from bilora_ray.training.data.sources import Record

Rows = Sequence[dict[str, Any]]
BUILT_IN = "builtin:quickstart/model"
WORDS = ("apple", "pear", "plum", "of", "the", "a", "green", "red")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current one, on a machine without GPUs, from which the Hub is not reached."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "gpu_count", lambda: 0)
    monkeypatch.setattr(bases, "check_model", _not_reached)
    return tmp_path


def _not_reached(config: Any) -> None:
    if "/" in config.model_name_or_path and not config.model_name_or_path.startswith(("/", "builtin:")):
        raise bases.UserError(f"model_name_or_path: no folder '{config.model_name_or_path}' here, and no Hub")


def run(*words: str) -> Result:
    return CliRunner().invoke(main, ["init", *words])


def made(rows: Rows, *words: str, name: str = "mine.csv") -> tuple[dict[str, Any], str]:
    """The space file of `rows`, and what the terminal says. The file is one that `validate` takes."""
    path = Path(name)
    if path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        write_rows(path, rows)
    done = run("--data", name, *words)
    assert done.exit_code == 0, (done.output, done.exception)
    checked = CliRunner().invoke(main, ["validate", "my_space.yaml"])
    assert checked.exit_code == 0, checked.output
    return yaml.safe_load(Path("my_space.yaml").read_text(encoding="utf-8")), done.output


def texts(count: int, make: Callable[[Random, str], dict[str, Any]]) -> Rows:
    """Rows of which each begins with a text of its own."""
    random = Random(0)
    return [make(random, f"{' '.join(random.choices(WORDS, k=9))} {number}") for number in range(count)]


def tickets(random: Random, text: str) -> dict[str, Any]:
    parts = {"ticket_id": 7 * random.randrange(9999), "created": f"2026-01-{random.randrange(1, 29):02}"}
    return {
        **parts,
        "subject": f"on {text}",
        "body": text,
        "category": random.choice("ab"),
        "answer": f"so {text} it is",
    }


def test_the_answer_to_a_ticket_is_written() -> None:
    space, told = made(texts(60, tickets))
    trial = space["trial"]
    assert (trial["task"], trial["prompt_template"], trial["completion_template"]) == (
        "causal-lm",
        "{body}\n",
        "{answer}",
    )
    assert (trial["model_name_or_path"], trial["train_data"], trial["metric"]) == (BUILT_IN, "mine.csv", "eval_loss")
    assert trial["validation_fraction"] == 0.2  # of few rows
    assert "48 rows to train on, 12 to judge by" in told
    assert "lengths in tokens: 60 rows have" in told
    # Neither ids nor dates are worth a word; what could have been meant is told with the option that says it.
    doubts = [line for line in told.splitlines() if line.startswith("Or: ")]
    assert len(doubts) == 2
    assert not any(name in told for name in ("ticket_id", "created"))


def test_what_is_told_as_another_way_is_one() -> None:
    _, told = made(texts(60, tickets))
    ways = [line for line in told.splitlines() if line.startswith("Or: ")]
    for number, way in enumerate(ways):
        options = shlex.split(way[way.index("--") :])
        done = run("--data", "mine.csv", *options, "--output", f"other-{number}.yaml")
        assert done.exit_code == 0, (options, done.output)
        other = load_space(Path(f"other-{number}.yaml")).fixed
        assert other.get("prompt_template") == "{subject}\n{body}\n" or other["label_column"] == "category"


def test_the_first_line_names_a_schema_that_is_there(folder: Path) -> None:
    made(texts(30, tickets))
    first, *_ = (folder / "my_space.yaml").read_text().splitlines()
    assert first == "# yaml-language-server: $schema=bilora-ray.schema.json"
    shipped = Path(__file__).resolve().parents[2] / "search_spaces" / "schema.json"
    assert (folder / "bilora-ray.schema.json").read_bytes() == shipped.read_bytes()


def test_labels_of_texts_are_told_and_learned() -> None:
    rows = texts(300, lambda random, text: {"text": text, "label": "spam" if random.random() < 0.2 else "ham"})
    space, told = made(rows)
    trial = space["trial"]
    assert (trial["task"], trial["text_column"], trial["label_column"]) == ("sequence-classification", "text", "label")
    assert (trial["metric"], trial["positive_label"]) == ("eval_f1", "spam")
    assert "train labels: 'ham' 2" in told
    assert "every row is 'spam': eval_f1" in told
    assert "Or: " not in told


def test_labels_of_like_frequency_are_judged_by_accuracy() -> None:
    rows = texts(60, lambda random, text: {"review": text, "stars": random.choice([1, 2, 3])})
    trial = made(rows)[0]["trial"]
    assert (trial["text_column"], trial["label_column"], trial["metric"]) == ("review", "stars", "eval_accuracy")
    assert "positive_label" not in trial


def test_short_answers_are_right_or_wrong() -> None:
    rows = texts(60, lambda random, text: {"question": f"{text}?", "answer": f"{random.randrange(999)} pears"})
    trial = made(rows)[0]["trial"]
    assert (trial["metric"], trial["predict_with_generate"]) == ("eval_exact_match", True)
    assert 0 < trial["max_new_tokens"] < trial["max_length"]


def test_the_longest_answer_has_room_beside_the_longest_prompt() -> None:
    """No Note says that a text would end before its answer does."""
    answers = {
        str(number): f"so it is, and not otherwise than as it is in the case of #### {number}" for number in range(3)
    }
    made(texts(60, lambda random, text: {"question": text[:9], "answer": answers[random.choice("012")]}))
    done = CliRunner().invoke(main, ["tune", "--space", "my_space.yaml", "--dry-run"])
    assert done.exit_code == 0, done.output
    assert load_space(Path("my_space.yaml")).fixed["metric"] == "eval_exact_match"
    assert "Note: max_new_tokens" not in done.output
    assert "0 are cut to max_length" in done.output


@pytest.mark.parametrize(
    ("parameters", "words"),
    [(51_000, "51 thousand"), (1.2e6, "1.2 million"), (1.37e8, "137 million"), (8.8e9, "8.8 billion")],
)
def test_a_number_of_parameters_in_words(parameters: float, words: str) -> None:
    assert bases.in_words(parameters) == words


def test_long_answers_that_come_again_are_judged_by_their_loss() -> None:
    """A word of them that is another makes none wrong as a whole."""
    rows = texts(60, lambda random, text: {"question": text, "answer": f"please restart {random.choice(WORDS)} " * 5})
    assert made(rows)[0]["trial"]["metric"] == "eval_loss"


def test_an_answer_behind_its_working_has_a_pattern() -> None:
    rows = texts(60, lambda random, text: {"question": text, "answer": f"{text} makes\n#### {random.randrange(1, 99)}"})
    trial = made(rows)[0]["trial"]
    assert trial["answer_pattern"] == r"#### (-?[\d.,]*\d)"
    assert trial["metric"] == "eval_exact_match"


def test_chats_are_found() -> None:
    turns = ("user", "assistant")
    rows = texts(30, lambda _, text: {"messages": [{"role": role, "content": text} for role in turns], "source": "web"})
    space, told = made(rows, name="chats.jsonl")
    assert (space["study"]["name"], space["trial"]["format"]) == ("chats", "openai")
    assert "the rows are in the format openai" in told


def test_two_texts_of_no_telling_name_are_told_to_be_a_guess() -> None:
    rows = texts(30, lambda random, text: {"a": text, "b": " ".join(random.choices(WORDS, k=12)) + text})
    space, told = made(rows)
    assert space["trial"]["completion_template"] == "{b}"
    assert "Or: by their order 'b' answers 'a'; to turn them round: --set 'prompt_template=\"{b}\\n\"'" in told


def test_a_plain_text_is_learned_whole(folder: Path) -> None:
    (folder / "book.txt").write_text("".join(f"the {word} is green {n}\n" for n in range(5) for word in WORDS))
    done = run("--data", "book.txt")
    assert done.exit_code == 0, done.output
    fixed = load_space(Path("my_space.yaml")).fixed
    assert (fixed["prompt_template"], fixed["completion_template"]) == ("", "{text}")
    line = "Note: data: plain text is learned line by line; for answers or labels, give a table with a column of each "
    assert line in done.output
    assert f"# {line}" in in_one_line(Path("my_space.yaml"))


def in_one_line(file: Path) -> str:
    """The comments of a file as they were before they were wrapped."""
    return file.read_text(encoding="utf-8").replace("\n#   ", " ")


def test_a_label_that_all_rows_have_is_noted() -> None:
    rows = texts(30, lambda _, text: {"text": text, "label": "spam"})
    space, told = made(rows)
    assert space["trial"]["task"] == "causal-lm"
    line = "Note: label: is 'spam' in every row, of which no label can be learned"
    assert line in told.splitlines()
    assert f"# {line}\n" in in_one_line(Path("my_space.yaml"))


def test_of_numbers_that_are_no_label_by_name_it_is_told_how_they_are_learned() -> None:
    rows = texts(30, lambda random, text: {"description": text, "price": round(random.uniform(1, 99), 2)})
    space, told = made(rows)
    assert space["trial"]["task"] == "causal-lm"
    way = "--task regression --set label_column=price"
    line = f"Or: nothing is learned of 'price'; to learn numbers: {way}"
    assert line in told.splitlines()
    assert f"# {line}\n" in in_one_line(Path("my_space.yaml"))
    assert made(rows, *way.split(), "--output", "numbers.yaml")[1].count("task: regression") == 1


@pytest.mark.parametrize(
    ("kind", "task", "metric"),
    [
        ("words", "token-classification", "eval_f1"),
        ("sets", "multi-label-classification", "eval_f1"),
        ("numbers", "regression", "eval_spearman"),
    ],
)
def test_the_kind_of_a_label_tells_the_task(kind: str, task: str, metric: str, tiny: Tiny) -> None:
    words = ["--task", task] if kind == "numbers" else []  # of so few numbers each could be a name
    done = run("--data", str(tiny.folder / f"{kind}-train.jsonl"), "--model", str(tiny.folder / "bert"), *words)
    assert done.exit_code == 0, (done.output, done.exception)
    fixed = load_space(Path("my_space.yaml")).fixed
    assert (fixed["task"], fixed["metric"], fixed["model_name_or_path"]) == (task, metric, str(tiny.folder / "bert"))


def test_an_encoder_learns_labels_where_texts_could_be_written(tiny: Tiny) -> None:
    rows = texts(60, lambda random, text: {"text": text, "answer": random.choice(["yes", "no"])})
    assert made(rows, "--model", str(tiny.folder / "bert"))[0]["trial"]["task"] == "sequence-classification"


def test_a_model_with_an_encoder_and_a_decoder_writes(tiny: Tiny) -> None:
    assert made(texts(30, tickets), "--model", str(tiny.folder / "t5"))[0]["trial"]["task"] == "seq2seq-lm"


def test_without_a_tokenizer_lengths_are_guessed_and_told_to_be() -> None:
    space, told = made(texts(30, tickets), "--model", "somebody/a-7b-model")
    assert "model: could not be looked at: no folder 'somebody/a-7b-model' here, and no Hub" in told
    assert "lengths in tokens, guessed at 3 characters each" in told
    assert "wants a GPU" in told
    assert space["trial"]["learning_rate"] == {"low": "5e-5", "high": "1e-3", "log": True}


def test_a_gpu_changes_the_model_and_what_a_trial_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "gpu_count", lambda: 2)
    monkeypatch.setattr(bases, "check_model", lambda config: None)
    monkeypatch.setattr(bases, "described", lambda config: {})
    monkeypatch.setattr("bilora_ray.search.drafting.draft.positions", lambda config: None)
    monkeypatch.setattr("bilora_ray.search.drafting.lengths._in_tokens", lambda config: init_lengths())
    space, _ = made(texts(30, tickets))
    assert space["trial"]["model_name_or_path"] == "Qwen/Qwen2.5-0.5B"
    assert (space["resources"], space["study"]["num_trials"]) == ({"gpus_per_worker": 1}, 20)


def init_lengths() -> Any:
    from bilora_ray.search.drafting.lengths import Lengths

    return Lengths([10, 900], [5, 400], [5, 500])


def test_what_is_said_goes_before_what_is_seen() -> None:
    words = ("--set", "rank=8", "--set", "max_length=64", "--set", "study.name=other", "--set", "lora_dropout=0.1")
    space, _ = made(texts(30, tickets), *words)
    assert (space["study"]["name"], space["trial"]["rank"], space["trial"]["max_length"]) == ("other", 8, 64)
    assert space["trial"]["lora_dropout"] == 0.1
    assert "rank" not in space["study"]["points_to_evaluate"][0]


def test_another_method_is_searched_by_what_it_reads() -> None:
    space, _ = made(texts(30, tickets), "--set", "method=lora")
    assert space["study"]["points_to_evaluate"] == [{"rank": 8, "learning_rate": "4e-3"}]
    assert space["trial"].keys().isdisjoint({"rho", "auxiliary_rank"})


def test_paths_start_at_the_file_that_is_written(folder: Path) -> None:
    (folder / "spaces").mkdir()
    (folder / "data").mkdir()
    write_rows(folder / "data" / "mine.jsonl", [{"prompt": "a b", "completion": f"c {n}"} for n in range(30)])
    done = run("--data", "data/mine.jsonl", "--output", "spaces/own.yaml")
    assert done.exit_code == 0, done.output
    assert yaml.safe_load((folder / "spaces" / "own.yaml").read_text())["trial"]["train_data"] == "../data/mine.jsonl"
    assert load_space(Path("spaces/own.yaml")).fixed["train_data"] == str(folder / "data" / "mine.jsonl")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--data", "gone.csv"), "--data: no such file: "),
        (("--data", "ids.csv"), "--data: no columns hold a text, and what is to be learned of it (columns: id, date)"),
        (("--data", "ids.csv", "--output", "ids.csv"), "--output ids.csv: exists; name another file"),
        (("--data", "ids.csv", "--output", "a/b.yaml"), "--output a/b.yaml: no such folder: a"),
        (("--data", "ids.csv", "--output", "space.txt"), "--output space.txt: a space file is called NAME.yaml"),
        (("--data", "ids.csv", "--set", "task=causal-lm"), "--set task: is --task here"),
        (("--data", "dots.csv"), "--data: column 'q.text' is to stand in a template, whose columns have letters, "),
        (("--data", "likes.jsonl"), "train_data: chosen and rejected make preferences"),
        (
            ("--data", "texts.csv", "--task", "image-classification"),
            "--data: no columns hold an image and a label, as ",
        ),
        (("--data", "texts.csv", "--task", "seq2seq-lm"), "--model: is needed for seq2seq-lm, for the Hub, where "),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(words: tuple[str, ...], line: str, folder: Path) -> None:
    (folder / "ids.csv").write_text("id,date\n1,2026-01-01\n2,2026-01-02\n")
    rows = "".join(f"what is {n},it is {n} {n}\n" for n in range(9))
    (folder / "texts.csv").write_text(f"question,answer\n{rows}")
    (folder / "dots.csv").write_text(f"q.text,answer\n{rows}")
    write_rows(folder / "likes.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 3)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    done = run(*words)
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith(f"Error: {line}")
    assert done.stderr.count("\n") == 1
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["a b c", "d e f", "g h i"], "text"),
        (["a b c", "d e f"], "text"),
        (["yes", "no", "yes", "no", "yes", "no"], "label"),
        ([True, False, True, False, True, False], "label"),
        (["1", "2", "1", "2", "1", "2"], "label"),
        ([0.25, 1.5, 2.75], "number"),
        ([*range(40)], "other"),
        (["2026-01-02", "2026-01-03", "2026-01-02", "2026-01-03"], "other"),
        ([["a"], ["b", "c"]], "list"),
        (["x.png", "y.jpg"], "image"),
        ([{"bytes": b"", "path": None}], "image"),
        ([None, ""], "other"),
        ([{"a": 1}], "other"),
    ],
)
def test_the_kind_of_a_column(values: list[Any], kind: str) -> None:
    assert look_at([Record({"v": value}, "here") for value in values]) == [Column("v", kind)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "value",
    [
        "a: b",
        "no",
        "{x}\n",
        "1",
        "ü",
        "",
        "1e-3",
        0.05,
        True,
        None,
        [1, "b"],
        {"a": "n#o"},
        ["a, b", "c]"],
        {"d, e": "f}"},
    ],
)
def test_a_value_is_written_so_that_it_is_read_again(value: Any) -> None:
    assert yaml.safe_load(f"key: {_flow(value)}") == {"key": value}
    assert json.dumps(value) is not None


def test_each_task_has_its_first_search() -> None:
    assert set(FIRSTS) == set(TASK_FACTS)
    for task, first in FIRSTS.items():
        assert TASK_FACTS[task].generates is (first.reads == "prompt_template")
        assert first.metric is None or first.metric in TASK_FACTS[task].metrics
