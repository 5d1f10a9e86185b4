"""The experts on a CPU through our own compiled kernels: gather, products, SiLU * up and combination in few passes.

What the backward pass needs is x, the inputs of SiLU (rows, 2 ff) and nothing else of a row's size: the gradient of a
routing weight is the dot product of the activation with dy W_down, which is at hand there (SonicMoE, arXiv 2512.14080).
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from moekit.ops.dispatch import Plan
from moekit.ops.kernels.build import native


def unavailable(x: Tensor, gate_up: Tensor, down: Tensor) -> str | None:
    """Returns why the kernels cannot run on these tensors, or None."""
    if x.device.type != "cpu":
        return f"it runs on a CPU but the tensors are on {x.device.type}"
    if (x.dtype, gate_up.dtype) not in _TYPES:
        return f"rows are {x.dtype} and weights {gate_up.dtype}; it takes float32, or bfloat16 rows with either weights"
    return native().reason


_TYPES = {
    (torch.float32, torch.float32): (0, 0),
    (torch.bfloat16, torch.float32): (1, 0),
    (torch.bfloat16, torch.bfloat16): (1, 1),
}


@torch.compiler.disable  # type: ignore[untyped-decorator]
def mixed_experts(
    x: Float[Tensor, "tokens dim"],
    weights: Float[Tensor, "tokens k"],
    plan: Plan,
    gate_up: Float[Tensor, "experts ff2 dim"],
    down: Float[Tensor, "experts dim ff"],
) -> Float[Tensor, "tokens dim"]:
    """Returns sum over choices of weight * expert(x) for each token (DeepSeekMoE, Eq. 9)."""
    tokens = plan.order // weights.shape[1]
    y: Tensor = _Experts.apply(x, weights.float(), gate_up, down, plan.tokens_per_expert, tokens, plan.inverse)
    return y


@torch.compiler.disable  # type: ignore[untyped-decorator]
def swiglu_experts(
    rows: Float[Tensor, "rows dim"],
    gate_up: Float[Tensor, "experts ff2 dim"],
    down: Float[Tensor, "experts dim ff"],
    tokens_per_expert: Int[Tensor, " experts"],
) -> Float[Tensor, "rows dim"]:
    """Returns each row through its expert; rows behind the last expert's come back as zero."""
    y: Tensor = _Experts.apply(rows, None, gate_up, down, tokens_per_expert, None, None)
    return y


def has_rest(*tensors: Tensor) -> bool:
    """Returns whether `cross_entropy_` (float32, bfloat16) and `rms_norm` (float32) can run on these tensors."""
    return all(t.device.type == "cpu" and t.dtype in (torch.float32, torch.bfloat16) for t in tensors) and (
        native().library is not None
    )


def cross_entropy_(
    logits: Float[Tensor, "tokens vocab"], targets: Int[Tensor, " tokens"], differentiate: bool
) -> Float[Tensor, " tokens"]:
    """Returns each token's loss in nats, 0 for a negative target; with `differentiate` the logits turn to d_logits."""
    library, targets = native().library, targets.contiguous()
    assert library is not None
    assert logits.is_contiguous()
    losses = torch.empty(len(logits))
    library.moekit_cross_entropy(
        int(logits.dtype == torch.bfloat16),
        *logits.shape,
        *map(_at, (logits, targets, losses)),
        differentiate,
        torch.get_num_threads(),
    )
    return losses


@torch.compiler.disable  # type: ignore[untyped-decorator]
def rms_norm(x: Float[Tensor, "*batch dim"], weight: Float[Tensor, " dim"], eps: float) -> Float[Tensor, "*batch dim"]:
    """Returns x / rms(x) * weight in x's dtype, computed in float32."""
    y: Tensor = _Norm.apply(x, weight, eps)
    return y


class _Norm(torch.autograd.Function):
    PARTS = 64
    """Rows are summed for the weight's gradient in so many parts, whatever the number of threads."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, scales, by = x.contiguous(), torch.empty(x.shape[:-1]), weight.float()
        y = torch.empty_like(x)
        _call_norm("moekit_norm", x, _at(by), eps, _at(y), _at(scales))
        ctx.save_for_backward(x, weight, scales)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scales = ctx.saved_tensors
        dy, dx, by = dy.contiguous(), torch.empty_like(x), weight.float()
        parts = torch.empty(_Norm.PARTS, len(weight))
        _call_norm("moekit_norm_backward", x, *map(_at, (by, scales, dy, dx, parts)), len(parts))
        return dx, parts.sum(0).to(weight.dtype), None


def _call_norm(name: str, x: Tensor, *arguments: Any) -> None:
    dim = x.shape[-1]
    rows = x.numel() // dim
    getattr(native().library, name)(
        int(x.dtype == torch.bfloat16), rows, dim, _at(x), *arguments, torch.get_num_threads()
    )


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor | None,
        gate_up: Tensor,
        down: Tensor,
        counts: Tensor,
        tokens: Tensor | None,
        row_of: Tensor | None,
    ) -> Tensor:
        x, gate_up, down = _rows(x), gate_up.contiguous(), down.contiguous()
        offsets = torch.zeros(len(counts) + 1, dtype=torch.int64)
        torch.cumsum(counts, 0, out=offsets[1:])
        n_rows, ff, dim = len(x) if tokens is None else len(tokens), down.shape[2], down.shape[1]
        keep = any(ctx.needs_input_grad)
        hidden = x.new_empty(n_rows, 2 * ff) if keep else None
        y = x.new_empty(n_rows, dim)
        run = _Call(x, gate_up, offsets, tokens)
        run.forward(x, gate_up, down, hidden, y)
        if keep:
            ctx.save_for_backward(x, weights, gate_up, down, offsets, tokens, row_of, hidden)
        if row_of is None:
            y[int(offsets[-1]) :] = 0
            return y
        assert weights is not None
        return run.combine(y, row_of, weights.contiguous())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, gate_up, down, offsets, tokens, row_of, hidden = ctx.saved_tensors
        dy = _rows(dy.to(x.dtype))
        n_rows, ff, dim = len(hidden), down.shape[2], down.shape[1]
        d_hidden, act = torch.empty_like(hidden), hidden.new_empty(n_rows, ff)
        dx = hidden.new_empty(n_rows, dim) if ctx.needs_input_grad[0] else None
        d_weights = by_row = None
        if weights is not None:
            by_row = torch.empty(n_rows)
            by_row[row_of] = weights.flatten()
            d_weights = torch.zeros(n_rows)
        run = _Call(x, gate_up, offsets, tokens)
        run.backward_rows(dy, gate_up, down, by_row, hidden, d_hidden, act, dx, d_weights)
        d_gate_up = torch.empty_like(gate_up) if ctx.needs_input_grad[2] else None
        d_down = torch.empty_like(down) if ctx.needs_input_grad[3] else None
        if d_gate_up is not None:
            run.weight_gradient(d_hidden, False, x, True, d_gate_up)
        if d_down is not None:
            run.weight_gradient(dy, True, act, False, d_down)
        if weights is not None and d_weights is not None:
            d_weights = d_weights[row_of].view(weights.shape)
            dx = None if dx is None else run.combine(dx, row_of.view(weights.shape), None)
        elif dx is not None:
            dx[int(offsets[-1]) :] = 0
        return dx, d_weights, d_gate_up, d_down, None, None, None


class _Call:
    """The library's functions with what all calls of one layer share."""

    def __init__(self, x: Tensor, gate_up: Tensor, offsets: Tensor, tokens: Tensor | None) -> None:
        library = native().library
        assert library is not None
        self.library, self.offsets, self.tokens = library, offsets, tokens
        self.types, self.threads = _TYPES[x.dtype, gate_up.dtype], torch.get_num_threads()

    def forward(self, x: Tensor, gate_up: Tensor, down: Tensor, hidden: Tensor | None, y: Tensor) -> None:
        self.library.moekit_forward(
            *self._shape(down), _at(x), x.stride(0), _at(gate_up), _at(down), _at(hidden), _at(y)
        )

    def backward_rows(self, dy: Tensor, gate_up: Tensor, down: Tensor, *rest: Tensor | None) -> None:
        self.library.moekit_backward_rows(
            *self._shape(down), _at(dy), dy.stride(0), _at(gate_up), _at(down), *map(_at, rest)
        )

    def weight_gradient(
        self, left: Tensor, left_gathered: bool, right: Tensor, right_gathered: bool, gradient: Tensor
    ) -> None:
        self.library.moekit_weight_gradient(
            *self.types,
            len(gradient),
            _at(self.offsets),
            _at(self.tokens),
            self.threads,
            *(_at(left), left.stride(0), left_gathered, gradient.shape[1]),
            *(_at(right), right.stride(0), right_gathered, gradient.shape[2]),
            _at(gradient),
        )

    def combine(self, rows: Tensor, row_of: Tensor, weights: Tensor | None) -> Tensor:
        k = row_of.shape[1] if weights is None else weights.shape[1]
        tokens = row_of.numel() // k
        y = rows.new_empty(tokens, rows.shape[1])
        computed = int(self.offsets[-1])
        self.library.moekit_combine(
            *(self.types[0], tokens, k, rows.shape[1], _at(rows), _at(row_of), _at(weights), computed, _at(y)),
            self.threads,
        )
        return y

    def _shape(self, down: Tensor) -> tuple[int | None, ...]:
        return *self.types, *down.shape, _at(self.offsets), _at(self.tokens), self.threads


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()
