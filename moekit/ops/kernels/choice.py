"""The compiled choice of experts: affinities, each token's best, and each expert's rows."""

import ctypes
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moekit.ops.autograd import once_differentiable
from moekit.ops.kernels.addresses import readable
from moekit.ops.kernels.build import library, native
from moekit.ops.kernels.memory import empty


def has_choice(of: Tensor) -> bool:
    """Returns whether `largest`, `route` (of float32) and `sort_pairs` (of int64) can run on this tensor."""
    return (
        of.device.type == "cpu"
        and of.dtype in (torch.float32, torch.int64)
        and readable(of)
        and not torch.compiler.is_compiling()
        and native().library is not None
    )


def largest(choice: Float[Tensor, "units experts"], k: int) -> Int[Tensor, "units k"]:
    """Returns the first k of a stable descending sort's indices; k is at most the number of experts."""
    choice = choice.contiguous()
    ids = empty((len(choice), k), torch.int64)
    library().moekit_largest(*choice.shape, k, choice.data_ptr(), ids.data_ptr(), torch.get_num_threads())
    return ids


class Routes(NamedTuple):
    """What `route` returns; ids and counts have no gradient."""

    scores: Float[Tensor, "units experts"]
    ids: Int[Tensor, "units k"]
    weights: Float[Tensor, "units k"]
    score_sums: Float[Tensor, "sequences experts"]
    squared_lse_sums: Float[Tensor, " sequences"]
    counts: Int[Tensor, "sequences experts"]


def route(
    logits: Float[Tensor, "units experts"],
    bias: Float[Tensor, " experts"] | None,
    k: int,
    sequences: int,
    *,
    sigmoid: bool,
    normed: bool,
    factor: float,
) -> Routes:
    """Returns `ops.routing.route`'s tensors without padding or groups, in one pass."""
    how = logits, bias, k, sequences, sigmoid, normed, factor
    return Routes(*(_Route.apply(*how) if torch.is_grad_enabled() else _route(*how)[0]))


def room_for_routes(units: int, sequences: int, experts: int, k: int) -> Routes:
    """Returns tensors of these sizes whose numbers are not set."""
    return Routes(
        empty((units, experts), torch.float32),
        empty((units, k), torch.int64),
        empty((units, k), torch.float32),
        empty((sequences, experts), torch.float32),
        empty((sequences,), torch.float32),
        empty((sequences, experts), torch.int64),
    )


def _route(
    logits: Tensor, bias: Tensor | None, k: int, sequences: int, sigmoid: bool, normed: bool, factor: float
) -> tuple[tuple[Tensor, ...], Tensor, Any]:
    """Returns the tensors, each unit's log-sum-exp, and the library's `Routes`."""
    logits, bias = logits.contiguous(), None if bias is None else bias.float().contiguous()
    units, experts = logits.shape
    sizes = (ctypes.c_int64 * 6)(sequences, units // max(sequences, 1), experts, k, sigmoid, normed)
    made, log_sums = room_for_routes(units, sequences, experts, k), empty((units,), torch.float32)
    scores, ids, weights, sums, squared, counts = made
    library().moekit_route(
        *(sizes, factor, torch.get_num_threads(), logits.data_ptr(), None if bias is None else bias.data_ptr()),
        *(tensor.data_ptr() for tensor in (scores, ids, weights, log_sums, sums, squared, counts)),
    )
    return tuple(made), log_sums, sizes


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        bias: Tensor | None,
        k: int,
        sequences: int,
        sigmoid: bool,
        normed: bool,
        factor: float,
    ) -> tuple[Tensor, ...]:
        logits = logits.contiguous()
        made, log_sums, sizes = _route(logits, bias, k, sequences, sigmoid, normed, factor)
        scores, ids, *_, counts = made
        ctx.call = sizes, factor
        ctx.save_for_backward(logits if sigmoid else None, scores, ids, log_sums)
        ctx.mark_non_differentiable(ids, counts)
        ctx.set_materialize_grads(False)
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        given = [None if d is None else d.contiguous() for d in (gradients[0], *gradients[2:5])]
        d_logits, (sizes, factor) = torch.empty_like(saved[1]), ctx.call
        library().moekit_route_backward(
            *(sizes, factor, torch.get_num_threads()),
            *(None if tensor is None else tensor.data_ptr() for tensor in (*saved, *given, d_logits)),
        )
        return d_logits, *[None] * 6


def sort_pairs(
    expert_ids: Int[Tensor, "tokens k"], n_experts: int
) -> tuple[Int[Tensor, " rows"], Int[Tensor, " rows"], Int[Tensor, " experts"]]:
    """Returns `dispatch.Plan`'s tensors; IndexError for an id that is neither an expert nor -1."""
    ids = expert_ids.contiguous()
    order, inverse, counts = ids.new_empty(ids.numel()), ids.new_empty(ids.numel()), ids.new_empty(n_experts + 2)
    library().moekit_plan(ids.numel(), n_experts, *(tensor.data_ptr() for tensor in (ids, order, inverse, counts)))
    if counts[-1]:
        raise IndexError(f"expert ids are {int(ids.min())} to {int(ids.max())} but must be -1 to {n_experts - 1}")
    return order, inverse, counts[:n_experts]
