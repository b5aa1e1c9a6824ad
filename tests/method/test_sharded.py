"""Each method moves a model of which two processes have a part each as it moves the whole one."""

import json
import os
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from test_rivals import settings
from tiny import closure_of, model_of
from torch import distributed as dist
from torch import multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from bilora_ray.method import METHODS, build_method

STEPS = 6
# They refuse a model in parts: their noise is on whole weights.
OF_WHOLE_WEIGHTS = {"flat-lora", "rwp"}


def losses(name, place, own):
    model, batch = model_of(name, "llama", torch.float64)
    optimizer = build_method(name, model.train(), place, **settings(name, max_grad_norm=0.5, **own))
    optimizer.total_steps = STEPS
    closure = closure_of(base_of(model), optimizer, batch)
    return [float(optimizer.step(closure).detach()) for _ in range(STEPS)]


def base_of(model):
    # PEFT calls the base model's forward past its hooks, in which FSDP gathers the weights.
    return model.get_base_model() if isinstance(model, PeftModel) else model


def shard(model):
    fully_shard(base_of(model), mesh=init_device_mesh("cpu", (2,)))


def train_a_part(rank, folder, cases):
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    Path(folder, str(rank)).write_text(json.dumps([losses(name, shard, own) for name, own in cases]))
    dist.barrier()
    # A thread of gloo's may outlive its group, and abort a process that ends in the usual way.
    os._exit(0)


@pytest.mark.slow
def test_parts_of_a_model_move_as_the_whole_one(tmp_path):
    cases: list = [*((name, {"looksam_every": 2}) for name in METHODS if name not in OF_WHOLE_WEIGHTS)]
    cases += [("bilora", {"clip": "per-layer", "rho": 0.005})]
    cases += [("bilora", {"ascent": rule, "auxiliary_learning_rate": None}) for rule in ("tangent", "half-step")]
    multiprocessing.spawn(train_a_part, (str(tmp_path), cases), nprocs=2)
    for rank in range(2):
        for (name, own), found in zip(cases, json.loads((tmp_path / str(rank)).read_text()), strict=True):
            whole = losses(name, lambda _: None, own)
            assert found == pytest.approx(whole, rel=1e-9), name
            assert len(set(whole)) == STEPS
