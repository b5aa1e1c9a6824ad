"""Joined updates against torch's own, tensor by tensor: equal to the bit, whatever happens to a tensor in between."""

import copy
import pickle

import pytest
import torch
from tiny import bilora_model, closure_of, primary_model
from torch import nn

from bilora_ray.method import BiLoraAdamW, LoraAdamW, auxiliary_factors, flat, primary_parameters
from bilora_ray.method.base import MethodAdamW
from bilora_ray.method.radius import project_

STEPS = 8
GROUP = {"lr": 1e-2, "weight_decay": 0.1, "max_grad_norm": 1.0}


class TensorByTensor(torch.optim.AdamW):
    """What `MethodAdamW` joins, one after the other."""

    def step(self, closure=None):
        loss = closure() if closure else None
        for group in self.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], group["max_grad_norm"])
        super().step()
        return loss


@pytest.fixture(params=[None, (130, 300)], ids=["all", "some"])
def _limits(request, monkeypatch):
    """As they are, or so small that there are long tensors, and several lines of short ones."""
    if request.param:
        monkeypatch.setattr(flat, "LONGEST_ON_CPU", request.param[0])
        for name in ("MOST_ON_CPU", "MOST_ON_THREADS"):
            monkeypatch.setattr(flat, name, request.param[1])


def assert_same(ours, theirs, states=()):
    assert all(map(torch.equal, ours, theirs))
    if states:
        for one, other in zip(*(optimizer.state_dict()["state"].values() for optimizer in states), strict=True):
            assert one.keys() == other.keys()
            assert all(torch.equal(one[key], other[key]) for key in one)


def joined(optimizer):
    """How many lines each group has."""
    return [len(plan.joined) for plan in optimizer._plans.values()]


@pytest.mark.usefixtures("_limits")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_branches_move_as_torch_moves_them(dtype):
    ours, batch = bilora_model("t5", dtype=dtype)
    theirs = copy.deepcopy(ours)
    optimizer = BiLoraAdamW(ours, learning_rate=1e-2, rho=0.05, weight_decay=0.1, max_grad_norm=0.5)
    factors = auxiliary_factors(theirs)
    groups = [{**GROUP, "params": list(primary_parameters(theirs).values()), "max_grad_norm": 0.5}]
    auxiliary = [tensor for layer in factors for tensor in (layer.A, layer.B)]
    groups.append({**GROUP, "params": auxiliary, "weight_decay": 0.0, "maximize": True, "max_grad_norm": 0.5})
    plain = TensorByTensor(groups)
    for _ in range(STEPS):
        loss = optimizer.step(closure_of(ours, optimizer, batch))
        assert torch.equal(loss, plain.step(closure_of(theirs, plain, batch)))
        project_(factors, 0.05)
    assert min(joined(optimizer)) > 0
    assert_same(ours.parameters(), theirs.parameters(), (optimizer, plain))


def tensors(*, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 5), (7, 3), (1, 1), (), (7, 3), (60,), (5, 13), (2, 5), (200, 41), (3, 1, 4), (0, 4)]
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


class Race:
    """Two optimizers on the same parameters, with the same gradients."""

    def __init__(self, *parameters):
        self.parameters = [list(parameters), copy.deepcopy(list(parameters))]
        ours, theirs = ([{**GROUP, "params": own}] for own in self.parameters)
        self.optimizers = [MethodAdamW(ours), TensorByTensor(theirs)]
        self.generator = torch.Generator().manual_seed(1)

    def run(self, steps, *without):
        """Do `steps` steps; the parameters `without` have no gradient."""
        for _ in range(steps):
            for number, pair in enumerate(zip(*self.parameters, strict=True)):
                gradient = torch.randn(pair[0].shape, generator=self.generator).to(pair[0].dtype)
                for parameter in pair:
                    parameter.grad = None if number in without else gradient.clone()
            for optimizer in self.optimizers:
                optimizer.step()
            assert_same(*self.parameters, self.optimizers)

    def do(self, what):
        for parameters, optimizer in zip(self.parameters, self.optimizers, strict=True):
            what(parameters, optimizer)


@pytest.mark.usefixtures("_limits")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_of_all_shapes_move_as_torch_moves_them(dtype):
    race = Race(*tensors(dtype=dtype))
    race.run(STEPS)
    assert joined(race.optimizers[0])[0] > 0


def test_a_parameter_without_a_gradient_stays_and_falls_behind():
    race = Race(*tensors())
    race.run(3)
    before = race.parameters[0][1].detach().clone(), race.optimizers[0].state[race.parameters[0][1]]["exp_avg"].clone()
    race.run(2, 1, 4)
    after = race.parameters[0][1], race.optimizers[0].state[race.parameters[0][1]]["exp_avg"]
    assert all(map(torch.equal, before, after))
    race.run(3)
    assert joined(race.optimizers[0]) == [2]  # those of each step by themselves
    race.run(1, *range(len(race.parameters[0])))
    race.run(1)


def new_data(parameters, _):
    for parameter in parameters[2:4]:
        parameter.data = parameter.data.clone()


def new_moments(parameters, optimizer):
    for parameter in parameters[2:4]:
        optimizer.state[parameter]["exp_avg"] = torch.ones_like(parameter)


def moments_moved_away_and_back(_, optimizer):
    for state in optimizer.state.values():
        state["exp_avg_sq"].data = state["exp_avg_sq"].data.clone() * 2


def new_states(parameters, optimizer):
    optimizer.state.update({p: {key: kept * 2 for key, kept in optimizer.state[p].items()} for p in parameters})


def loaded(_, optimizer):
    optimizer.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))  # noqa: S301 # our own bytes


def begun_again(parameters, optimizer):
    optimizer.state[parameters[4]]["step"].zero_()


def forgotten(parameters, optimizer):
    del optimizer.state[parameters[1]]


def another_parameter(parameters, optimizer):
    del optimizer.state[parameters[2]]
    parameters[2] = optimizer.param_groups[0]["params"][2] = nn.Parameter(torch.ones(1, 1))


def unusual(_, optimizer):
    optimizer.param_groups[0]["capturable"] = True
    optimizer.param_groups[0]["capturable"] = False
    optimizer.param_groups[0]["foreach"] = True


def another_rate(_, optimizer):
    optimizer.param_groups[0]["lr"] = 3e-3


@pytest.mark.parametrize(
    "what",
    [
        new_data,
        new_moments,
        moments_moved_away_and_back,
        new_states,
        loaded,
        begun_again,
        forgotten,
        another_parameter,
        unusual,
        another_rate,
    ],
)
def test_what_others_change_between_two_steps_counts(what):
    race = Race(*tensors())
    race.run(3)
    race.do(what)
    race.run(3)
    assert joined(race.optimizers[0])[0] > 0


def test_states_go_to_torchs_own_and_back():
    race = Race(*tensors())
    race.run(3)
    ours, theirs = race.optimizers
    saved = copy.deepcopy(ours.state_dict()), copy.deepcopy(theirs.state_dict())
    ours.load_state_dict(saved[1])
    theirs.load_state_dict(saved[0])
    race.run(3)


@pytest.mark.parametrize("setting", ["amsgrad", "mixed"])
def test_what_cannot_be_joined_is_torchs(setting):
    more = tensors(dtype=torch.float64)[:2] if setting == "mixed" else []
    race = Race(*tensors(), *more)
    if setting == "amsgrad":
        race.do(lambda _, optimizer: optimizer.param_groups[0].update(amsgrad=True))
    race.run(3)
    assert joined(race.optimizers[0]) == []


def test_no_parameter_shares_a_memory_with_another():
    model, batch = primary_model("llama")
    optimizer = LoraAdamW(model, learning_rate=1e-3)
    for _ in range(3):
        optimizer.step(closure_of(model.train(), optimizer, batch))
    assert joined(optimizer)[0] > 0
    for parameter in model.parameters():
        assert parameter.untyped_storage().nbytes() == parameter.numel() * parameter.element_size()
    size = sum(parameter.untyped_storage().nbytes() for parameter in model.parameters())
    optimizer.zero_grad()
    assert len(pickle.dumps(model.state_dict())) < size + 1000 * len(model.state_dict())


def test_a_copied_optimizer_goes_on_by_itself():
    race = Race(*tensors())
    race.run(3)
    ours = race.optimizers[0]
    before = copy.deepcopy(race.parameters[0])
    twin = copy.deepcopy(ours)
    for parameter in (moved := twin.param_groups[0]["params"]):
        parameter.grad = torch.ones_like(parameter)
    twin.step()
    assert_same(before, race.parameters[0])
    assert not torch.equal(moved[0], before[0])
    race.run(2)
