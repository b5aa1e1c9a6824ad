"""Bi-LoRA in a plain torch loop, to be read from top to bottom: sharpness-aware fine-tuning of LoRA adapters (PEFT), at
one forward and one backward pass a step. It needs no network and no GPU, and takes half a minute.

    python examples/bilora_loop.py [FOLDER]

The last letters of a tensor's name are its dimensions: N rows of a file, B rows of a batch, L tokens, V words.
"""

import json
import sys

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from bilora_ray import builtin
from bilora_ray.method import BiLoraAdamW, attach_auxiliary, export_primary

EPOCHS, BATCH_SIZE, LEARNING_RATE, RHO = 6, 16, 4e-3, 0.05
folder = sys.argv[1] if len(sys.argv) > 1 else "bilora-loop-adapter"
torch.manual_seed(0)

# A small language model that knows arithmetic word problems, and some in a wording that is new to it.
tokenizer = AutoTokenizer.from_pretrained(builtin.path("quickstart/model"))
base = AutoModelForCausalLM.from_pretrained(builtin.path("quickstart/model"))
data = {}
for split in ("train", "validation"):
    ids, labels = [], []
    for line in builtin.path(f"quickstart/{split}.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt = [tokenizer.bos_token_id, *tokenizer(row["prompt"]).input_ids]
        answer = [*tokenizer(row["completion"]).input_ids, tokenizer.eos_token_id]
        ids.append(torch.tensor(prompt + answer))
        labels.append(torch.tensor([-100] * len(prompt) + answer))  # -100: the question is given, not learned
    ids_NL = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id)
    labels_NL = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
    data[split] = ids_NL, labels_NL


def loss_of(ids_BL, labels_BL):
    """Mean cross-entropy of the answers' tokens. Padding stands behind them, so a causal model needs no mask."""
    logits_BLV = model(input_ids=ids_BL).logits
    return F.cross_entropy(logits_BLV[:, :-1].flatten(0, 1), labels_BL[:, 1:].flatten())


# The primary adapter s1 B1 A1 is PEFT's own. The auxiliary s2 B2 A2, the perturbation, stands beside it in each layer.
model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear"))
attach_auxiliary(model, rank=8)

# One optimizer: the primary descends, the auxiliary ascends and is clipped to ||s2 B2 A2|| <= rho over all layers.
optimizer = BiLoraAdamW(model, learning_rate=LEARNING_RATE, rho=RHO, max_grad_norm=1.0)
ids_NL, labels_NL = data["train"]
steps = EPOCHS * -(-len(ids_NL) // BATCH_SIZE)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)  # of both learning rates

train_losses, eval_losses = [], []
for epoch in range(EPOCHS):
    model.train()  # the forward pass is that of W0 + s1 B1 A1 + s2 B2 A2
    for rows_B in torch.randperm(len(ids_NL)).split(BATCH_SIZE):
        loss = loss_of(ids_NL[rows_B], labels_NL[rows_B])
        loss.backward()  # one gradient, at the perturbed weight, for both adapters
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        train_losses.append(loss.item())

    model.eval()  # and now of W0 + s1 B1 A1: the auxiliary is never evaluated
    with torch.no_grad():
        eval_losses.append(loss_of(*data["validation"]).item())
    print(
        f"epoch {epoch + 1}  train_loss {train_losses[-1]:.3f} (perturbed)  eval_loss {eval_losses[-1]:.3f}  "
        f"auxiliary_norm {optimizer.auxiliary_norm.item():.4f}"
    )

# The primary alone is written. Whoever gets it needs plain PEFT, and nothing of Bi-LoRA.
export_primary(model, folder)
base = AutoModelForCausalLM.from_pretrained(builtin.path("quickstart/model"))
served = PeftModel.from_pretrained(base, folder).eval()
ids_BL = data["validation"][0][:BATCH_SIZE]
with torch.no_grad():
    same = torch.equal(served(input_ids=ids_BL).logits, model(input_ids=ids_BL).logits)
print(f"{folder}: an ordinary PEFT adapter; its logits are {'the same, to the last bit' if same else 'NOT the same'}")
