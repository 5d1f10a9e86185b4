"""Which matrices look drawn from an initialiser, in a model whose other matrices have learnt.

The singular values of an (m, n) matrix of independent numbers of one size s end at s (sqrt m + sqrt n), whatever the
numbers' distribution (Marchenko and Pastur). Gradients are few directions, so learning lifts some values above that
edge. `reach` is the largest one over the edge: 0.91 to 1.04 in fresh matrices of 64 x 96, 1.5 to 8 in every matrix of
the quickstart's model after 300 steps and of a model of 41 million parameters after 800.
"""

import math
import re
from collections import defaultdict
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

ROWS = 1024
"""Of a matrix, its first rows: a part of a drawn matrix is drawn."""
LEAST = 16
"""Rows and columns below which nothing can be said."""
STEPS, VECTORS, DRAWS = 6, 4, 32
CLEAR = 1.3
"""The reach above which a matrix has surely learnt."""
SIBLINGS = 4
"""Matrices of a kind that must have learnt before one of the kind is judged by them."""


def reach(matrix: Float[Tensor, "rows columns"]) -> float | None:
    """Returns the largest singular value over the edge, by subspace iteration; None where nothing can be said."""
    w = matrix[:ROWS].float()
    rows, columns = w.shape
    if min(rows, columns) < LEAST or not (largest := float(w.abs().max())) > 0:
        return None
    w = w / largest  # squares of anything that float32 holds
    size = float(torch.linalg.vector_norm(w)) / math.sqrt(w.numel())
    x = torch.randn(columns, VECTORS, generator=torch.Generator().manual_seed(0)).to(w.device)
    for _ in range(STEPS):
        x = torch.linalg.qr(w.T @ (w @ x))[0]
    return float(torch.linalg.matrix_norm(w @ x, 2)) / (size * (math.sqrt(rows) + math.sqrt(columns)))


@cache
def highest(rows: int, columns: int) -> float:
    """Returns the reach that no drawn matrix of this shape exceeds: mean and six standard deviations of some draws."""
    draw = torch.Generator().manual_seed(1)
    rows = min(rows, ROWS)
    values = [reach(torch.randn(rows, columns, generator=draw)) for _ in range(DRAWS)]
    found = torch.tensor([value for value in values if value is not None])
    return float(found.mean() + 6 * found.std())


def drawn(reaches: dict[str, float], shapes: dict[str, tuple[int, int]]) -> list[str]:
    """Returns the matrices that look drawn although the model has learnt, given the reach and the shape of each.

    Matrices are told apart by kind: equal names but for numbers. Nothing is said of a fresh model, nor of one in its
    first steps, where learning shows in some matrices of a kind more than in others: the learnt ones of a kind must
    all be clear of the edge (99 of 100), and so must those of three kinds in four. A kind of which (almost) none has
    learnt is judged by the other kinds, which must all be clear then.
    """
    limits = {name: highest(*shape) for name, shape in shapes.items()}
    kinds: dict[str, list[str]] = defaultdict(list)
    for name in reaches:
        kinds[re.sub(r"\.\d+\.", ".*.", name)].append(name)
    learnt = {kind: sorted(reaches[n] for n in names if reaches[n] > limits[n]) for kind, names in kinds.items()}
    few = {kind for kind, names in kinds.items() if len(learnt[kind]) < min(SIBLINGS, len(names))}
    others = kinds.keys() - few
    clear = {kind for kind in others if learnt[kind][len(learnt[kind]) // 100] >= CLEAR}
    if 4 * len(clear) < 3 * len(others):
        return []
    judged = clear | (few if clear == others and 2 * len(others) >= len(kinds) else set())
    return [name for kind, names in kinds.items() if kind in judged for name in names if reaches[name] <= limits[name]]
