"""What is known of a setting beside its type, its limits and its description: it stands on the field."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from pydantic import Field

from bilora_ray.checking import Settings

MethodName = Literal[
    "lora", "bilora", "dual-lora", "lora-sam", "looksam", "esam", "nbar", "obar", "flat-lora", "rwp", "full"
]
# What a setting decides: see `Facts`.
Decides = Literal["rows", "training rows", "model", "training", "evaluation", "memory"]
METHOD_NAMES: tuple[MethodName, ...] = get_args(MethodName)
# Those that train the base model itself. All others leave it as it is, and put an adapter on it.
WHOLE: tuple[MethodName, ...] = ("full",)
ADAPTING: tuple[MethodName, ...] = tuple(name for name in METHOD_NAMES if name not in WHOLE)
# Those with random noise, on whole tensors.
NOISY: tuple[MethodName, ...] = ("flat-lora", "rwp")

# What a model card calls a method, with its source.
METHOD_TITLES: dict[MethodName, str] = {
    "lora": "LoRA",
    "bilora": "Bi-LoRA (sharpness-aware LoRA, [arXiv 2508.19564](https://arxiv.org/abs/2508.19564))",
    "dual-lora": "Dual-LoRA (an ablation of Bi-LoRA, [arXiv 2508.19564](https://arxiv.org/abs/2508.19564))",
    "lora-sam": "LoRA-SAM ([arXiv 2010.01412](https://arxiv.org/abs/2010.01412) on the factors)",
    "looksam": "LookSAM ([arXiv 2203.02714](https://arxiv.org/abs/2203.02714) on the factors)",
    "esam": "ESAM ([arXiv 2110.03141](https://arxiv.org/abs/2110.03141) on the factors)",
    "nbar": "nBAR ([arXiv 2410.14802](https://arxiv.org/abs/2410.14802))",
    "obar": "oBAR ([arXiv 2410.14802](https://arxiv.org/abs/2410.14802))",
    "flat-lora": "Flat-LoRA ([arXiv 2409.14396](https://arxiv.org/abs/2409.14396))",
    "rwp": "random weight perturbation ([arXiv 2211.11489](https://arxiv.org/abs/2211.11489))",
    "full": "full fine-tuning",
}

# What the primary adapter is, beside plain LoRA.
Primary = Literal["lora", "dora", "rslora", "pissa", "lora-ga"]
# Those that begin with other factors than 0, so that W is W0 + s (B1 A1 - B0 A0).
STARTING: tuple[Primary, ...] = ("pissa", "lora-ga")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of a setting beside its type, its limits and its description: what may be done with it follows.

    Attributes:
        decides: what it decides first: `rows`, as a model reads them, the held-out ones among them; the `training rows`
            alone; the base `model`, its tokenizer and the weights that a training starts from; the `training`: which
            adapter comes out; the `evaluation`: what is measured of an adapter; the `memory` and the time that a
            forward pass takes, and how it rounds.
        of: the methods that read it.
        searched: whether a search may try several values: trials that differ in it can be compared.
        holds_out: whether it decides which rows are held out: see `deciding_the_split`.
        source: what it names a file, a folder or a Hub repository of.
        revision: the setting that names the commit of such a repository.
        rehearsed: whether a dry run tries each of its values: it could have other modules, or ask for a package.
        amid: whether a training may go on from a checkpoint with another value: nothing there has its shape or its
            meaning from it. What an optimizer's group holds of it, is there by its name.
        shown: where a person is told of it unasked: in the table of a model `card`, under the `best` trial.
        before: what versions without the setting did, where its default does something else; None: the same.
    """

    decides: Decides
    searched: bool
    of: tuple[MethodName, ...] = METHOD_NAMES
    holds_out: bool = False
    source: Literal["model", "data", "template"] | None = None
    revision: str | None = None
    rehearsed: bool = False
    amid: bool = False
    shown: tuple[Literal["card", "best"], ...] = ()
    before: bool | int | float | str | None = None

    def __post_init__(self) -> None:
        if self.decides not in get_args(Decides) or not set(self.of) <= set(METHOD_NAMES):
            raise TypeError(f"no such facts: {self}")


def methods_in_words(of: Sequence[MethodName], mark: str = "") -> str:
    """The methods that something is `of`, each between two marks: `lora, bilora`, or `all but full`; empty if all."""
    others = [name for name in METHOD_NAMES if name not in of]
    few = len(others) < len(of) / 2
    said = ", ".join(f"{mark}{name}{mark}" for name in (others if few else of))
    return f"all but {said}" if others and few else said if others else ""


def setting(
    default: Any,
    description: str,
    *,
    decides: Decides,
    gt: float | None = None,
    ge: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    min_length: int | None = None,
    **facts: Any,
) -> Any:
    """A field of `TrialConfig`.

    Args:
        default: `...` where there is none.
        description: the one place where the setting is described.
        decides: see `Facts`. It has no default, so that nothing is assumed of a new setting.
        gt: with `ge`, `le`, `lt` and `min_length`: as pydantic has them.
        facts: see `Facts`. Trials are compared on the same rows, by the same measure: what decides those is not
            searched unless it says so.

    Raises:
        TypeError: there are no such facts.
    """
    known = asdict(Facts(decides=decides, **{"searched": decides not in ("rows", "evaluation"), **facts}))
    limits: dict[str, Any] = {"gt": gt, "ge": ge, "le": le, "lt": lt, "min_length": min_length}
    return Field(default, description=description, json_schema_extra=known, **limits)


def facts_of(kind: type[Settings]) -> dict[str, Facts]:
    """The facts of every setting of a `kind`. TypeError if one was declared without `setting`."""
    extras: dict[str, Any] = {key: field.json_schema_extra or {} for key, field in kind.model_fields.items()}
    return {key: Facts(**extra) for key, extra in extras.items()}
