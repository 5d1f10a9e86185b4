"""Which experts do the tokens of a text use?

    python examples/routing.py RUN|DIR [TEXT]

Prints each token's experts in the last MoE layer, best first, with their weights; then the busiest experts of every
layer. Train a model first: `moekit quickstart --out quickstart`, then give quickstart/tiny-deepseekmoe.
"""

# ruff: noqa: T201
import sys
from pathlib import Path

import torch

import moekit
from moekit.errors import MoekitError
from moekit.train.state import newest

if len(sys.argv) < 2:
    sys.exit("which model? python examples/routing.py RUN|DIR [TEXT]")
folder = Path(sys.argv[1])
text = sys.argv[2] if len(sys.argv) > 2 else "Sam has 3 apples and buys 2 more. How many has he now?"
checkpoint = newest(folder) if (folder / "checkpoints").is_dir() else folder
if checkpoint is None:
    sys.exit(f"{folder} is a run without a checkpoint yet")
try:
    model, tokenizer = moekit.load(checkpoint), moekit.load_tokenizer(checkpoint)
except MoekitError as error:
    sys.exit(str(error))
if not model.moe_layers:
    sys.exit(f"{folder} holds a dense model, which routes nothing")

ids = tokenizer.encode(text) or [tokenizer.eos_id]
with torch.no_grad():
    layers = model(torch.tensor([ids]), return_routing=True).routing

print(f"layer {model.config.moe_layers[-1]}: experts of each token")
for token, experts, weights in zip(ids, layers[-1].expert_ids.tolist(), layers[-1].weights.tolist(), strict=True):
    chosen = "  ".join(f"{expert:>3} {weight:.2f}" for expert, weight in zip(experts, weights, strict=True))
    print(f"{tokenizer.decode([token])!r:>14}  {chosen}")

print("busiest experts of each layer, and how many of the tokens chose them")
for layer, routing in zip(model.config.moe_layers, layers, strict=True):
    counts, experts = routing.tokens_per_expert.sum(0).sort(descending=True)
    busiest = "  ".join(f"{e:>3}: {n:>2}" for e, n in zip(experts[:8].tolist(), counts[:8].tolist(), strict=True))
    print(f"layer {layer}  {busiest}  ({int((counts > 0).sum())} of {len(counts)} used)")
