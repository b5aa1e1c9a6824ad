"""The arrows of the design, read from the source: who may import whom, late imports included, and what nobody may."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from bilora_ray.facts import MethodName
from bilora_ray.measures import TASK_FACTS, Task
from bilora_ray.training.tasks import TASKS

PACKAGE = Path(__file__).resolve().parents[1] / "bilora_ray"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# A room may import those with a greater number, and itself. A part that is not named here belongs to what it lies in.
DEPTH = {
    "__main__": -4,
    "cli": -3,
    "library": -2,
    "cli.progress": -1,
    "cli.tables": 0,
    "cli.notebook": 0,
    "search": 1,
    "report": 2,
    "search.study": 3,
    "search.cluster": 3,
    "search.space": 4,
    "runners": 4,
    "release": 5,
    "training.probe.profile": 5,
    "training.probe.cost": 5,
    "training.probe.retention": 5,
    "training.probe.untrained": 5,
    "training": 6,
    "training.probe": 7,
    "training.rows": 7,
    "training.tasks": 8,
    "training.compute": 9,
    "training.data": 10,
    "training.distributed": 10,
    "training.folder": 10,
    "evidence": 11,
    "method": 11,
    "training.metrics": 11,
    "digests": 12,
    "recipe": 12,
    "words": 12,
    "settings": 13,
    "config": 14,
    "paths": 14,
    "builtin": 15,
    "fields": 15,
    "facts": 16,
    "measures": 17,
    "checking": 18,
    "addresses": 19,
    "errors": 19,
    "expressions": 19,
    "files": 19,
    "garbage": 19,
    "interruption": 19,
    "pictures": 19,
    "quiet": 19,
    "records": 19,
    "threads": 19,
}
# The package itself names what it gives, each from its own place.
GIVES_FROM = {"", "errors", "library", "records"}
# Tracking stands beside them: these it may import, and these may import it.
TRACKING_KNOWS = {"addresses", "config", "errors", "records", "settings", "tracking", "words"}
TRACKING_IS_KNOWN_TO = {"cli", "search", "search.cluster", "tracking"}
# Library -> the rooms and files that may import it.
LIBRARIES = {
    "ray": ("search.cluster", "search.comparing.run", "search.run", "search.tuning", "runners"),
    "optuna": ("search.study",),
    "mlflow": ("tracking",),
}
# So many files a room of the search or of the training has at the most, `__init__.py` apart.
MOST_FILES = 9
# Modules that are imported before anything is known to be right, so without the libraries that take seconds.
LIGHT = (
    "bilora_ray.checking",
    "bilora_ray.cli",
    "bilora_ray.config",
    "bilora_ray.digests",
    "bilora_ray.errors",
    "bilora_ray.paths",
    "bilora_ray.search.comparing.file",
    "bilora_ray.search.space",
    "bilora_ray.search.space_file",
    "bilora_ray.search.study.layout",
    "bilora_ray.settings",
)
HEAVY = {"torch", "transformers", "peft"}

PICKLES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str, module: str, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that `source` imports, wherever the statement stands."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            for alias in node.names:
                yield node.lineno, ".".join([*above, *([node.module] if node.module else []), alias.name])
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__"):
            yield node.lineno, _beginning(node.args[0])


def _called(call: ast.Call) -> str:
    """`load` of `load(x)`, and of `torch.load(x)` too."""
    if isinstance(call.func, ast.Attribute):
        return call.func.attr
    return call.func.id if isinstance(call.func, ast.Name) else ""


def _beginning(text: ast.expr) -> str:
    """What is known of a name that is put together: all of "a.b", `a.b` of f"a.b.{c}", nothing of a variable."""
    if isinstance(text, ast.JoinedStr):
        text = text.values[0]
    return str(text.value).rstrip(".") if isinstance(text, ast.Constant) else "an unreadable name"


def wrong_imports(source: str, module: str, is_package: bool = False) -> list[str]:
    """The imports of `source`, the text of `module`, that run against the arrows."""
    room = _room(module)
    wrong = []
    for line, name in imports(source, module, is_package):
        library = name.split(".")[0]
        is_light = any(f"{module}.".startswith(f"{light}.") for light in LIGHT) or module == "bilora_ray"
        if library == "bilora_ray":
            allowed = _may_import(room, _room(name))
        elif library in LIBRARIES:
            allowed = _is_in(module, LIBRARIES[library]) and not is_light
        else:
            allowed = name != "an unreadable name" and not (is_light and library in HEAVY)
        if not allowed:
            wrong.append(f"{module}, line {line}: {name}")
    return wrong


def _room(module: str) -> str:
    """The part of the house that `module` is in, as DEPTH names it; else the first part of its name."""
    parts = module.split(".")[1:]
    names = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
    return next((name for name in names if name in DEPTH), [*parts, ""][0])


def _is_in(module: str, places: tuple[str, ...]) -> bool:
    return any(f"{module}.".startswith(f"bilora_ray.{place}.") for place in places)


def _may_import(room: str, other: str) -> bool:
    if other == "__version__":
        return True
    if room == "":
        return other in GIVES_FROM
    if "tracking" in (room, other):
        return other in TRACKING_KNOWS if room == "tracking" else room in TRACKING_IS_KNOWN_TO
    if room not in DEPTH or other not in DEPTH:
        return False
    return room == other or DEPTH[room] < DEPTH[other]


def names_in(source: str, names: set[str]) -> list[str]:
    """Where `source` has one of `names` as a text of its own."""
    constants = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant))
    return [f"line {node.lineno}: {node.value}" for node in constants if node.value in names]


def asks_for_a_task(source: str) -> list[str]:
    """The comparisons of `source` that ask which task it is: that belongs into the file of the task."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            asked = [node.left, *node.comparators]
        elif isinstance(node, ast.Match):
            asked = [node.subject]
        else:
            continue
        if any(_name(operand) == "task" or _word(operand) in get_args(Task) for operand in asked):
            found.append(f"line {node.lineno}")
    return found


def _name(operand: ast.expr) -> str:
    """`task` of `config.task`, and of `task` too."""
    return operand.attr if isinstance(operand, ast.Attribute) else getattr(operand, "id", "")


def _word(operand: ast.expr) -> object:
    return operand.value if isinstance(operand, ast.Constant) else None


def unsafe(source: str) -> list[str]:
    """What `source` does that could run a stranger's text or file as a program."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            found += [f"line {node.lineno}: {ast.unparse(node)}"] if _is_unsafe(node) else []
    for line, name in imports(source, "bilora_ray.any.module"):
        found += [f"line {line}: {name}"] if PICKLES & set(name.split(".")) else []
    return found


def _is_unsafe(call: ast.Call) -> bool:
    name, function = _called(call), ast.unparse(call.func)
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    return (
        function in ("eval", "exec", "builtins.eval", "builtins.exec", "os.system", "os.popen")
        or given.get("shell", "False") != "False"
        or (function in ("torch.load", "load") and given.get("weights_only") != "True")
        or given.get("allow_pickle", "False") != "False"
        or given.get("trust_remote_code") == "True"
        or (function.startswith("yaml.") and name in ("load", "load_all", "unsafe_load", "full_load"))
    )


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_imports_run_with_the_arrows(path: Path) -> None:
    assert wrong_imports(path.read_text(encoding="utf-8"), module_of(path), path.name == "__init__.py") == []


def test_every_room_has_its_place_among_the_layers() -> None:
    modules = [module_of(path) for path in SOURCES]
    assert {_room(module) for module in modules} - set(DEPTH) == {"", "tracking"}
    # So that a rename cannot leave a rule that holds for nothing.
    places = {*DEPTH, *(place for places in LIBRARIES.values() for place in places)}
    places |= {light.removeprefix("bilora_ray.") for light in LIGHT}
    empty = {place for place in places if not any(_is_in(module, (place,)) for module in modules)}
    assert empty <= {"__main__"}


@pytest.mark.parametrize("room", ["search", "training"])
def test_no_room_is_a_corridor(room: str) -> None:
    folders = {path.parent for path in (PACKAGE / room).rglob("*.py")}
    files = {folder: [path.name for path in folder.glob("*.py") if path.name != "__init__.py"] for folder in folders}
    assert {str(folder): names for folder, names in files.items() if len(names) > MOST_FILES} == {}


def test_no_module_imports_in_a_circle() -> None:
    known = {module_of(path) for path in SOURCES}
    edges: dict[str, set[str]] = {}
    for path in SOURCES:
        found_in = imports(path.read_text(encoding="utf-8"), module_of(path))
        names = (name for _, name in found_in if name != "bilora_ray.__version__")  # which is there before all else
        found = (name if name in known else name.rpartition(".")[0] for name in names)
        edges[module_of(path)] = {name for name in found if name in known and name != module_of(path)}
    while leaves := {module for module, others in edges.items() if not others & edges.keys()}:
        edges = {module: others for module, others in edges.items() if module not in leaves}
    assert edges == {}


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_only_its_own_file_asks_for_a_task(path: Path) -> None:
    assert _is_in(module_of(path), ("training.tasks",)) or asks_for_a_task(path.read_text(encoding="utf-8")) == []


def test_each_word_for_a_task_has_its_entries() -> None:
    assert set(get_args(Task)) == set(TASK_FACTS) == set(TASKS)


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_nothing_runs_a_strangers_text_or_file(path: Path) -> None:
    assert unsafe(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_a_methods_name_stands_in_its_room_and_among_the_settings_only(path: Path) -> None:
    found = names_in(path.read_text(encoding="utf-8"), set(get_args(MethodName)))
    assert found == [] or _is_in(module_of(path), ("method", "config", "facts", "fields"))


# The checks themselves: each finds what it is for.


@pytest.mark.parametrize(
    ("module", "line", "name"),
    [
        ("bilora_ray.search.study.study", "import bilora_ray.cli.main", "bilora_ray.cli.main"),
        ("bilora_ray.runners.nested", "from bilora_ray.search.space import Space", "bilora_ray.search.space.Space"),
        ("bilora_ray.training.loop", "from bilora_ray import runners", "bilora_ray.runners"),
        ("bilora_ray.method.radius", "from bilora_ray.training import loop as l", "bilora_ray.training.loop"),
        ("bilora_ray.config", "from bilora_ray.method import METHODS", "bilora_ray.method.METHODS"),
        ("bilora_ray.config", "from bilora_ray.paths import SOURCES", "bilora_ray.paths.SOURCES"),
        ("bilora_ray.paths", "from bilora_ray.config import TrialConfig", "bilora_ray.config.TrialConfig"),
        ("bilora_ray.errors", "from bilora_ray import config", "bilora_ray.config"),
        ("bilora_ray.training.loop", "from ..search import study", "bilora_ray.search.study"),
        ("bilora_ray.training.loop", "from .. import cli", "bilora_ray.cli"),
        ("bilora_ray.training.loop", "from bilora_ray.tracking import guard", "bilora_ray.tracking.guard"),
        ("bilora_ray.method.radius", "import bilora_ray.tracking", "bilora_ray.tracking"),
        ("bilora_ray.records", "from bilora_ray.search.study import study", "bilora_ray.search.study.study"),
        ("bilora_ray.records", "from bilora_ray.paths import SOURCES", "bilora_ray.paths.SOURCES"),
        ("bilora_ray.unheard_of.page", "from bilora_ray.config import TrialConfig", "bilora_ray.config.TrialConfig"),
        ("bilora_ray.cli.show", "from bilora_ray.unheard_of import page", "bilora_ray.unheard_of.page"),
        ("bilora_ray.cli.show", "from bilora_ray import *", "bilora_ray.*"),
        ("bilora_ray.cli.show", "import bilora_ray", "bilora_ray"),
        ("bilora_ray", "from bilora_ray.config import TrialConfig", "bilora_ray.config.TrialConfig"),
        ("bilora_ray.training.loop", "import ray", "ray"),
        ("bilora_ray.method.radius", "from ray.train import report", "ray.train.report"),
        ("bilora_ray.cli.tune", "from ray import tune", "ray.tune"),
        ("bilora_ray.records", "import ray", "ray"),
        ("bilora_ray.runners.nested", "import optuna", "optuna"),
        ("bilora_ray.records", "from optuna.trial import TrialState", "optuna.trial.TrialState"),
        ("bilora_ray.search.study.study", "import mlflow", "mlflow"),
        ("bilora_ray.cli.ui", "from mlflow import cli", "mlflow.cli"),
        ("bilora_ray.config", "import torch", "torch"),
        ("bilora_ray.errors", "import torch.nn", "torch.nn"),
        ("bilora_ray.paths", "from transformers import AutoModel", "transformers.AutoModel"),
        ("bilora_ray.search.study.study", "import ray", "ray"),
        ("bilora_ray.search.session", "import ray", "ray"),
        ("bilora_ray.search.session", "import optuna", "optuna"),
        ("bilora_ray.search.study.layout", "import optuna", "optuna"),
        ("bilora_ray.search.study.study", "from bilora_ray.search.run import search", "bilora_ray.search.run.search"),
        ("bilora_ray.search.cluster.cluster", "from bilora_ray.search import study", "bilora_ray.search.study"),
        ("bilora_ray.training.rows", "from bilora_ray.training import model", "bilora_ray.training.model"),
        ("bilora_ray.training.data.order", "from bilora_ray.training import tasks", "bilora_ray.training.tasks"),
        ("bilora_ray.search.space", "import peft", "peft"),
        ("bilora_ray.search.space", "import optuna", "optuna"),
        ("bilora_ray.search.space", "from ray import tune", "ray.tune"),
        ("bilora_ray.cli.train", "from torch import Tensor", "torch.Tensor"),
        ("bilora_ray", "import torch", "torch"),
        (
            "bilora_ray.training.loop",
            "importlib.import_module('bilora_ray.search.study.study')",
            "bilora_ray.search.study.study",
        ),
        ("bilora_ray.training.loop", "import_module(f'bilora_ray.cli.{name}')", "bilora_ray.cli"),
        ("bilora_ray.training.loop", "__import__('ray')", "ray"),
        ("bilora_ray.training.loop", "importlib.import_module(name)", "an unreadable name"),
    ],
)
@pytest.mark.parametrize("late", [False, True])
def test_an_import_against_the_arrows_is_found(module: str, line: str, name: str, late: bool) -> None:
    # `import *` stands at the top only, by Python's own rule, but parses anywhere.
    source = f"class A:\n    def f(self):\n        if 1:\n            {line}\n" if late else f"\n\n\n{line}\n"
    assert wrong_imports(source, module) == [f"{module}, line 4: {name}"]


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("bilora_ray.__main__", "from bilora_ray.cli.main import main"),
        ("bilora_ray.cli.tune", "from bilora_ray.search.run import search"),
        ("bilora_ray.cli.evaluate", "from bilora_ray.training.evaluate import evaluate"),
        ("bilora_ray.cli.show", "from bilora_ray.records import Status"),
        ("bilora_ray.cli.main", "importlib.import_module(f'bilora_ray.cli.{name}')"),
        ("bilora_ray.search.study.study", "import optuna"),
        ("bilora_ray.search.run", "import ray"),
        ("bilora_ray.search.preflight", "import torch"),
        ("bilora_ray.search.run", "from bilora_ray.runners.own_process import run_trial"),
        ("bilora_ray.runners.nested", "from ray import tune, train"),
        ("bilora_ray.runners.nested", "from bilora_ray.records import Status"),
        ("bilora_ray.training.loop", "from . import rows, data"),
        ("bilora_ray.training.loop", "from ..method import METHODS"),
        ("bilora_ray.training.loop", "from bilora_ray import builtin, config, errors, paths"),
        ("bilora_ray.tracking.mlflow_tracker", "import mlflow"),
        ("bilora_ray.tracking.mlflow_tracker", "from bilora_ray import __version__, config, errors"),
        ("bilora_ray.config", "from bilora_ray.errors import UserError"),
        # Only the first part of a name makes it ray's or torch's.
        ("bilora_ray.config", "import rayon, torchless, numpy.ray"),
    ],
)
def test_an_import_with_the_arrows_is_let_through(module: str, line: str) -> None:
    assert wrong_imports(line, module) == []


@pytest.mark.parametrize(
    "line", ['if config.method == "lora":', 'if config.method in ("lora", "x"):', 'for x in {"lora": 1}:']
)
def test_a_methods_name_is_found(line: str) -> None:
    assert names_in(f"{line}\n    pass\n", {"lora"}) == ["line 1: lora"]
    assert names_in(f"{line}\n    pass\n", {"bilora"}) == []


def test_a_packages_relative_import_starts_at_itself() -> None:
    assert list(imports("from . import space\nfrom .. import errors", "bilora_ray.search", is_package=True)) == [
        (1, "bilora_ray.search.space"),
        (2, "bilora_ray.errors"),
    ]


@pytest.mark.parametrize(
    "line",
    [
        "x = 1 if config.task == 'a' else 2",
        "if 'a' != config.task: x = 1",
        "x = config.task in ('a', 'b')",
        "x = 1 if task == 'a' else 2",
        "x = kind == 'seq2seq-lm'",
        "match config.task:\n        case _: pass",
    ],
)
def test_who_asks_for_a_task_is_found(line: str) -> None:
    assert asks_for_a_task(f"def f():\n    {line}\n") == ["line 2"]


def test_who_reads_the_table_of_tasks_is_let_through() -> None:
    assert asks_for_a_task("x = TASKS[config.task].heads == () or TASK_FACTS[task].generates is True") == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "import cloudpickle as cp",
        "from pickle import loads",
        "from ray import cloudpickle",
        "from ray.cloudpickle import loads",
        "import_module('dill')",
        "eval(text)",
        "exec(text, {})",
        "builtins.eval(text)",
        "subprocess.run(text, shell=True)",
        "subprocess.Popen(text, shell=asked)",
        "os.system(text)",
        "os.popen(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.unsafe_load(text)",
    ],
)
def test_what_runs_a_strangers_text_or_file_is_found(line: str) -> None:
    assert len(unsafe(f"def f():\n    {line}\n")) == 1


@pytest.mark.parametrize(
    "line",
    [
        "model.eval()",
        "re.compile(pattern)",
        "subprocess.run(['ls'], shell=False)",
        "torch.load(path, weights_only=True)",
        "json.load(file)",
        "yaml.safe_load(text)",
        "AutoModel.from_pretrained(name, trust_remote_code=config.trust_remote_code)",
    ],
)
def test_what_only_looks_like_it_is_let_through(line: str) -> None:
    assert unsafe(line) == []
