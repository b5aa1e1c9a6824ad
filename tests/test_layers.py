"""The arrows of the design, read from the source: who may import whom, late imports included, and what nobody may."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "bilora_ray"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# A layer may import those with a greater number, and itself.
DEPTH = {
    "__main__": 0,
    "cli": 1,
    "search": 2,
    "runners": 3,
    "release": 3,
    "training": 4,
    "method": 5,
    "recipe": 6,
    "config": 7,
    "paths": 7,
    "builtin": 8,
    "addresses": 9,
    "errors": 9,
    "files": 9,
    "quiet": 9,
    "records": 9,
}
# Tracking stands beside them: these it may import, and these may import it.
TRACKING_KNOWS = {"addresses", "config", "errors", "records", "tracking"}
TRACKING_IS_KNOWN_TO = {"cli", "search", "runners", "tracking"}
# Library -> the layers that may import it.
LIBRARIES = {"ray": {"search", "runners"}, "optuna": {"search"}, "mlflow": {"tracking"}}
# Modules that are imported before anything is known to be right, so without the libraries that take seconds.
LIGHT = ("bilora_ray.config", "bilora_ray.errors", "bilora_ray.paths", "bilora_ray.search.space", "bilora_ray.cli")
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
    layer = _layer(module)
    wrong = []
    for line, name in imports(source, module, is_package):
        library = name.split(".")[0]
        is_light = any(f"{module}.".startswith(f"{light}.") for light in LIGHT) or module == "bilora_ray"
        if library == "bilora_ray":
            allowed = _may_import(layer, _layer(name))
        elif library in LIBRARIES:
            allowed = layer in LIBRARIES[library] and not is_light
        else:
            allowed = name != "an unreadable name" and not (is_light and library in HEAVY)
        if not allowed:
            wrong.append(f"{module}, line {line}: {name}")
    return wrong


def _layer(module: str) -> str:
    return [*module.split("."), ""][1]


def _may_import(layer: str, other: str) -> bool:
    if other == "__version__":
        return True
    if "tracking" in (layer, other):
        return other in TRACKING_KNOWS if layer == "tracking" else layer in TRACKING_IS_KNOWN_TO
    if layer not in DEPTH or other not in DEPTH:
        return False
    return layer == other or DEPTH[layer] < DEPTH[other]


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
    rooms = {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in SOURCES} - {"__init__"}
    assert rooms - set(DEPTH) == {"tracking"}
    # So that a rename cannot leave a rule that holds for nothing.
    assert set(DEPTH) - rooms <= {"__main__"}
    for light in LIGHT:
        assert any(f"{module_of(path)}.".startswith(f"{light}.") for path in SOURCES)


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_nothing_runs_a_strangers_text_or_file(path: Path) -> None:
    assert unsafe(path.read_text(encoding="utf-8")) == []


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
        ("bilora_ray.training.loop", "from ..search import study", "bilora_ray.search.study.study"),
        ("bilora_ray.training.loop", "from .. import cli", "bilora_ray.cli"),
        ("bilora_ray.training.loop", "from bilora_ray.tracking import guard", "bilora_ray.tracking.guard"),
        ("bilora_ray.method.radius", "import bilora_ray.tracking", "bilora_ray.tracking"),
        ("bilora_ray.records", "from bilora_ray.search.study import study", "bilora_ray.search.study.study"),
        ("bilora_ray.records", "from bilora_ray.paths import SOURCES", "bilora_ray.paths.SOURCES"),
        ("bilora_ray.report.page", "from bilora_ray.config import TrialConfig", "bilora_ray.config.TrialConfig"),
        ("bilora_ray.cli.show", "from bilora_ray.report import page", "bilora_ray.report.page"),
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
        ("bilora_ray.search.study.study", "import optuna, ray"),
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


def test_a_packages_relative_import_starts_at_itself() -> None:
    assert list(imports("from . import space\nfrom .. import errors", "bilora_ray.search", is_package=True)) == [
        (1, "bilora_ray.search.space"),
        (2, "bilora_ray.errors"),
    ]


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
