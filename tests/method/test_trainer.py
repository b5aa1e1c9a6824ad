"""The HF Trainer: the README's example, and a run that is cut off and resumed."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import bilora_model, llama
from transformers import Trainer, TrainingArguments

from bilora_ray.method import (
    BiLoraAdamW,
    attach_auxiliary,
    auxiliary_parameters,
    export_primary,
    primary_parameters,
)

pytest.importorskip("accelerate")


def rows(count):
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 40, (count, 7), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def test_the_readme_example(tmp_path):
    torch.manual_seed(0)
    base, train_rows, eval_rows, output_dir = llama()[0], rows(24), rows(4), tmp_path / "run"
    reference = copy.deepcopy(base)

    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear"))
    attach_auxiliary(model, rank=8)
    optimizer = BiLoraAdamW(model, learning_rate=5e-4, rho=0.05, max_grad_norm=1.0)
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir,
            max_grad_norm=0,  # the optimizer limits each branch's gradient by itself
            num_train_epochs=3,
            save_steps=0.5,
            eval_strategy="epoch",
            report_to="none",
        ),
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        optimizers=(optimizer, None),
    )
    trainer.train()  # resume_from_checkpoint=True continues exactly
    export_primary(model, tmp_path / "adapter")  # an ordinary PEFT adapter

    served = PeftModel.from_pretrained(reference, tmp_path / "adapter").eval()
    batch = {key: torch.stack([row[key] for row in eval_rows]) for key in eval_rows[0]}
    served_loss = float(served(**batch).loss.detach())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(served_loss, abs=1e-6)
    assert not (tmp_path / "adapter" / "auxiliary").exists()


def trainer_of(output_dir, **arguments):
    model, _ = bilora_model("llama", lora_dropout=0.1)
    settings = {"max_grad_norm": 0, "per_device_train_batch_size": 4, "save_steps": 3, "report_to": "none", **arguments}
    return Trainer(
        model,
        TrainingArguments(output_dir, **settings),
        train_dataset=rows(16),
        optimizers=(BiLoraAdamW(model, learning_rate=1e-3, rho=0.05, max_grad_norm=1.0), None),
    )


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path):
    whole = trainer_of(tmp_path / "run", max_steps=6)
    whole.train()
    resumed = trainer_of(tmp_path / "again", max_steps=6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    for named in (primary_parameters, auxiliary_parameters):
        ours, theirs = named(resumed.model), named(whole.model)
        assert ours.keys() == theirs.keys()
        for name, parameter in theirs.items():
            assert parameter.requires_grad
            assert torch.equal(ours[name], parameter), name
