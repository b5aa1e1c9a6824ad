"""`fit`: what it reports, that seeds and interruptions decide nothing else, and how it fails."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_trials import KINDS, METHODS, TASKS, Tiny, evaluate_adapter, reproducible, run_fit, write_rows
from torch import nn
from toy_methods import TwoPasses, pass_twice

from bilora_ray.config import TrialConfig
from bilora_ray.errors import NonFiniteLoss, UserError
from bilora_ray.measures import Task
from bilora_ray.method import primary_parameters
from bilora_ray.release.export import export_adapter
from bilora_ray.training import loop
from bilora_ray.training import model as models
from bilora_ray.training.checkpoint import trainable
from bilora_ray.training.data.truncation import Truncation
from bilora_ray.training.folder import STATE, TrialFolder
from bilora_ray.training.loop import Progress, Run, fit

COUNTERS = {"step", "max_steps", "epoch", "train_runtime", "tokens_per_second", "num_input_tokens_seen"}
COUNTERS |= set(Truncation(0).metrics())
QUERY = {
    "causal-lm": "0.self_attn.q_proj",
    "seq2seq-lm": "0.SelfAttention.q",
    **dict.fromkeys(KINDS, "0.attention.self.query"),
    "image-classification": "0.attention.q_proj",
}
REPORTED = COUNTERS | {"adapter_mb", "learning_rate", "train_loss"}


def steps_of(run: Run) -> list[float]:
    """The training loss of every step, until the end."""
    losses = []
    while run.progress.step < run.max_steps:
        run.train_step()
        losses.append(float(run.window.losses[-1]))
    return losses


def inputs_of(run: Run) -> list[Any]:
    """What the model reads in every step, until the end."""
    seen: list[Any] = []
    hook = run.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs[run.model.main_input_name].tolist()), with_kwargs=True
    )
    steps_of(run)
    hook.remove()
    return seen


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task", TASKS)
def test_a_trial_reports_its_metrics_and_learns(task: Task, method: str, tiny: Tiny, tmp_path: Path) -> None:
    config = tiny.config(task, method=method, max_steps=24, eval_steps=0.25)
    reports, progress = run_fit(config, tmp_path)
    own = {"auxiliary_norm"} if method == "bilora" else set()
    assert all(report.keys() == REPORTED | own | set(config.available_metrics) for report in reports)
    assert [report["step"] for report in reports] == [6, 12, 18, 24]
    assert all(report["max_steps"] == 24 for report in reports)
    assert [report["epoch"] for report in reports] == [1, 2, 3, 4]  # 44 rows are six steps of at most 8
    assert all(math.isfinite(value) for report in reports for value in report.values())
    assert reports[-1]["train_loss"] < 0.9 * reports[0]["train_loss"]
    assert progress.history == reports
    assert progress.resumed_at == []
    seconds = [report["train_runtime"] for report in reports]
    assert seconds == sorted(seconds)


def test_the_auxiliary_stays_in_its_ball(tiny: Tiny, tmp_path: Path) -> None:
    reports, _ = run_fit(tiny.config("causal-lm", rho=0.02, warmup_ratio=0, eval_steps=1), tmp_path)
    norms = [report["auxiliary_norm"] for report in reports]
    assert all(0 < norm <= 0.02 * (1 + 1e-5) for norm in norms)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"max_steps": 10, "eval_steps": 0.25}, [3, 6, 9, 10]),
        ({"max_steps": 10, "eval_steps": 4}, [4, 8, 10]),
        ({"max_steps": 3, "eval_steps": 100}, [3]),
        ({"max_steps": 3, "eval_steps": 0.001}, [1, 2, 3]),
        ({"max_steps": None, "num_train_epochs": 1, "eval_steps": 6}, [6]),
        ({"max_steps": None, "num_train_epochs": 1.5, "eval_steps": 5}, [5, 9]),
        ({"max_steps": None, "num_train_epochs": 0.01, "eval_steps": 1}, [1]),
        ({"max_steps": 2, "num_train_epochs": 50, "eval_steps": 1}, [1, 2]),
    ],
)
def test_evaluations_come_at_the_steps_asked_for(
    settings: dict[str, Any], steps: list[int], tiny: Tiny, tmp_path: Path
) -> None:
    reports, progress = run_fit(tiny.config("causal-lm", method="lora", **settings), tmp_path)
    assert [report["step"] for report in reports] == steps
    assert progress.step == steps[-1] == reports[0]["max_steps"]


@pytest.mark.parametrize(("share", "of", "whole"), [(1.1, 10, 11), (0.07, 100, 7), (0.29, 100, 29), (0.07, 101, 8)])
def test_a_share_of_steps_does_not_suffer_from_rounding(share: float, of: int, whole: int) -> None:
    # In floating point 1.1 * 10 is more than 11.
    assert loop.share_of(share, of) == whole


def test_the_seed_decides_all_that_is_reported(tiny: Tiny, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"lora_dropout": 0.2, "max_steps": 4}
    first, again, other = (
        reproducible(run_fit(tiny.config("causal-lm", seed=seed, **settings), tmp_path / name)[0])
        for name, seed in (("first", 1), ("again", 1), ("other", 2))
    )
    assert first == again
    assert all(a["train_loss"] != b["train_loss"] for a, b in zip(first, other, strict=True))


def test_the_state_of_the_process_does_not_matter(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny.config("sequence-classification", lora_dropout=0.2, max_steps=4)
    first, _ = run_fit(config, tmp_path / "first")
    torch.manual_seed(12345)
    torch.rand(7)
    again, _ = run_fit(config, tmp_path / "again")
    assert reproducible(first) == reproducible(again)


@pytest.mark.parametrize("task", TASKS)
def test_methods_start_alike_and_see_the_same_rows(task: Task, tiny: Tiny, tmp_path: Path) -> None:
    lora, bilora = (
        Run(tiny.config(task, method=method, lora_dropout=0.3, max_steps=13), TrialFolder(tmp_path / method))
        for method in METHODS
    )
    first, second = primary_parameters(lora.model), primary_parameters(bilora.model)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    torch.manual_seed(0)
    random = torch.get_rng_state()
    rows = inputs_of(lora)
    torch.set_rng_state(random)
    assert inputs_of(bilora) == rows
    assert len(rows) == 13
    # Two epochs and one step: each row once an epoch, in another order.
    epochs = [[row for batch in rows[start : start + 6] for row in batch] for start in (0, 6)]
    assert len(epochs[0]) == len(epochs[1]) == 44
    assert rows[0] != rows[6]


def test_methods_start_with_the_same_dropout(tiny: Tiny, tmp_path: Path) -> None:
    # B2 = 0 at first, so with the same dropout masks the first loss is that of plain LoRA. B1 is moved off 0 for
    # the masks to matter.
    losses = {}
    for name, seed in (("lora", 0), ("bilora", 0), ("other", 1)):
        method = "lora" if name == "other" else name
        run = Run(tiny.config("causal-lm", method=method, lora_dropout=0.5), TrialFolder(tmp_path / name))
        state = torch.get_rng_state()
        with torch.no_grad():
            for parameter in primary_parameters(run.model).values():
                parameter.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
        torch.set_rng_state(state)
        if seed:
            torch.manual_seed(seed)
        run.train_step()
        losses[name] = float(run.window.losses[-1])
    assert losses["bilora"] == pytest.approx(losses["lora"], rel=1e-5)
    assert losses["other"] != pytest.approx(losses["lora"], rel=1e-3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task", TASKS)
def test_accumulated_passes_are_one_large_batch(task: Task, method: str, tiny: Tiny, tmp_path: Path) -> None:
    # 44 rows: the last step of an epoch has 4 of them. Targets have 2 to 9 tokens, so a mean of means would differ.
    losses = []
    for name, size, count in (("one", 8, 1), ("four", 2, 4)):
        config = tiny.config(
            task,
            method=method,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=count,
            max_steps=12,
            learning_rate=2e-3,
        )
        run = no_model_dropout(Run(config, TrialFolder(tmp_path / name)))
        losses.append(steps_of(run))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.fixture
def any_method(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts the methods back after a test with a toy one."""
    monkeypatch.setattr(models, "build_optimizer", models.build_optimizer)


@pytest.mark.usefixtures("any_method")
@pytest.mark.parametrize("task", TASKS)
def test_two_passes_of_a_step_are_of_the_same_loss(task: Task, tiny: Tiny, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "lora_dropout": 0.5}
    config = tiny.config(task, method="lora", max_steps=6, **settings)
    once = Run(config, TrialFolder(tmp_path / "once"))
    steps_of(once)
    pass_twice(rho=0.0)
    twice = Run(config, TrialFolder(tmp_path / "twice"))
    steps_of(twice)
    assert isinstance(twice.optimizer, TwoPasses)
    assert all(torch.equal(first, second) for first, second in twice.optimizer.losses)
    # And so each step begins with the dropout, and counts the tokens, of a step of one pass.
    assert [float(loss) for loss in twice.window.losses] == [float(loss) for loss in once.window.losses]
    assert twice.window.tokens == once.window.tokens > 0
    ours, theirs = (trainable(run.model) for run in (twice, once))
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.usefixtures("any_method")
def test_what_a_method_draws_between_its_passes_is_not_drawn_again(tiny: Tiny, tmp_path: Path) -> None:
    run = Run(tiny.config("causal-lm", lora_dropout=0.5), TrialFolder(tmp_path))
    closure = run.gradients.closure(run._next_rows())
    first = closure()
    drawn = torch.rand(3)
    assert torch.equal(closure(), first)
    assert not torch.equal(torch.rand(3), drawn)


@pytest.mark.usefixtures("any_method")
@pytest.mark.parametrize("passes", [1, 2])
def test_a_step_waits_for_no_number_of_its_own(
    passes: int, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if passes == 2:
        pass_twice(rho=0.1)
    run = Run(tiny.config("causal-lm", method="lora"), TrialFolder(tmp_path))
    seen: list[Any] = []
    for name in ("__float__", "item", "tolist"):
        read = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda tensor, read=read: (seen.append(read(tensor)), read(tensor))[1])
    update = run.schedule.step
    monkeypatch.setattr(run.schedule, "step", lambda: seen.append("updated") or update())
    losses = []
    for _ in range(3):
        run.train_step()
        losses.append(run.window.losses[-1])
    numbers = [read(loss) for loss in losses]
    assert [one for one in seen if one == "updated" or one in numbers] == [
        *("updated", "updated", numbers[0], "updated", numbers[1])
    ]


@pytest.mark.usefixtures("any_method")
def test_a_second_pass_that_is_not_a_number_ends_the_trial(tiny: Tiny, tmp_path: Path) -> None:
    pass_twice(rho=math.inf)
    with pytest.raises(NonFiniteLoss, match=r"^loss is nan at step 1$"):
        run_fit(tiny.config("causal-lm", eval_steps=2), tmp_path / "later")
    with pytest.raises(NonFiniteLoss, match=r"^loss is nan at step 1$"):
        run_fit(tiny.config("causal-lm", eval_steps=1), tmp_path / "evaluated")
    assert not list(tmp_path.rglob("*.safetensors"))


def no_model_dropout(run: Run) -> Run:
    """`run` without the dropout of its base model, whose masks depend on how rows are batched."""
    for module in run.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    return run


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task", TASKS)
def test_gradient_checkpointing_changes_no_loss(task: Task, method: str, tiny: Tiny, tmp_path: Path) -> None:
    losses, counts = [], []
    for recompute in (False, True):
        config = tiny.config(task, method=method, gradient_checkpointing=recompute, lora_dropout=0.1, max_steps=4)
        run = Run(config, TrialFolder(tmp_path / str(recompute)))
        calls: list[int] = []
        layer = next(module for name, module in run.model.named_modules() if name.endswith(QUERY[task]))
        layer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        losses.append(steps_of(run))
        counts.append(len(calls))
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert counts == [4, 8]


def test_gradient_checkpointing_leaves_generation_alone(tiny: Tiny, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"predict_with_generate": True, "max_new_tokens": 4, "max_steps": 2}
    reports = []
    for recompute in (False, True):
        config = tiny.config("causal-lm", gradient_checkpointing=recompute, **settings)
        report = run_fit(config, tmp_path / str(recompute))[0][-1]
        reports.append({key: value for key, value in report.items() if key.startswith("eval_")})
    assert reports[0] == pytest.approx(reports[1], rel=1e-6)


@pytest.mark.parametrize("task", TASKS)
def test_in_bf16_all_that_is_trained_stays_fp32(task: Task, tiny: Tiny, tmp_path: Path) -> None:
    config = tiny.config(task, precision="bf16", max_steps=6, eval_steps=3)
    run = Run(config, TrialFolder(tmp_path / "run"))
    frozen = [(name, p) for name, p in run.model.named_parameters() if not p.requires_grad]
    assert {p.dtype for name, p in frozen if "original_module" not in name} == {torch.bfloat16}
    assert {name: p.dtype for name, p in trainable(run.model).items() if p.dtype != torch.float32} == {}
    reports, _ = run_fit(config, tmp_path / "fit")
    assert all(math.isfinite(report["eval_loss"]) for report in reports)
    assert reports[-1]["train_loss"] < reports[0]["train_loss"]


def test_the_gradient_norm_is_limited_per_branch(tiny: Tiny, tmp_path: Path) -> None:
    norms = {}
    for limit in (None, 1e-3):
        run = Run(tiny.config("causal-lm", max_grad_norm=limit), TrialFolder(tmp_path / str(limit)))
        run.train_step()
        # The first moment of a first step is a share of the gradient as it was limited.
        norms[limit] = [
            float(torch.nn.utils.get_total_norm([run.optimizer.state[p]["exp_avg"] for p in group["params"]]))
            / (1 - group["betas"][0])
            for group in run.optimizer.param_groups
        ]
    assert norms[1e-3] == pytest.approx([1e-3, 1e-3], rel=1e-3)
    assert min(norms[None]) > 1e-2


def cosine(step: int, warmup: int, steps: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


@pytest.mark.parametrize(
    ("kind", "ratio", "factor"),
    [
        ("cosine", 0.2, lambda step: step / 2 if step < 2 else cosine(step, 2, 10)),
        ("cosine", 0.0, lambda step: cosine(step, 0, 10)),
        ("linear", 0.3, lambda step: step / 3 if step < 3 else (10 - step) / 7),
        ("constant", 0.5, lambda step: 1.0),
        ("constant_with_warmup", 0.4, lambda step: min(1.0, step / 4)),
    ],
)
def test_the_learning_rate_follows_its_schedule(
    kind: str, ratio: float, factor: Any, tiny: Tiny, tmp_path: Path
) -> None:
    config = tiny.config(
        "causal-lm",
        lr_scheduler_type=kind,
        warmup_ratio=ratio,
        auxiliary_learning_rate=3e-3,
        max_steps=10,
        eval_steps=1,
    )
    run = Run(config, TrialFolder(tmp_path))
    for step in range(1, 11):
        run.train_step()
        primary, auxiliary = run.schedule.get_last_lr()
        assert primary == pytest.approx(1e-2 * factor(step), abs=1e-12)
        assert auxiliary == pytest.approx(3e-3 * factor(step), abs=1e-12)
    # What is reported is the rate that the last step was made with.
    assert run.evaluate()["learning_rate"] == pytest.approx(1e-2 * factor(9), abs=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_that_is_not_a_number_ends_the_trial(method: str, tiny: Tiny, tmp_path: Path) -> None:
    config = tiny.config("causal-lm", method=method, learning_rate=1e30, warmup_ratio=0, eval_steps=1)
    with pytest.raises(NonFiniteLoss) as caught:
        run_fit(config, tmp_path)
    assert not math.isfinite(caught.value.loss)
    assert str(caught.value) == f"loss is {caught.value.loss} at step {caught.value.step}"
    assert caught.value.step <= 3
    for kept in tmp_path.rglob("*.safetensors"):
        assert kept.parent.name < f"step-{caught.value.step:08d}"


def test_nothing_is_kept_of_the_step_that_failed(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny.config("causal-lm", eval_steps=2)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", explode_at(3, loop.evaluate))
        with pytest.raises(NonFiniteLoss, match=r"^loss is nan at step 6$"):
            run_fit(config, tmp_path)
    folder = TrialFolder(tmp_path)
    assert folder.state()["step"] == 4
    best = folder.best_adapter()
    assert best is not None
    assert [path.name for path in (tmp_path / "adapters").iterdir()] == [best.name]
    assert int(best.name.removeprefix("step-")) <= 4


def test_what_was_good_before_a_late_nan_stays_and_is_exported(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny.config("causal-lm", eval_steps=2)
    run = Run(config, TrialFolder(tmp_path / "trial"))
    for _ in range(4):
        run.train_step()
        if run.evaluation_due():
            metrics = run.evaluate()
    with torch.no_grad():
        next(iter(primary_parameters(run.model).values())).fill_(math.nan)
    run.train_step()
    with pytest.raises(NonFiniteLoss, match=r"^loss is nan at step 5$"):
        run.train_step()
    run.folder.discard_tensors()  # as the study does with a trial that failed
    best = run.folder.best_adapter()
    assert best is not None
    export_adapter(best, tmp_path / "exported", {"study": "s", "trial": 0})
    measured = evaluate_adapter(tmp_path / "exported", config)
    kept = metrics if run.progress.best_step == 4 else run.progress.history[0]
    assert measured == {name: kept[name] for name in config.available_metrics}


def explode_at(count: int, evaluate: Any) -> Any:
    """`evaluate`, whose loss is NaN at call `count`."""
    calls = []

    def exploding(*args: Any) -> dict[str, float]:
        calls.append(1)
        metrics = evaluate(*args)
        return metrics | {"eval_loss": math.nan} if len(calls) == count else metrics

    return exploding


def test_nothing_is_written_after_a_loss_that_is_not_a_number(tiny: Tiny, tmp_path: Path) -> None:
    run = Run(tiny.config("causal-lm"), TrialFolder(tmp_path))
    run.train_step()
    with torch.no_grad():
        next(iter(primary_parameters(run.model).values())).fill_(math.inf)
    run.train_step()
    with pytest.raises(NonFiniteLoss, match=r"^loss is nan at step 2$"):
        run.evaluate()
    assert not list(tmp_path.rglob("*.safetensors"))
    assert run.progress.history == []


def test_running_out_of_memory_fails_the_trial_and_not_the_search(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Run) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore.")

    monkeypatch.setattr(Run, "train_step", full)
    with pytest.raises(loop.OutOfMemory, match=r"^out of memory after step 0: 2\.00 GiB more were needed, "):
        run_fit(tiny.config("causal-lm"), tmp_path)


def test_chat_data_trains(tiny: Tiny, tmp_path: Path) -> None:
    files = {f"{split}_data": str(tiny.folder / f"chats-{split}.jsonl") for split in ("train", "validation")}
    config = tiny.config("causal-lm", messages_column="messages", max_length=128, max_steps=24, eval_steps=6, **files)
    reports, _ = run_fit(config, tmp_path)
    assert reports[-1]["train_loss"] < 0.8 * reports[0]["train_loss"]
    assert reports[-1]["eval_loss"] < reports[0]["eval_loss"]


def fit_until(step: int, config: TrialConfig, path: Path) -> tuple[list[float], Progress]:
    """The steps that are told where the report of `step` says that it is enough, and what `fit` returns."""
    told: list[float] = []

    def report(metrics: dict[str, float]) -> bool:
        told.append(metrics["step"])
        return metrics["step"] != step

    return told, fit(config, TrialFolder(path), report)


def test_a_report_that_says_no_ends_the_trial_which_can_go_on_later(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny.config("causal-lm", lora_dropout=0.2)
    whole, _ = run_fit(config, tmp_path / "whole")
    path = tmp_path / "ended"
    told, progress = fit_until(4, config, path)
    assert (told, progress.step) == ([2, 4], 4)
    assert TrialFolder(path).state()["step"] == 4
    assert TrialFolder(path).best_adapter() is not None
    reports, progress = run_fit(config, path)
    assert reproducible(reports) == reproducible(whole)
    assert progress.resumed_at == [4]


def test_a_report_that_says_nothing_says_yes(tiny: Tiny, tmp_path: Path) -> None:
    reports: list[dict[str, float]] = []
    progress = fit(tiny.config("causal-lm"), TrialFolder(tmp_path), reports.append)  # type: ignore[arg-type]
    assert (len(reports), progress.step) == (4, 8)


def test_an_earlier_evaluation_that_is_told_again_can_end_the_trial_too(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny.config("causal-lm")
    fit_until(6, config, tmp_path)
    told, progress = fit_until(4, config, tmp_path)
    assert (told, progress.step) == ([2, 4], 6)
    assert TrialFolder(tmp_path).state()["step"] == 6


def problem(config: TrialConfig, path: Path) -> str:
    """The line that a wrong `config` gives."""
    with pytest.raises(UserError) as caught:
        fit(config, TrialFolder(path), lambda _: True)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_a_missing_model_folder_is_named(tiny: Tiny, tmp_path: Path) -> None:
    missing = str(tmp_path / "nowhere")
    config = tiny.config("causal-lm", model_name_or_path=missing)
    assert problem(config, tmp_path / "run") == f"model_name_or_path: no such folder: {missing}"


def test_a_folder_without_a_model_is_named(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    config = tiny.config("causal-lm", model_name_or_path=str(tmp_path / "empty"))
    start = f"model_name_or_path: cannot load '{tmp_path / 'empty'}' ("
    assert problem(config, tmp_path / "run").startswith(start)


def test_a_model_that_does_not_fit_the_task_is_named(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny.config("seq2seq-lm", model_name_or_path=str(tiny.model("causal-lm")))
    assert problem(config, tmp_path / "run") == f"task: '{tiny.model('causal-lm')}' is no model for seq2seq-lm"


@pytest.mark.parametrize("method", METHODS)
def test_target_modules_that_match_nothing_are_named(method: str, tiny: Tiny, tmp_path: Path) -> None:
    config = tiny.config("causal-lm", method=method, target_modules=("nothing",))
    assert problem(config, tmp_path) == (
        "target_modules: Target modules {'nothing'} not found in the base model. "
        "Please check the target modules and try again."
    )


def test_target_modules_that_bilora_cannot_perturb_are_named(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny.config("causal-lm", target_modules=("embed_tokens", "q_proj"))
    line = "target_modules: the auxiliary perturbs linear layers only, not model.embed_tokens"
    assert problem(config, tmp_path) == line


def test_chat_data_needs_a_chat_template(tiny: Tiny, tmp_path: Path) -> None:
    rows = [{"chat": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 4
    data = str(write_rows(tmp_path / "chat.jsonl", rows))
    model = tiny.model("seq2seq-lm")
    config = tiny.config(
        "causal-lm", model_name_or_path=str(model), messages_column="chat", train_data=data, validation_data=None
    )
    line = f"messages_column: the tokenizer of {model} has no chat template; name a file in chat_template"
    assert problem(config, tmp_path / "run") == line


def test_device_is_where_all_parameters_are(tiny: Tiny, tmp_path: Path) -> None:
    run = Run(tiny.config("sequence-classification"), TrialFolder(tmp_path))
    assert {parameter.device.type for parameter in run.model.parameters()} == {models.device().type}


def first_calm(config: TrialConfig, path: Path, patience: int) -> int | None:
    """After how many evaluations a whole trial has had `patience` of them, in a row, without a better metric."""
    losses = [report["eval_loss"] for report in run_fit(config, path)[0]]
    for count in range(patience + 1, len(losses) + 1):
        if min(losses[count - patience : count]) >= min(losses[: count - patience]):
            return count
    return None


def test_a_trial_ends_by_itself_once_it_is_out_of_patience(tiny: Tiny, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "max_steps": 24,
        "eval_steps": 1,
        "learning_rate": 0.06,
        "lr_scheduler_type": "constant",
    }
    count = first_calm(tiny.config("causal-lm", **settings), tmp_path / "whole", patience=3)
    assert count is not None
    assert 4 < count < 24
    config = tiny.config("causal-lm", early_stopping_patience=3, **settings)
    reports, progress = run_fit(config, tmp_path / "patient")
    assert [report["step"] for report in reports] == list(range(1, count + 1))
    assert reports[-1]["patience_left"] == 0 < reports[-2]["patience_left"] <= 3
    assert progress.best_value == min(report["eval_loss"] for report in reports)
    # Interrupted amid the evaluations that are in vain, it ends where it would have ended; and told again, it has.
    fit_until(count - 1, config, tmp_path / "resumed")
    for _ in range(2):
        assert reproducible(run_fit(config, tmp_path / "resumed")[0]) == reproducible(reports)


def test_the_tokens_that_a_trial_has_seen_are_counted_over_a_resume(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny.config("causal-lm", max_steps=8, eval_steps=2)
    whole, _ = run_fit(config, tmp_path / "whole")
    seen = [report["num_input_tokens_seen"] for report in whole]
    run = Run(config, TrialFolder(tmp_path / "rows"))
    assert seen[-1] == sum(row.length for step in range(8) for row in run._rows_of(step))
    assert all(a < b for a, b in zip([0, *seen], seen, strict=False))
    fit_until(4, config, tmp_path / "resumed")
    state = TrialFolder(tmp_path / "resumed").latest()
    assert state is not None
    told = json.loads((state / STATE).read_text())
    del told["num_input_tokens_seen"]  # as an earlier version left it
    (state / STATE).write_text(json.dumps(told))
    resumed, _ = run_fit(config, tmp_path / "resumed")
    assert [report["num_input_tokens_seen"] for report in resumed] == seen
