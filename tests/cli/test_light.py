"""The command line before any work: helps, checks and completion come at once, without the libraries that take time."""

import json
import os
import shlex
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from bilora_ray import __version__, cli
from bilora_ray.cli.main import COMMANDS, main

REPOSITORY = Path(__file__).resolve().parents[2]
SPACE = REPOSITORY / "search_spaces" / "llama.yaml"
SCRIPT = Path(sys.executable).with_name("bilora-ray")
HEAVY = {"datasets", "mlflow", "optuna", "peft", "ray", "torch", "transformers"}
# Runs a command line and prints, as its last line on stderr, what was imported for it.
PROBE = """
import json, sys
from bilora_ray.cli.main import main
try:
    main(prog_name="bilora-ray")
finally:
    print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})), file=sys.stderr)
"""
# The same for `python -m bilora_ray`.
MODULE_PROBE = PROBE.replace("from bilora_ray.cli.main import main", "import runpy").replace(
    'main(prog_name="bilora-ray")', 'runpy.run_module("bilora_ray", run_name="__main__", alter_sys=True)'
)


def run(*words: str, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """The installed command, as a shell starts it."""
    return subprocess.run(
        [str(SCRIPT), *words], capture_output=True, text=True, env={**os.environ, **(environment or {})}, timeout=120
    )


def imported(*words: str, exit_code: int = 0, probe: str = PROBE) -> set[str]:
    """The libraries that a command line imports."""
    done = subprocess.run([sys.executable, "-c", probe, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == exit_code, done.stderr
    return set(json.loads(done.stderr.splitlines()[-1]))


def command(name: str) -> click.Command:
    found = main.get_command(click.Context(main), name)
    assert found is not None
    return found


def examples(name: str) -> Iterator[list[str]]:
    """The command lines in the help of a command, without its name and without what a pipe does with the output."""
    text = (command(name).epilog or "").replace("\\\n", " ")
    for line in text.splitlines():
        words = shlex.split(line)
        if words[:2] == ["bilora-ray", name]:
            yield words[2 : words.index("|") if "|" in words else None]


# A user's own files with the names of packages


@pytest.fixture
def shadows(tmp_path: Path) -> Path:
    """A folder whose files are in the way, if Python looks there first."""
    for name in ("yaml", "pydantic", "click", "random"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('mine')")
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "__init__.py").touch()
    return tmp_path


@pytest.mark.parametrize("command", [[str(SCRIPT)], [sys.executable, "-m", "bilora_ray"]])
def test_a_file_of_the_current_folder_is_not_taken_for_a_package(command: list[str], shadows: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    typed = [*command, "validate", str(SPACE)]
    done = subprocess.run(typed, cwd=shadows, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("name", "package"), [("datasets/__init__.py", "datasets"), ("tokenizers.py", "tokenizers")])
@pytest.mark.parametrize("path", [".", ":/nowhere"])
def test_a_file_that_python_is_told_to_take_for_a_package_is_named(
    path: str, name: str, package: str, tmp_path: Path
) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("1 / 0")
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        [SCRIPT, "settings", "rho"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    line = f"Error: {file}: Python takes it for the package {package}, as PYTHONPATH says; rename it\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)


# Light


def test_an_adapter_that_is_not_there_is_told_without_heavy_libraries() -> None:
    assert imported("evaluate", "nowhere", exit_code=2) & HEAVY == set()


@pytest.mark.parametrize(
    "words",
    [
        ("--help",),
        ("--version",),
        *((name, "--help") for name in COMMANDS),
        ("validate", str(SPACE)),
        ("validate", str(SPACE), "--set", "rho=0.05", "--json"),
        ("validate", str(SPACE.with_name("quickstart.yaml"))),
        ("settings",),
    ],
    ids=" ".join,
)
def test_what_needs_no_model_imports_no_heavy_library(words: tuple[str, ...]) -> None:
    assert imported(*words) & HEAVY == set()


@pytest.mark.parametrize("words", [("--help",), ("tune", "--help"), ("validate", str(SPACE))], ids=" ".join)
def test_the_module_is_as_light_as_the_command(words: tuple[str, ...]) -> None:
    assert imported(*words, probe=MODULE_PROBE) == imported(*words) | {"runpy"}


@pytest.mark.parametrize(
    "words",
    [
        ("validate", "no-such-file.yaml"),
        ("tune", "--space", str(SPACE), "--set", "rnak=8"),
        ("tune", "--space", "no-such-file.yaml"),
        ("train", "--set", "rnak=8"),
        ("submit", "--address", "http://127.0.0.1:1", "--space", str(SPACE), "--storage-path", "/s", "--set", "rnak=8"),
        ("submit", "--address", "auto", "--space", str(SPACE), "--storage-path", "/s"),
        ("no-such-command",),
    ],
    ids=lambda words: " ".join(Path(word).name for word in words),
)
def test_a_mistake_is_told_before_any_heavy_library_is_imported(words: tuple[str, ...]) -> None:
    assert imported(*words, exit_code=2) & HEAVY == set()


def test_a_wrong_row_is_told_before_any_heavy_library_is_imported(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    space = tmp_path / "space.yaml"
    space.write_text(
        "study: {name: s}\n"
        "trial: {model_name_or_path: model, train_data: data.jsonl, task: causal-lm, rank: {choice: [4, 8]}}\n"
    )
    assert imported("tune", "--space", str(space), exit_code=2) & HEAVY == set()


def test_the_probe_sees_what_is_imported() -> None:
    # Without this, a probe that prints nothing would let everything pass.
    assert {"click", "pydantic", "yaml", "bilora_ray"} <= imported("validate", str(SPACE))
    assert "yaml" not in imported("--help")


# Help


def test_every_command_is_listed_with_its_line() -> None:
    text = CliRunner().invoke(main, ["--help"], terminal_width=200).output
    for name, line in COMMANDS.items():
        assert f"  {name} " in text
        assert line in text
    assert list(COMMANDS) == main.list_commands(click.Context(main))


def test_every_module_with_a_command_is_a_verb() -> None:
    modules = {path.stem: path.read_text() for path in Path(cli.__path__[0]).glob("*.py")}
    assert {name for name, source in modules.items() if "\ndef command(" in source} == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_what_it_is_for_with_an_example(name: str) -> None:
    result = CliRunner().invoke(main, [name, "--help"])
    assert result.exit_code == 0
    assert len((command(name).help or "").split()) >= 4
    assert "Example" in result.output
    assert list(examples(name))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_a_help_text(name: str) -> None:
    options = [parameter for parameter in command(name).params if isinstance(parameter, click.Option)]
    assert options
    assert [option.name for option in options if not (option.help or "").strip()] == []


@pytest.mark.parametrize(
    ("name", "words"), [(name, words) for name in COMMANDS for words in examples(name)], ids=lambda part: str(part)[:60]
)
def test_every_example_is_a_command_line_that_its_command_takes(name: str, words: list[str]) -> None:
    command(name).make_context(name, list(words))


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize("name", [None, *COMMANDS])
def test_help_has_a_short_flag_everywhere(name: str | None, flag: str) -> None:
    result = CliRunner().invoke(main, [flag] if name is None else [name, flag])
    assert (result.exit_code, result.output.startswith("Usage: ")) == (0, True)


# Mistakes of the command line


@pytest.mark.parametrize("name", COMMANDS)
def test_an_unknown_option_is_refused(name: str) -> None:
    result = CliRunner().invoke(main, [name, "--no-such-option"])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "--no-such-option" in result.stderr.splitlines()[-1]


def test_the_installed_command_refuses_what_it_does_not_know() -> None:
    for words, named in ((("serach",), "'serach'"), (("tune", "--spaec", "x"), "--spaec")):
        done = run(*words)
        assert (done.returncode, done.stdout) == (2, "")
        assert "Traceback" not in done.stderr
        error = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
        assert len(error) == 1
        assert named in error[0]


def test_a_users_error_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = run("validate", str(tmp_path / "gone.yaml"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"Error: {tmp_path / 'gone.yaml'}: no such file\n"


@pytest.mark.parametrize(
    "words", [("--help",), ("show", "--help"), ("settings", "rho"), ("serach",), ("tune", "--spaec")]
)
def test_the_package_as_a_module_is_the_command(words: tuple[str, ...]) -> None:
    module = subprocess.run([sys.executable, "-m", "bilora_ray", *words], capture_output=True, text=True, timeout=120)
    command = run(*words)
    assert module.returncode == command.returncode
    for said, expected in ((module.stdout, command.stdout), (module.stderr, command.stderr)):
        assert said.replace("python -m bilora_ray", "bilora-ray") == expected


def test_the_version_is_the_packages() -> None:
    assert run("--version").stdout == f"bilora-ray, version {__version__}\n"


# validate


def test_validate_says_what_is_searched_in_words(tmp_path: Path) -> None:
    space = tmp_path / "space.yaml"
    space.write_text(
        "study: {name: s, num_trials: 3, points_to_evaluate: [{method: lora, rank: 8}]}\n"
        "trial:\n"
        "  {model_name_or_path: owner/model, train_data: owner/data, task: causal-lm, lora_alpha: 2 * rank,\n"
        "  weight_decay: {value: 0.1, when: {method: lora}},\n"
        "  method: {choice: [lora, bilora]}, rank: {low: 4, high: 16, step: 4},\n"
        "  rho: {low: 5e-3, high: 0.5, log: true}, lora_dropout: {low: 0, high: 0.1}}\n"
    )
    output = CliRunner().invoke(main, ["validate", str(space)], env={"COLUMNS": "200"}).output
    lines = [" ".join(line.split()) for line in output.splitlines() if line.strip(" ─")]
    assert lines == [
        f"{space} is valid: study 's', 3 trials",
        "setting kind range when points",
        "method choice lora, bilora 2",
        "rank range 4 to 16, in steps of 4 4",
        "rho log range 0.005 to 0.5 method is bilora continuous",
        "lora_dropout range 0 to 0.1 continuous",
        "lora_alpha derived 2 * rank",
        "weight_decay fixed 0.1 method is lora",
        "model_name_or_path fixed owner/model",
        "train_data fixed owner/data",
        "task fixed causal-lm",
        "size: continuous in rho, lora_dropout",
        "runs first: {method: lora, rank: 8}",
    ]


def test_validate_counts_the_trials_of_a_finite_space(tmp_path: Path) -> None:
    space = tmp_path / "space.yaml"
    space.write_text(
        "study: {name: s}\ntrial: {model_name_or_path: o/m, train_data: o/d, task: causal-lm, rank: {choice: [4, 8]}}\n"
    )
    output = CliRunner().invoke(main, ["validate", str(space)], env={"COLUMNS": "120"}).output
    assert output.splitlines()[-1] == "size: 2 different trials"
    assert " when " not in output


def test_validate_says_when_there_is_nothing_to_search(tmp_path: Path) -> None:
    space = tmp_path / "space.yaml"
    space.write_text("study: {name: s}\ntrial: {model_name_or_path: o/m, train_data: o/d, task: causal-lm}\n")
    output = CliRunner().invoke(main, ["validate", str(space)]).output.splitlines()
    assert output[0] == f"{space} is valid: study 's', 20 trials"
    assert output[-1] == "no setting has a distribution, so `bilora-ray train` runs it and `tune` does not"


def test_validate_prints_json_for_scripts() -> None:
    result = CliRunner().invoke(main, ["validate", str(SPACE), "--set", "rank=8", "--set", "study.seed=3", "--json"])
    space = json.loads(result.output)
    assert list(space) == [
        *("study", "resources", "fixed", "distributions", "given", "settings", "size", "points_to_evaluate", "notes")
    ]
    row = {"setting": "rho", "kind": "log range", "range": "0.005 to 1", "when": "", "points": "continuous"}
    assert row in space["settings"]
    assert space["size"] == {"trials": None, "continuous": ["rho", "learning_rate"]}
    assert (space["study"]["name"], space["study"]["seed"], space["fixed"]["rank"]) == ("llama-alpaca", 3, 8)
    assert space["distributions"]["rho"] == {"low": 0.005, "high": 1.0, "log": True}
    assert space["distributions"]["auxiliary_rank"] == {"choice": [2, 4, 8, 16]}


# Shell completion


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_completion_script_is_produced(shell: str) -> None:
    done = run(environment={"_BILORA_RAY_COMPLETE": f"{shell}_source"})
    assert done.returncode == 0
    assert "_BILORA_RAY_COMPLETE" in done.stdout
    assert "_bilora_ray_completion" in done.stdout


def test_completion_offers_every_command_and_the_options() -> None:
    offered = _offered("", 1)
    assert offered == list(COMMANDS)
    assert _offered("val", 1) == ["validate"]
    assert {"--space", "--resume", "--dry-run"} <= set(_offered("tune --", 2))


def _offered(typed: str, position: int) -> list[str]:
    words = {"COMP_WORDS": f"bilora-ray {typed}", "COMP_CWORD": str(position)}
    done = run(environment={"_BILORA_RAY_COMPLETE": "bash_complete", **words})
    assert done.returncode == 0, done.stderr
    return [line.partition(",")[2] for line in done.stdout.splitlines()]


def test_completion_opens_no_other_file_than_the_database(tmp_path: Path) -> None:
    storage = tmp_path / "a#b"
    storage.mkdir()
    with closing(sqlite3.connect(storage / "studies.db")) as connection, connection:
        connection.execute("CREATE TABLE studies (study_name TEXT)")
        connection.execute("INSERT INTO studies VALUES ('first')")
    assert _offered(f"show --storage-path {storage} ", 4) == ["first"]
    assert [path.name for path in tmp_path.iterdir()] == ["a#b"]
