"""Linear experts that are never built: a tensor (experts, out, dim + 1) in CP or tensor-ring factors (muMoE).

Each expert is a matrix with its bias as one more column, for a 1 behind x. A token's gate mixes all experts, and the
mixed map is applied to it, in one contraction over the factors (arXiv 2402.12550, Eq. 2 and 4): no token ever has a
matrix of its own.
With two levels of experts there is a gate and a factor for each; expert (n1, n2) has the weight a1[n1] a2[n2].
"""

from collections.abc import Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from moekit.ops.autocast import cast_once


def cp_linear(
    x: Float[Tensor, "tokens dim"],
    gates: Sequence[Float[Tensor, "tokens _"]],
    experts: Sequence[Float[Tensor, "_ rank"]],
    input: Float[Tensor, "dim+1 rank"],
    output: Float[Tensor, "out rank"],
) -> Float[Tensor, "tokens out"]:
    """Returns ((a A) * (x B)) C^T, a factor a A for each level."""
    x = cast_once(x)
    h = torch.addmm(input[-1], x, input[:-1])
    for gate, factor in zip(gates, experts, strict=True):
        h = h * (gate.to(x.dtype) @ factor)
    return F.linear(h, output)


def tr_linear(
    x: Float[Tensor, "tokens dim"],
    gates: Sequence[Float[Tensor, "tokens _"]],
    experts: Sequence[Float[Tensor, "_ _ _"]],
    input: Float[Tensor, "dim+1 right rank"],
    output: Float[Tensor, "out left rank"],
) -> Float[Tensor, "tokens out"]:
    """Returns the trace of (a U) (x V) Z: a small matrix of each token's gate, one of its x, and each output's.

    Levels are multiplied first. Ranks around the ring: `left` of the first level, `right` of the last, `rank`.
    """
    x = cast_once(x)
    cores = [
        (gate.to(x.dtype) @ core.flatten(1)).unflatten(1, core.shape[1:])
        for gate, core in zip(gates, experts, strict=True)
    ]
    inputs = torch.addmm(input[-1].flatten(), x, input[:-1].flatten(1)).unflatten(1, input.shape[1:])
    return F.linear((reduce(torch.bmm, cores) @ inputs).flatten(1), output.flatten(1))


def cp_materialise(
    experts: Sequence[Float[Tensor, "_ rank"]],
    input: Float[Tensor, "columns rank"],
    output: Float[Tensor, "out rank"],
) -> Float[Tensor, "experts out columns"]:
    """Returns every expert's matrix, its bias last; with two levels the second one's number runs faster."""
    mixed = reduce(lambda first, second: (first.unsqueeze(1) * second).flatten(0, 1), experts)
    return torch.einsum("nr,or,ir->noi", mixed, output, input)


def tr_materialise(
    experts: Sequence[Float[Tensor, "_ _ _"]],
    input: Float[Tensor, "columns right rank"],
    output: Float[Tensor, "out left rank"],
) -> Float[Tensor, "experts out columns"]:
    """Returns every expert's matrix, its bias last; with two levels the second one's number runs faster."""
    mixed = reduce(lambda first, second: (first.unsqueeze(1) @ second).flatten(0, 1), experts)
    return torch.einsum("nlr,irk,olk->noi", mixed, input, output)


def joint(gates: Sequence[Float[Tensor, "tokens _"]]) -> Float[Tensor, "tokens experts"]:
    """Returns the weight of every expert, in the order of the materialised ones: the product of its levels' weights."""
    return reduce(lambda first, second: (first.unsqueeze(2) * second.unsqueeze(1)).flatten(1), gates)
