"""What a look at a perturbation costs, in training steps of its method, and what that is a step at the default rate.

A look is all that `method.adversary.adversity` measures: three gradients of the whole weights and eight losses. Looks
and steps take turns in one process, as in `step_time.py`, whose models these are.

    OMP_NUM_THREADS=1 python benchmarks/adversary.py --layers 2 --rounds 10
"""

from __future__ import annotations

import argparse

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from step_time import RANK, SETTINGS, Passes, Step, build_base, build_batch, compare, machine, markdown, measure
from torch import Tensor

from bilora_ray.method import build_method, settings_of
from bilora_ray.method.adversary import Batches, adversity, of_auxiliary, of_factors
from bilora_ray.method.lora_sam import LoraSamAdamW
from bilora_ray.method.spaces import FullSpace, Pass
from bilora_ray.training.probe.adversary import EVERY

METHODS = ("bilora", "lora-sam")


def contenders(name: str, arguments: argparse.Namespace, device: torch.device) -> dict[str, Step]:
    """A step of method `name`, and a look at what it perturbs with, on one model."""
    base = build_base("llama", arguments.hidden, arguments.layers).to(device, getattr(torch, arguments.dtype))
    batches = [build_batch("llama", arguments.tokens, device) for _ in range(3)]
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    model: PeftModel = get_peft_model(base, config)
    optimizer = build_method(name, model, **{key: SETTINGS[key] for key in settings_of(name)})
    closure, space = Passes(model.train(), optimizer, batches[0]), FullSpace(model)
    passes = Batches(*([_pass(model, batch)] for batch in batches))

    def look() -> dict[str, float]:
        if isinstance(optimizer, LoraSamAdamW):
            return adversity(space, passes, of_factors(space, *optimizer.next_perturbed()))
        return adversity(space, passes, of_auxiliary(space, float(str(SETTINGS["rho"]))))

    return {name: lambda: optimizer.step(closure), f"a look at {name}": look}


def _pass(model: PeftModel, batch: dict[str, Tensor]) -> Pass:
    return Pass(lambda: model(**batch).loss, 1, len(batch["input_ids"]))


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--hidden", type=int, default=1024, help="hidden size, a multiple of 64")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512, help="tokens a step, a multiple of 128")
    parser.add_argument("--rounds", type=int, default=10, help="measured looks, each beside a step")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the base")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    ratios = []
    for name in arguments.methods:
        for clock, seconds in measure(contenders(name, arguments, device), arguments.rounds, 2, device).items():
            ratios += [one for one in compare("llama", clock, seconds, [name]) if one.baseline == name]
    print(f"{machine(device)}; {vars(arguments)}\n\n{markdown(ratios)}\n")
    for one in ratios:
        share = 100 * one.median / EVERY
        print(f"- {one.method}, {one.clock}: {share:.2f} % of a step where it is each {EVERY} steps")


if __name__ == "__main__":
    main()
