"""Several workers, over gloo, against one: the same batches, the same losses, the same adapter, also after a kill."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from tiny_trials import TASKS, Tiny, reproducible, run_fit
from torch import Tensor, multiprocessing, nn
from torch import distributed as dist
from toy_methods import pass_twice, remember

from bilora_ray.config import TrialConfig
from bilora_ray.measures import ADVERSITY, Task
from bilora_ray.training.compute.compiled import why_not
from bilora_ray.training.distributed import parallel
from bilora_ray.training.distributed.parallel import Network
from bilora_ray.training.distributed.workers import Workers
from bilora_ray.training.folder import TENSORS, TrialFolder

Job = Callable[..., Any]


def together(count: int, job: Job, *arguments: Any) -> list[Any]:
    """What `job(*arguments)` returns, as JSON, in each of `count` processes of one gloo group."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_join, (count, folder, job, arguments), nprocs=count)
        return [json.loads(Path(folder, str(rank)).read_text()) for rank in range(count)]


def _join(rank: int, count: int, folder: str, job: Job, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count)
    Path(folder, str(rank)).write_text(json.dumps(job(*arguments)))
    dist.barrier()
    dist.destroy_process_group()
    # A thread of gloo's may outlive its group, and abort a process that ends in the usual way.
    os._exit(0)


def fit_together(settings: dict[str, Any], path: str, planned: int, sharded: bool, stop_after: int = -1) -> Any:
    """The reports of a trial that these processes train, or of its first `stop_after` evaluations."""
    from bilora_ray.training.loop import fit

    reports: list[dict[str, float]] = []

    def report(metrics: dict[str, float]) -> bool:
        reports.append(metrics)
        if len(reports) == stop_after:
            raise KeyboardInterrupt
        return True

    workers = Workers.joined(planned, sharded)
    try:
        fit(TrialConfig(**settings), TrialFolder(Path(path)), report, workers)
    except KeyboardInterrupt:
        assert len(reports) == stop_after
    return reports


def without_dropout(tiny: Tiny, task: Task, folder: Path) -> str:
    """The task's model with no dropout: each worker draws its own."""
    copy = shutil.copytree(tiny.model(task), folder / "model")
    config = json.loads((copy / "config.json").read_text())
    rates = {key: 0.0 for key in config if "dropout" in key and isinstance(config[key], float)}
    (copy / "config.json").write_text(json.dumps(config | rates))
    return str(copy)


def settings_of(tiny: Tiny, task: Task, rows: int, **settings: Any) -> dict[str, Any]:
    """Settings with `rows` a device, and batches that 44 rows do not fill evenly."""
    return tiny.config(task, per_device_train_batch_size=rows, **settings).model_dump()


def check_alike(one: list[dict[str, float]], several: list[dict[str, float]], path: Path, other: Path) -> None:
    """Equal reports within 1e-4, and adapters within 1e-3."""
    assert len(one) == len(several)
    for wanted, given in zip(reproducible(one), reproducible(several), strict=True):
        assert given == pytest.approx(wanted, abs=1e-4, rel=1e-4)
    adapter, same = (TrialFolder(folder).best_adapter() for folder in (path, other))
    assert adapter is not None
    assert same is not None
    weights, others = (load_file(next(folder.glob("*.safetensors"))) for folder in (adapter, same))
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        # Not each value: AdamW makes a whole step of a gradient that is zero but for its rounding.
        assert (tensor - others[name]).norm() <= 1e-3 * tensor.norm(), name


# Whole copies are compared in the slow tests: parts of a model take the same way, and more.
PARTED = [pytest.param(False, marks=pytest.mark.slow, id="ddp"), pytest.param(True, id="fsdp")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "own"), [("flat-lora", {}), ("rwp", {}), ("rwp", {"rwp_space": "lora"}), ("esam", {}), ("full", {})]
)
def test_two_workers_train_a_rival_as_one_does(method: str, own: dict[str, Any], tiny: Tiny, tmp_path: Path) -> None:
    length: dict[str, Any] = {"method": method, "rho": 0.2, "max_steps": 4, "eval_steps": 2, "learning_rate": 2e-3}
    length |= {"model_name_or_path": without_dropout(tiny, "causal-lm", tmp_path), **own}
    one, _ = run_fit(tiny.config("causal-lm", per_device_train_batch_size=6, **length), tmp_path / "one")
    settings = settings_of(tiny, "causal-lm", rows=3, **length)
    two = together(2, fit_together, settings, str(tmp_path / "two"), 2, False)
    assert reproducible(two[0]) == reproducible(two[1])
    check_alike(one, two[0], tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize(("sharded", "method"), [(False, "bilora"), (False, "esam"), (True, "bilora")])
def test_two_workers_tell_of_the_perturbation_what_one_does_and_parts_of_a_model_nothing(
    sharded: bool, method: str, tiny: Tiny, tmp_path: Path
) -> None:
    own: dict[str, Any] = {"method": method, "rho": 0.2, "learning_rate": 2e-3, "max_steps": 4, "eval_steps": 2}
    own |= {"model_name_or_path": without_dropout(tiny, "causal-lm", tmp_path), "adversary_steps": 2}
    one, _ = run_fit(tiny.config("causal-lm", per_device_train_batch_size=6, **own), tmp_path / "one")
    two = together(2, fit_together, settings_of(tiny, "causal-lm", rows=3, **own), str(tmp_path / "two"), 2, sharded)
    assert reproducible(two[0]) == reproducible(two[1])
    looked = {key: one[-1][key] for key in ADVERSITY}
    told = {key: two[0][-1][key] for key in ADVERSITY if key in two[0][-1]}
    # Rises are small numbers, of which the weights' roundings are a part.
    assert told == ({"auxiliary_norm": pytest.approx(0.2)} if sharded else pytest.approx(looked, rel=2e-2, abs=2e-3))


@pytest.mark.slow
def test_two_workers_with_compiled_blocks_equal_one_without(tiny: Tiny, tmp_path: Path) -> None:
    if reason := why_not("cpu"):
        pytest.skip(reason)
    length: dict[str, Any] = {"max_steps": 6, "eval_steps": 3, "learning_rate": 2e-3}
    length |= {"model_name_or_path": without_dropout(tiny, "causal-lm", tmp_path)}
    one, _ = run_fit(tiny.config("causal-lm", per_device_train_batch_size=6, **length), tmp_path / "one")
    settings = settings_of(tiny, "causal-lm", rows=3, torch_compile=True, **length)
    two = together(2, fit_together, settings, str(tmp_path / "two"), 2, False)
    assert [report.pop("compiled") for report in two[0]] == [1.0, 1.0]
    check_alike(one, two[0], tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("sharded", PARTED)
@pytest.mark.parametrize(
    "task", ["causal-lm", *(pytest.param(task, marks=pytest.mark.slow) for task in TASKS if task != "causal-lm")]
)
def test_two_workers_equal_one(task: Task, sharded: bool, tiny: Tiny, tmp_path: Path) -> None:
    length: dict[str, Any] = {"max_steps": 50, "eval_steps": 5, "learning_rate": 2e-3}
    length |= {"model_name_or_path": without_dropout(tiny, task, tmp_path)}
    one, _ = run_fit(tiny.config(task, per_device_train_batch_size=6, **length), tmp_path / "one")
    settings = settings_of(tiny, task, rows=3, **length)
    two = together(2, fit_together, settings, str(tmp_path / "two"), 2, sharded)
    assert reproducible(two[0]) == reproducible(two[1])
    check_alike(one, two[0], tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("sharded", PARTED)
def test_interrupted_workers_go_on_exactly_and_generate_what_one_generates(
    sharded: bool, tiny: Tiny, tmp_path: Path
) -> None:
    data = {f"{split}_data": str(tiny.folder / f"colours-{split}.jsonl") for split in ("train", "validation")}
    shared: dict[str, Any] = {**data, "predict_with_generate": True, "max_new_tokens": 12, "max_steps": 12}
    # An odd number of batches of 5 rows: one worker has nothing to do in the last round.
    shared |= {"per_device_eval_batch_size": 5, "learning_rate": 5e-3, "eval_steps": 3, "answer_pattern": "# (.+)"}
    one, _ = run_fit(tiny.config("causal-lm", gradient_accumulation_steps=2, **shared), tmp_path / "one")
    settings, path = tiny.config("causal-lm", **shared).model_dump(), str(tmp_path / "two")
    begun = together(2, fit_together, settings, path, 2, sharded, 2)
    ended = together(2, fit_together, settings, path, 2, sharded)
    assert [report["step"] for report in begun[0]] == [3, 6]
    assert TrialFolder(tmp_path / "two").state()["resumed_at"] == [6]
    check_alike(one, ended[0], tmp_path / "one", tmp_path / "two")
    assert [report["eval_exact_match"] for report in ended[0]] == [report["eval_exact_match"] for report in one]


def test_workers_that_lack_different_gradients_add_up_each_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Tensor] = []
    monkeypatch.setattr(dist, "broadcast", lambda *_: None)
    given: list[list[float | None]] = [[1.0, 4.0, None], [None, 2.0, None], [None, None, None]]

    def shared(values: list[float | None]) -> list[Any]:
        model = nn.ParameterList([nn.Parameter(torch.zeros(size)) for size in (2, 3, 1)])
        network = Network(cast(Any, model), Workers(planned=3, world_size=3))
        for part, value in zip(model, values, strict=True):
            part.grad = None if value is None else torch.full_like(part, value)
        network.share_gradients()
        return [None if part.grad is None else part.grad.tolist() for part in model]

    monkeypatch.setattr(dist, "all_reduce", lambda tensor: sent.append(tensor.clone()))
    for values in given:
        shared(values)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.copy_(torch.stack(sent).sum(0)))
    assert [shared(values) for values in given] == [[[1.0] * 2, [6.0] * 3, None]] * 3


@pytest.mark.parametrize("most", [1, 4, 5, 100])
def test_gradients_that_are_many_are_added_up_in_parts_and_in_fp32(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Tensor] = []
    monkeypatch.setattr(parallel, "MOST_AT_ONCE", most)
    monkeypatch.setattr(dist, "broadcast", lambda *_: None)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: sent.append(tensor.mul_(3)))
    model = nn.ParameterList([nn.Parameter(torch.zeros(size, dtype=torch.bfloat16)) for size in (2, 3, 1, 4)])
    network = Network(cast(Any, model), Workers(planned=3, world_size=3))
    for number, part in enumerate(model):
        part.grad = torch.full_like(part, number + 1.0)
    network.share_gradients()
    assert [cast(Tensor, part.grad).tolist() for part in model] == [[3.0] * 2, [6.0] * 3, [9.0], [12.0] * 4]
    assert {tensor.dtype for tensor in sent} == {torch.float32}
    assert [tensor.numel() for tensor in sent] == {1: [2, 3, 1, 4, 4], 4: [2, 4, 4, 4], 5: [5, 5, 4], 100: [14]}[most]


def remember_together(settings: dict[str, Any], folder: str, kinds: list[str], sharded: bool) -> None:
    """Train by toy methods that have memories of the `kinds`, without an interruption and with one."""
    for kind in kinds:
        remember(kind)
        whole = fit_together(settings, f"{folder}/{kind}/whole", 2, sharded)
        fit_together(settings, f"{folder}/{kind}/parts", 2, sharded, 1)
        parts = fit_together(settings, f"{folder}/{kind}/parts", 2, sharded)
        assert reproducible(parts) == reproducible(whole), kind


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp"])
def test_interrupted_workers_remember_what_their_method_had(sharded: bool, tiny: Tiny, tmp_path: Path) -> None:
    settings = settings_of(tiny, "causal-lm", rows=3, method="lora", max_steps=4, lora_dropout=0.3)
    kinds = ["buffer of another dtype", "buffer of another shape", "scalar tensor", "schedule in a group", "generator"]
    together(2, remember_together, settings, str(tmp_path), kinds, sharded)
    for kind in kinds:
        trials = (TrialFolder(tmp_path / kind / name) for name in ("parts", "whole"))
        ours, theirs = (load_file(trial.checkpoint_at(4) / TENSORS) for trial in trials)
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def end_apart(settings: dict[str, Any], path: str) -> list[float]:
    """The steps that this worker reports where the first one is told to end at 4, and the other at 2."""
    from bilora_ray.training.loop import fit

    told: list[float] = []

    def report(metrics: dict[str, float]) -> bool:
        told.append(metrics["step"])
        return metrics["step"] != 4 - 2 * dist.get_rank()

    fit(TrialConfig(**settings), TrialFolder(Path(path)), report, Workers.joined(2, False))
    return told


def test_what_the_first_worker_is_told_ends_the_trial_of_all(tiny: Tiny, tmp_path: Path) -> None:
    assert together(2, end_apart, settings_of(tiny, "causal-lm", rows=3), str(tmp_path)) == [[2, 4], [2, 4]]


def once_and_twice(settings: dict[str, Any], folder: str, sharded: bool) -> None:
    """Train by plain LoRA, and by a method that asks twice a step for the same loss."""
    once = fit_together(settings, f"{folder}/once", 2, sharded)
    pass_twice(rho=0.0)
    assert reproducible(fit_together(settings, f"{folder}/twice", 2, sharded)) == reproducible(once)


@pytest.mark.parametrize("sharded", PARTED)
def test_workers_pass_twice_with_the_same_dropout(sharded: bool, tiny: Tiny, tmp_path: Path) -> None:
    settings = settings_of(tiny, "causal-lm", rows=3, method="lora", max_steps=4, lora_dropout=0.5)
    together(2, once_and_twice, settings, str(tmp_path), sharded)
    ours, theirs = (load_file(tmp_path / name / "checkpoints/step-00000004" / TENSORS) for name in ("twice", "once"))
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def most_whole_at_once(settings: dict[str, Any], path: str) -> tuple[int, int]:
    """How many tensors were put together for exports and checkpoints, and how many at most were there at one time."""
    from bilora_ray.training.distributed import parallel

    together, alive, most = parallel.whole, 0, 0
    count = 0

    def gone() -> None:
        nonlocal alive
        alive -= 1

    def spied(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal alive, most, count
        full = together(tensor)
        if full is not tensor:
            alive, count = alive + 1, count + 1
            most = max(most, alive)
            weakref.finalize(full, gone)
        return full

    parallel.whole = spied
    fit_together(settings, path, 2, True)
    return count, most


def test_only_the_first_worker_keeps_what_is_written(tiny: Tiny, tmp_path: Path) -> None:
    settings = settings_of(tiny, "causal-lm", rows=3, max_steps=2, eval_steps=1)
    (count, _), (same, most) = together(2, most_whole_at_once, settings, str(tmp_path))
    newest = TrialFolder(tmp_path).latest()
    assert newest is not None
    assert count == same > len([name for name in load_file(newest / TENSORS) if name.startswith("model.")])
    assert most == 1


@pytest.mark.slow
def test_one_worker_goes_on_where_two_were(tiny: Tiny, tmp_path: Path) -> None:
    one, _ = run_fit(tiny.config("causal-lm", per_device_train_batch_size=6), tmp_path / "one")
    settings, path = settings_of(tiny, "causal-lm", rows=3), str(tmp_path / "two")
    together(2, fit_together, settings, path, 2, False, 2)
    ended = fit_together(settings, path, planned=2, sharded=False)
    assert TrialFolder(tmp_path / "two").state()["resumed_at"]
    check_alike(one, ended, tmp_path / "one", tmp_path / "two")


def pages_of_base(settings: dict[str, Any], path: str, planned: int) -> tuple[int, list[str], int]:
    """How many frozen tensors a trained and evaluated model has; where those lie that are in no file's memory; and
    the bytes of that memory that are this process's own."""
    from bilora_ray.training.loop import Run

    run = Run(TrialConfig(**settings), TrialFolder(Path(path)), Workers.joined(planned, False))
    run.train_step()
    run.evaluate()
    ranges, own = mappings("model.safetensors")
    frozen = {name: parameter for name, parameter in run.model.named_parameters() if not parameter.requires_grad}
    elsewhere = [n for n, p in frozen.items() if not any(start <= p.data_ptr() < end for start, end in ranges)]
    return len(frozen), elsewhere, own


def mappings(file: str) -> tuple[list[tuple[int, int]], int]:
    """The address ranges of this process that are `file`, and the bytes in them that were written to."""
    ranges, own, inside = [], 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            inside = line.endswith(file)
            ranges += [tuple(int(end, 16) for end in first.split("-"))] if inside else []
        elif inside and first == "Private_Dirty:":
            own += int(rest[0]) * 1024
    return ranges, own


def test_the_base_weights_are_in_a_nodes_memory_once(tiny: Tiny, tmp_path: Path) -> None:
    settings = settings_of(tiny, "causal-lm", rows=3)
    for frozen, elsewhere, own in together(2, pages_of_base, settings, str(tmp_path), 2):
        assert frozen > 0
        assert (elsewhere, own) == ([], 0)


def test_what_workers_share_is_neither_lost_nor_repeated() -> None:
    for count in range(1, 12):
        for world_size in range(1, 5):
            shares = [Workers(rank=rank, world_size=world_size).share(range(count)) for rank in range(world_size)]
            assert sorted(item for share in shares for item, counts in share if counts) == list(range(count))
            assert len({len(share) for share in shares}) == 1


def norms_in_parts(seed: int) -> list[float]:
    """The norm of sharded factors before and after their projection, and of whole ones."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    from bilora_ray.method.radius import Factors, perturbation_norm, project_

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    generator = torch.Generator().manual_seed(seed)
    shapes = [(4, 10, 7), (4, 10, 7), (2, 8, 5), (3, 1, 6)]
    whole = [
        Factors(torch.randn(r, n, generator=generator), torch.randn(m, r, generator=generator), 2.0)
        for r, n, m in shapes
    ]
    # The last A is cut along its short side, as where the long one does not divide.
    parts = [
        Factors(
            distribute_tensor(A, mesh, [Shard(1 if A.shape[1] > 1 else 0)]), distribute_tensor(B, mesh, [Shard(0)]), s
        )
        for A, B, s in whole
    ]
    norms = [float(perturbation_norm(factors)) for factors in (whole, parts)]
    norms += [float(project_(factors, 0.5)) for factors in (whole, parts)]
    for one, part in zip(whole, parts, strict=True):
        assert isinstance(part.A, DTensor)
        assert isinstance(part.B, DTensor)
        assert torch.allclose(one.A, part.A.full_tensor())
        assert torch.allclose(one.B, part.B.full_tensor())
    return norms


@pytest.mark.slow
def test_the_radius_of_sharded_factors_is_that_of_whole_ones() -> None:
    for norms in together(2, norms_in_parts, 0):
        assert norms[1] == pytest.approx(norms[0])
        assert norms[2:] == pytest.approx([0.5, 0.5])


def fit_short_of_memory(settings: dict[str, Any], path: str) -> list[int]:
    """Train where the second worker has no room for passes of more than 40 positions; those that failed."""
    from bilora_ray.training.distributed.parallel import Network

    failed: list[int] = []
    call = Network.__call__

    def guarded(network: Network, **batch: torch.Tensor) -> Any:
        read = batch["input_ids"].numel()
        if dist.get_rank() == 1 and read > 40:
            failed.append(read)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return call(network, **batch)

    Network.__call__ = guarded  # type: ignore[method-assign]
    fit_together(settings, path, 2, False)
    return failed


@pytest.mark.slow
def test_a_worker_that_is_out_of_memory_keeps_no_other_waiting(tiny: Tiny, tmp_path: Path) -> None:
    length: dict[str, Any] = {"max_steps": 12, "eval_steps": 3, "learning_rate": 2e-3}
    one, _ = run_fit(tiny.config("causal-lm", per_device_train_batch_size=6, **length), tmp_path / "one" / "0")
    settings = settings_of(tiny, "causal-lm", rows=3, **length)
    first, second = together(2, fit_short_of_memory, settings, str(tmp_path / "two" / "0"))
    assert (first, len(second) > 0) == ([], True)
    two = TrialFolder(tmp_path / "two" / "0").state()
    assert two["proven"]["training"] <= 40
    for report in two["history"]:
        assert report.pop("training_limit") <= 40
    check_alike(one, two["history"], tmp_path / "one" / "0", tmp_path / "two" / "0")
