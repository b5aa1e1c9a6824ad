"""The quickstart's search as a good user would write it without bilora-ray: Ray Tune, Optuna, HF Trainer and PEFT.

Twelve LoRA trials on 2 cores, two at a time and one thread each; the loss and the exact match, by generation in one
batch, after each eighth of a trial; early stops by Tune's ASHA. What it leaves out favours it: nothing is tracked, no
checkpoint leaves the trial's folder, and a search that was killed begins anew.

    python benchmarks/rival_ray_tune.py POINTS.json RESULT.json

POINTS.json holds the settings to try, a list of {"rank": ..., "learning_rate": ...}; RESULT.json gets what came out.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
from ray.tune.search.optuna import OptunaSearch

QUICKSTART = Path(__file__).resolve().parents[1] / "bilora_ray" / "builtin" / "quickstart"
ANSWER = re.compile(r"#### (-?\d+)")
MAX_LENGTH, EPOCHS, BATCH, MAX_NEW_TOKENS = 96, 12, 16, 16
# Of each trial's 180 steps: evaluations after every 23rd, rungs of ASHA at 45 and 135.
STEPS, GRACE, REDUCTION = 180, 45, 2


def rows(name: str) -> list[dict[str, str]]:
    """The rows of one of the quickstart's files."""
    return [json.loads(line) for line in (QUICKSTART / name).read_text().splitlines()]


def encoded(row: dict[str, str], tokenizer: Any) -> dict[str, list[int]]:
    """A row as token ids; of the prompt nothing is learned."""
    prompt = tokenizer(row["prompt"]).input_ids
    completion = [*tokenizer(row["completion"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    ids = (prompt + completion)[-MAX_LENGTH:]
    labels = ([-100] * len(prompt) + completion)[-MAX_LENGTH:]
    return {"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)}


def exact_match(model: Any, tokenizer: Any, validation: list[dict[str, str]]) -> float:
    """The share of rows whose answer the model writes, all of them in one batch."""
    import torch

    batch = tokenizer([row["prompt"] for row in validation], return_tensors="pt", padding=True, padding_side="left")
    model.eval()
    with torch.inference_mode():
        written = model.generate(**batch, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    texts = tokenizer.batch_decode(written[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    found = [ANSWER.findall(text)[-1:] for text in texts]
    return sum(map(lambda got, row: got == ANSWER.findall(row["completion"]), found, validation)) / len(validation)


def train(settings: dict[str, Any]) -> None:
    """One trial, in a process of Tune's."""
    import transformers
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    class Report(transformers.TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, **told: Any) -> None:
            found = exact_match(model, tokenizer, validation)
            tune.report({"step": state.global_step, "exact_match": found, "eval_loss": told["metrics"]["eval_loss"]})

    transformers.logging.set_verbosity_error()
    transformers.set_seed(42)
    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART / "model")
    base = AutoModelForCausalLM.from_pretrained(QUICKSTART / "model")
    lora = LoraConfig(r=settings["rank"], lora_alpha=2 * settings["rank"], target_modules="all-linear")
    model = get_peft_model(base, lora)
    validation = rows("validation.jsonl")
    Trainer(
        model=model,
        args=TrainingArguments(
            output_dir="checkpoints",
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=len(validation),
            num_train_epochs=EPOCHS,
            learning_rate=settings["learning_rate"],
            lr_scheduler_type="cosine",
            warmup_steps=0.03,
            eval_strategy="steps",
            eval_steps=0.125,
            save_strategy="steps",
            save_steps=0.125,
            save_total_limit=1,
            logging_strategy="no",
            prediction_loss_only=True,
            dataloader_pin_memory=False,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=[encoded(row, tokenizer) for row in rows("train.jsonl")],
        eval_dataset=[encoded(row, tokenizer) for row in validation],
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
        callbacks=[Report()],
    ).train()


def main() -> None:
    """Search, and write down what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("points", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--no-stops", action="store_true", help="every trial runs to its end")
    parser.add_argument("--reuse-actors", action="store_true", help="Tune's own setting, which is off by default")
    parser.add_argument("--concurrent", type=int, default=2)
    arguments = parser.parse_args()
    points = json.loads(arguments.points.read_text())
    ray.init(num_cpus=arguments.concurrent, include_dashboard=False, log_to_driver=False)
    asha = ASHAScheduler(time_attr="step", grace_period=GRACE, reduction_factor=REDUCTION, max_t=STEPS)
    results = tune.Tuner(
        tune.with_resources(train, {"cpu": 1}),
        param_space={"rank": tune.choice([4, 8, 16]), "learning_rate": tune.loguniform(3e-4, 3e-2)},
        tune_config=tune.TuneConfig(
            metric="exact_match",
            mode="max",
            num_samples=len(points),
            max_concurrent_trials=arguments.concurrent,
            search_alg=OptunaSearch(points_to_evaluate=points, seed=42),
            scheduler=FIFOScheduler() if arguments.no_stops else asha,
            reuse_actors=arguments.reuse_actors,
        ),
        run_config=tune.RunConfig(storage_path=str(arguments.result.resolve().parent / "tune"), verbose=0),
    ).fit()
    trials = []
    for number in range(len(results)):
        last, every = results[number].metrics or {}, results[number].metrics_dataframe
        best = 0.0 if every is None else float(every["exact_match"].max())
        trials.append({"steps": int(last["step"]), "exact_match": best, **last["config"]})
    arguments.result.write_text(json.dumps(trials))


if __name__ == "__main__":
    main()
