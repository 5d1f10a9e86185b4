"""A plain PyTorch loop over moekit.Model: tiny-deepseekmoe on the text inside the package.

    python examples/train_loop.py [STEPS]

`moekit train` does the same and keeps checkpoints, validation scores and metrics. Take this loop for what it lacks.
"""

# ruff: noqa: T201
import sys
import tempfile
from pathlib import Path

import torch

import moekit
from moekit.data import Sampler, open_dataset, prepare

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 50
text = sorted((Path(moekit.__file__).parent / "quickstart" / "text").glob("*.train.jsonl.gz"))
device = "cuda" if torch.cuda.is_available() else "cpu"

with tempfile.TemporaryDirectory() as folder:
    prepare(text, folder, vocab_size=4096)
    batches = Sampler(open_dataset(folder, "train"), sequence_length=128, batch_size=8, seed=0)

    torch.manual_seed(0)
    model = moekit.Model(moekit.preset("tiny-deepseekmoe")).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)

    for step in range(steps):
        batch = batches.batch(step)
        ids, targets = (torch.from_numpy(array).to(device) for array in (batch.input_ids, batch.labels))
        out = model(ids, targets=targets, return_routing=True)
        objective = out.loss + sum(out.aux.values())  # the balance terms are yours to add, or to leave out
        objective.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # what a selection bias (topk_method noaux_tc) learns from; layers without one are passed over
        load = [routing.tokens_per_expert.sum(0) for routing in out.routing]
        model.update_expert_bias(load)
        if step % 10 == 0 or step == steps - 1:
            busiest = max(float(tokens.max() / tokens.float().mean()) for tokens in load)
            print(
                f"step {step + 1}  loss {out.loss.item():.3f}  balance {out.aux['expert_balance'].item():.4f}  "
                f"gradient {norm.item():.2f}  busiest expert {busiest:.1f} times the mean"
            )
