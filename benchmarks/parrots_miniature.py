"""Memory grows with experts, path finding does not: Mixture of Parrots (arXiv 2410.19034) with one layer.

    python benchmarks/parrots_miniature.py --threads 1 --out benchmarks/results/parrots_miniature.md

memory: 2,000 random keys of 16 normal numbers, each with one of 16 labels; width 8; accuracy on these very keys.
path: is there a vertex between s and t? The input is which of 16 vertices s leads to and which lead to t (each with
probability 0.3); in half of the samples no vertex is in both, in the other half exactly one is. Fresh samples at every
step; width 4; accuracy on 20,000 samples that were not trained on.

Layers, each with a constant 1 in its input, because ours have no biases:
plain: down(silu(gate x)) on the input itself. The up projections of our experts are held at 1, so that nothing is
multiplied.
biased: plain with one learned bias on the output, outside the experts and their gate: the reading of the reference with
which its margins come out.
swiglu: down(silu(gate x) * up x) on the input itself: our experts as they are.
narrow: swiglu between an embedding and a head, and the vector between them has the layer's width too, as in the
paper: neither experts nor router see more of the input than fits through. Here dense x4 has the size of 16 experts.
fixed: plain, but the router stays as it was drawn. Only where --layers asks for it.

The mixtures have a softmax router, one expert a token, and a balance loss of 0.01.
"""

import itertools
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import measure
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekit.config import MoEConfig
from moekit.nn.ffn import SwiGLU
from moekit.nn.moe import MoE
from moekit.nn.router import RouterContext

KEYS, KEY_DIM, LABELS, VERTICES, EDGE = 2_000, 16, 16, 16, 0.3
BATCH, BALANCE, TESTED = 256, 0.01, 20_000
LAYERS = ("plain", "biased", "swiglu", "narrow", "fixed")
REFERENCE = {
    "memory": {"1 expert": 0.125, "4 experts": 0.215, "16 experts": 0.52, "dense x4": 0.21, "dense x16": 0.465},
    "path": {"1 expert": 0.685, "4 experts": 0.71, "16 experts": 0.70, "dense x4": 0.875, "dense x16": 1.0},
}
"""Means of two seeds of a version in numpy."""


class Task(NamedTuple):
    name: str
    width: int
    inputs: int
    labels: int
    lr: float


TASKS = (Task("memory", 8, KEY_DIM, LABELS, 3e-3), Task("path", 4, 2 * VERTICES, 2, 5e-3))
ARCHITECTURES = {
    "1 expert": (1, 1),
    "4 experts": (4, 1),
    "16 experts": (16, 1),
    "dense x4": (0, 4),
    "dense x16": (0, 16),
}
"""Experts (0: a dense layer), and width as a multiple of the task's."""


class Layer(nn.Module):
    """One feed-forward layer, and in a narrow one what is before and behind it."""

    def __init__(self, kind: str, task: Task, experts: int, multiple: int) -> None:
        super().__init__()
        width, self.labels = multiple * task.width, task.labels
        narrow = kind == "narrow"
        self.embed = nn.Linear(task.inputs, width) if narrow else None
        dim = (width if narrow else task.inputs) + 1
        self.head = nn.Linear(dim, task.labels) if narrow else None
        self.bias = nn.Parameter(torch.zeros(task.labels)) if kind == "biased" else None
        self.ffn: nn.Module = SwiGLU(dim, width)
        if experts:
            shape = {"n_routed_experts": experts, "num_experts_per_tok": 1, "moe_intermediate_size": width}
            self.ffn = MoE(MoEConfig(**shape, aux_loss_alpha=BALANCE, seq_aux=False), dim, vocab_size=1, layer=0)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        if kind == "fixed" and isinstance(self.ffn, MoE):
            self.ffn.router.requires_grad_(False)
        if kind in ("plain", "biased", "fixed"):
            self._hold_up_projections()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the logits and the balance loss."""
        x = F.pad(x if self.embed is None else self.embed(x), (0, 1), value=1.0)
        balance = x.new_zeros(())
        if isinstance(self.ffn, MoE):
            outputs, routing = self.ffn(x[None], RouterContext(torch.zeros(len(x), dtype=torch.int64), sequences=1))
            y, balance = outputs[0], self.ffn.balance_losses(routing, None)["expert_balance"]
        else:
            y = self.ffn(x)
        y = y[:, : self.labels] if self.head is None else self.head(x + y)
        return y if self.bias is None else y + self.bias, balance

    def _hold_up_projections(self) -> None:
        """Makes every up projection 1 for any input, for good: what is left is down(silu(gate x)), an ordinary MLP."""
        if isinstance(self.ffn, MoE):
            stacked = self.ffn.experts.gate_up_proj
            learned = torch.ones_like(stacked)
            learned[:, stacked.shape[1] // 2 :] = 0
            stacked.register_hook(lambda gradient: gradient * learned)
            up = stacked.data[:, stacked.shape[1] // 2 :]
        else:
            self.ffn.up_proj.weight.requires_grad_(False)
            up = self.ffn.up_proj.weight.data
        up.zero_()[..., -1] = 1


def path_samples(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Returns (count, 32) zeros and ones, the neighbours of s and of t, and whether they share one vertex or none."""
    from_s, to_t = (torch.rand(2, count, VERTICES, generator=generator) < EDGE).float()
    labels = torch.randint(2, (count,), generator=generator)
    met = torch.randint(VERTICES, (count,), generator=generator)
    # A vertex that both would have stays with either of them.
    keep = torch.rand(count, VERTICES, generator=generator) < 0.5
    both = (from_s * to_t).bool()
    from_s, to_t = from_s.masked_fill(both & ~keep, 0), to_t.masked_fill(both & keep, 0)
    rows = torch.arange(count)[labels == 1]
    from_s[rows, met[rows]] = to_t[rows, met[rows]] = 1
    return torch.cat([from_s, to_t], 1), labels


def accuracy(kind: str, task: Task, architecture: str, lr: float, steps: int, seed: int) -> float:
    """Returns the share of right answers after training."""
    torch.manual_seed(seed)
    data = torch.Generator().manual_seed(1000 + seed)
    keys = torch.randn(KEYS, KEY_DIM, generator=data)
    answers = torch.randint(LABELS, (KEYS,), generator=data)
    model = Layer(kind, task, *ARCHITECTURES[architecture])
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(steps):
        if task.name == "memory":
            chosen = torch.randint(KEYS, (BATCH,), generator=data)
            x, labels = keys[chosen], answers[chosen]
        else:
            x, labels = path_samples(BATCH, data)
        logits, balance = model(x)
        (F.cross_entropy(logits, labels) + balance).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    x, labels = (keys, answers) if task.name == "memory" else path_samples(TESTED, data)
    with torch.no_grad():
        return float((model.eval()(x)[0].argmax(1) == labels).double().mean())


def criteria(means: dict[str, dict[str, float]]) -> dict[str, dict[str, Any]]:
    """Returns value, bound and whether it held, of the four criteria."""
    memory, path = means["memory"], means["path"]
    values = {
        "memory: 16 experts / 1 expert": (memory["16 experts"] / memory["1 expert"], ">=", 3.0),
        "memory: 16 experts - dense x16": (memory["16 experts"] - memory["dense x16"], ">=", -0.05),
        "path: 16 experts - 1 expert": (path["16 experts"] - path["1 expert"], "<=", 0.06),
        "path: dense x16": (path["dense x16"], ">=", 0.97),
    }
    return {
        name: {"value": value, "bound": f"{sign} {bound:g}", "held": (value >= bound) == (sign == ">=")}
        for name, (value, sign, bound) in values.items()
    }


def main(argv: Sequence[str]) -> None:
    parser = measure.parser(__file__, __doc__, repeats=1)
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ... (3)")
    parser.add_argument("--steps", type=int, default=2_500, help="optimiser steps (2500)")
    parser.add_argument("--layers", nargs="+", default=LAYERS[:4], choices=LAYERS, help="(the first four)")
    parser.add_argument("--architectures", nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES, help="(all)")
    parser.add_argument("--rates", nargs="+", type=float, default=[1.0, 3.0], help="times the tasks' rates (1 3)")
    args = measure.parse(parser, argv)
    guard, start, rows, document = measure.Guard(args.device), time.perf_counter(), [], []
    held: defaultdict[tuple[str, ...], list[list[str]]] = defaultdict(list)
    for kind, rate in itertools.product(args.layers, args.rates):
        found: dict[str, dict[str, list[float]]] = {}
        for task in TASKS:
            for name in args.architectures:
                lr = rate * task.lr
                scores = [accuracy(kind, task, name, lr, args.steps, seed) for seed in range(args.seeds)]
                found.setdefault(task.name, {})[name] = scores
                measure.progress(f"{kind}, lr {lr:g}, {task.name}, {name}: {' '.join(f'{x:.3f}' for x in scores)}")
            cells = [f"{statistics.mean(s):.3f} ({min(s):.3f}-{max(s):.3f})" for s in found[task.name].values()]
            rows.append([kind, task.name, f"{task.lr * rate:g}", *cells])
        document.append({"layer": kind, "rate": rate, "accuracy": found})
        if len(args.architectures) == len(ARCHITECTURES):
            means = {task: {name: statistics.mean(scores) for name, scores in by.items()} for task, by in found.items()}
            document[-1]["criteria"] = checks = criteria(means)
            cells = [f"{c['value']:.3f}{'' if c['held'] else ' (missed)'}" for c in checks.values()]
            held[tuple(f"{name} {check['bound']}" for name, check in checks.items())].append(
                [kind, f"x{rate:g}", *cells]
            )
    for task, by in REFERENCE.items():
        rows.append(["reference", task, "", *(f"{by[name]:.3f}" for name in args.architectures)])
    tables = [measure.table(["layer", "task", "rate", *args.architectures], rows)]
    tables += [measure.table(["layer", "rates", *bounds], lines) for bounds, lines in held.items()]
    what = (
        f"Accuracy after {args.steps:,} steps of {BATCH}, Adam with linear decay: mean, smallest and largest of "
        f"{args.seeds} seeds. xM: M times as wide. Reference: a version in numpy, 2 seeds. "
        f"{time.perf_counter() - start:.0f} s in all."
    )
    measure.report(args, "Memory and path finding in one layer", what, guard, tables, [])
    if args.out:
        args.out.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
