"""Make the quickstart: its data, its tokenizer and its small language model.

Run ``python -m bilora_ray.builtin.make_quickstart [--out DIR] [--data-only]``.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from bilora_ray.builtin import path
from bilora_ray.builtin.quickstart_data import SEED, Row, pretraining_rows, task_splits, write_splits

VOCABULARY = 1024
CONTEXT_TOKENS = 128
MAX_NEW_TOKENS = 20
PAD, BOS, EOS = "<pad>", "<s>", "</s>"
EPOCHS = 3
BATCH_ROWS = 64
PEAK_LR = 3e-3
WARMUP_STEPS = 100
PROMPT_WEIGHT = 0.2


def build_tokenizer(corpus: list[Row]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer trained on ``corpus`` and on the task's training rows.

    Numbers of the corpus become one token each, and any other text splits into smaller pieces.
    It adds neither ``bos`` nor ``eos`` by itself, so a prompt and its completion can be encoded apart.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rows = corpus + task_splits()["train"]
    bpe.train_from_iterator((row["prompt"] + row["completion"] for row in rows), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=CONTEXT_TOKENS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """Return an untrained float32 Llama model with greedy generation settings."""
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        **ids,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=MAX_NEW_TOKENS, **ids)
    return model


def _batch(tokenizer, rows):
    full = [tokenizer(r["prompt"])["input_ids"] for r in rows]
    comp = [tokenizer(r["completion"])["input_ids"] + [tokenizer.eos_token_id] for r in rows]
    width = max(len(a) + len(b) for a, b in zip(full, comp))
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    weight = torch.zeros(len(rows), width)
    for k, (a, b) in enumerate(zip(full, comp)):
        n = len(a) + len(b)
        ids[k, :n] = torch.tensor(a + b)
        weight[k, : len(a)] = PROMPT_WEIGHT
        weight[k, len(a) : n] = 1
    return ids, weight


@torch.no_grad()
def exact_match(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[Row], batch=100) -> float:
    """Return the share of ``rows``, from 0 to 1, whose greedy answer has the right number after ``####``."""
    right = 0
    for start in range(0, len(rows), batch):
        chunk = rows[start : start + batch]
        inputs = tokenizer([row["prompt"] for row in chunk], return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False)
        output = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for t, r in zip(texts, chunk):
            right += t.partition("####")[2].strip() == r["completion"].partition("####")[2].strip()
    return right / len(rows)


def main():
    torch.set_num_threads(1)
    import sys
    out = Path(sys.argv[1]); nrows = int(sys.argv[2]); epochs = int(sys.argv[3]); 
    corpus = pretraining_rows(nrows)
    heldout = pretraining_rows(400, seed=99)
    t0 = time.time()
    tok = build_tokenizer(corpus)
    print("tok", time.time() - t0, len(tok))
    sp = task_splits()
    for r in heldout[:3] + sp["test"][:5]:
        e = tok(r["prompt"])["input_ids"]; c = tok(r["completion"])["input_ids"]
        print(len(e), len(c), tok.convert_ids_to_tokens(e))
    print(max(len(tok(r["prompt"] + r["completion"])["input_ids"]) for r in sp["test"]))
    torch.manual_seed(0)
    model = build_model(tok)
    print(sum(p.numel() for p in model.parameters()))
    opt = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, weight_decay=0.05, betas=(0.9, 0.98))
    steps = epochs * nrows // BATCH_ROWS
    order = torch.cat([torch.randperm(nrows) for _ in range(epochs)])
    for step in range(steps):
        lr = PEAK_LR * min(1, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / steps)) 
        for g in opt.param_groups: g["lr"] = lr
        idx = order[step * BATCH_ROWS : (step + 1) * BATCH_ROWS].tolist()
        ids, w = _batch(tok, [corpus[i] for i in idx])
        logits = model(input_ids=ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        w = w[:, 1:].flatten()
        cl = loss[w == 1].mean()
        loss = (loss * w).sum() / w.sum()
        opt.zero_grad(); loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        if step % 100 == 99 or step == steps - 1:
            print(step + 1, f"{time.time()-t0:.0f}s loss {loss.item():.3f} compl {cl.item():.3f}", flush=True)
        if step % 500 == 499 or step == steps - 1:
            model.eval()
            print("   EM plain", exact_match(model, tok, heldout[:200]), "log", exact_match(model, tok, sp["test"][:200]), flush=True)
            model.train()
    model.eval()
    print("final", exact_match(model, tok, heldout), exact_match(model, tok, sp["test"]))
    model.save_pretrained(out / "model"); tok.save_pretrained(out / "model")
    write_splits(out)

if __name__ == "__main__":
    main()
