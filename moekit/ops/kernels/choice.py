"""The compiled choice of experts: each token's best, and each expert's rows."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moekit.ops.kernels.build import native


def has_choice(of: Tensor) -> bool:
    """Returns whether `largest` (of float32) and `sort_pairs` (of int64) can run on this tensor."""
    return (
        of.device.type == "cpu"
        and of.dtype in (torch.float32, torch.int64)
        and type(of) is Tensor  # no tensor without numbers
        and not torch.compiler.is_compiling()
        and native().library is not None
    )


def largest(choice: Float[Tensor, "units experts"], k: int) -> Int[Tensor, "units k"]:
    """Returns the first k of a stable descending sort's indices; k is at most the number of experts."""
    library, choice = native().library, choice.contiguous()
    assert library is not None
    ids = torch.empty(len(choice), k, dtype=torch.int64)
    library.moekit_largest(*choice.shape, k, choice.data_ptr(), ids.data_ptr(), torch.get_num_threads())
    return ids


def sort_pairs(
    expert_ids: Int[Tensor, "tokens k"], n_experts: int
) -> tuple[Int[Tensor, " rows"], Int[Tensor, " rows"], Int[Tensor, " experts"]]:
    """Returns `dispatch.Plan`'s tensors; IndexError for an id that is neither an expert nor -1."""
    library, ids = native().library, expert_ids.contiguous()
    assert library is not None
    order, inverse, counts = ids.new_empty(ids.numel()), ids.new_empty(ids.numel()), ids.new_empty(n_experts + 2)
    library.moekit_plan(ids.numel(), n_experts, *(tensor.data_ptr() for tensor in (ids, order, inverse, counts)))
    if counts[-1]:
        raise IndexError(f"expert ids are {int(ids.min())} to {int(ids.max())} but must be -1 to {n_experts - 1}")
    return order, inverse, counts[:n_experts]
