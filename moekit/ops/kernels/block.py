"""A block of a model in one call of our own compiled kernels, forward and back, and all blocks in one where no gradient
is wanted.

What Python does between two calls of a layer waits for memory that the last product has pushed out of the caches: a
tenth of a short prompt's time, and of a training step's where layers are small (decisions 61 and 62).
"""

import math
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from moekit.ops.autograd import once_differentiable
from moekit.ops.kernels.addresses import at, contiguous, matrix, readable, room, table
from moekit.ops.kernels.build import library
from moekit.ops.kernels.choice import Routes, room_for_routes
from moekit.ops.kernels.decode import Routed
from moekit.ops.kernels.layer import FEED_FORWARD, Attending, layer_of
from moekit.ops.kernels.memory import empty
from moekit.ops.mapped import Mapped
from moekit.ops.quantize import Quantized

TOGETHER = 1 << 36
"""Multiplications of the blocks that are one call: a tenth of a second to a few, and Ctrl-C waits for no more."""


class Parameters(NamedTuple):
    """What of a block may have a gradient, in the library's order; None where there is no such."""

    q: Any = None
    k: Any = None
    v: Any = None
    o: Any = None
    q_a: Any = None
    kv_norm: Any = None
    q_norm: Any = None
    gate: Any = None
    up: Any = None
    down: Any = None
    attention_norm: Any = None
    ffn_norm: Any = None
    router: Any = None
    experts_gate_up: Any = None
    experts_down: Any = None


_EXACT = ("kv_norm", "q_norm", "attention_norm", "ffn_norm", "router")
"""Those whose gradients the library writes in float32."""


class Whole(NamedTuple):
    """A block as `whole_blocks` computes it."""

    norms: tuple[Float[Tensor, " dim"], Float[Tensor, " dim"]]
    eps: float
    attention: Attending
    ffn: Sequence[Float[Tensor, "_ _"] | Quantized]
    """Gate, up and down of a dense layer or of the shared experts, or nothing."""
    routed: Routed | None
    """Experts are chosen without groups."""

    @property
    def parameters(self) -> Parameters:
        routed = self.routed
        ffn: Sequence[Any] = self.ffn or [None] * 3
        found: list[Any] = [*self.attention.weights, *self.attention.norms, *ffn, *self.norms]
        if routed is not None:
            found += routed.router, routed.gate_up, routed.down
        return Parameters(*found)

    def having(self, p: Parameters) -> "Whole":
        """Returns the same block of these parameters."""
        attention = self.attention._replace(weights=(p.q, p.k, p.v, p.o, p.q_a), norms=(p.kv_norm, p.q_norm))
        routed = self.routed
        if routed is not None:
            routed = routed._replace(router=p.router, gate_up=p.experts_gate_up, down=p.experts_down)
        ffn = () if p.gate is None else (p.gate, p.up, p.down)
        return Whole((p.attention_norm, p.ffn_norm), self.eps, attention, ffn, routed)

    def readable(self) -> bool:
        """Returns whether all of it that is in numbers may be read where it lies."""
        bias = None if self.routed is None else self.routed.bias
        return readable(*(t for t in (*self.parameters, bias) if isinstance(t, Tensor)))

    def learns(self) -> bool:
        """Returns whether a way back could be wanted of all of it: of weights in numbers it could."""
        return all(w is None or isinstance(w, Tensor) for w in self.parameters)

    def work(self, batch: int, length: int) -> int:
        """Returns how many multiplications it is for so many tokens, or more than any call should have where the
        experts are in files, which may have to be waited for."""
        if self.routed is not None and isinstance(self.routed.down, Mapped):
            return TOGETHER
        heads = self.attention.heads
        each = sum(math.prod(w.shape) for w in (*self.attention.weights, *self.ffn) if w is not None)
        each += length * heads.heads * (heads.head_dim + heads.value_dim)
        if self.routed is not None:
            each += 3 * self.routed.k * math.prod(self.routed.down.shape[1:])
        return batch * length * each


def whole_blocks(
    x: Float[Tensor, "batch length dim"],
    delta: Float[Tensor, "batch length dim"] | None,
    blocks: Sequence[Whole],
    low: torch.dtype,
) -> tuple[Float[Tensor, "batch length dim"], Float[Tensor, "batch length dim"], list[Routes | None]]:
    """Returns x + delta as blocks one after another leave it, what is still to be added, and each choice of experts.

    Rows are multiplied in `low`, x's dtype or bfloat16, which delta has and what is to be added gets. There is at least
    one block, and no way back.
    """
    stream, y, choices, _ = _run(x, delta, blocks, low)
    return stream, y, [None if choice is None else choice.routes for choice in choices]


def learning_block(
    x: Float[Tensor, "batch length dim"], delta: Float[Tensor, "batch length dim"] | None, of: Whole, low: torch.dtype
) -> tuple[Float[Tensor, "batch length dim"], Float[Tensor, "batch length dim"], Routes | None]:
    """Returns what `whole_blocks` does of one block, with a way back."""
    stream, y, *routes = _Block.apply(of.having(Parameters()), low, x, delta, *of.parameters)
    return stream, y, Routes(*routes) if routes else None


class _Choice(NamedTuple):
    """Where the library finds and puts the choice of experts."""

    routes: Any
    """`Routes`; on the way back None for the sums and counts."""
    log_sums: Tensor
    pairs: Tensor
    """Row -> pair, pair -> row, and each expert's rows."""


def _room(x: Tensor, blocks: Sequence[Whole]) -> list[_Choice | None]:
    """Returns room for each block's choice; blocks that are alike share what only a way back reads besides."""
    units, shared = x.shape[0] * x.shape[1], dict[tuple[int, int], tuple[Tensor, Tensor]]()
    choices: list[_Choice | None] = []
    for of in (block.routed for block in blocks):
        if of is None:
            choices.append(None)
            continue
        if (size := (of.down.shape[0], of.k)) not in shared:
            pairs = empty((2 * units * of.k + of.down.shape[0] + 2,), torch.int64)
            shared[size] = empty((units,), torch.float32), pairs
        choices.append(_Choice(room_for_routes(units, len(x), *size), *shared[size]))
    return choices


def _described(x: Tensor, of: Whole, choice: _Choice | None) -> tuple[bytes, Any]:
    """Returns the library's `Block` for rows like x, and what must live as long as it is used."""
    layer, kept = layer_of(x, *of.attention)
    scales = [norm.float().contiguous() for norm in of.norms]
    matrices = [number for w in of.ffn for number in matrix(w)] or [0] * 9
    sizes = x.shape[0] * x.shape[1], x.shape[2], of.ffn[0].shape[0] if of.ffn else 0
    network = FEED_FORWARD.pack(*sizes, *matrices, torch.get_num_threads())
    numbers, factor, places = [0] * 11, 1.0, [0] * 10
    if of.routed is not None and choice is not None:
        routed, (routes, log_sums, pairs) = of.routed, choice
        gate_up, down, router = contiguous(routed.gate_up), contiguous(routed.down), routed.router.contiguous()
        bias = None if routed.bias is None else routed.bias.float().contiguous()
        experts, (count, _, ff), factor = table(gate_up, down), down.shape, routed.scale
        numbers = [experts.ctypes.data, *matrix(router), at(bias) or 0, count, ff, routed.k, routed.sigmoid]
        numbers += [routed.normalise, isinstance(down, Mapped)]
        scores, ids, weights, score_sums, squared, counts = routes
        places = [at(t) or 0 for t in (scores, weights, log_sums, score_sums, squared, ids, counts, pairs)]
        rows = sizes[0] * routed.k * pairs.itemsize
        places += [places[-1] + rows, places[-1] + 2 * rows]
        kept = kept, gate_up, down, router, bias, experts
    rest = _REST.pack(*numbers, *map(at, scales), factor, of.eps, *places)
    return layer + network + rest, (kept, scales)


_REST = struct.Struct("=q3qq6q2q2d10q")


def _run(
    x: Tensor, delta: Tensor | None, blocks: Sequence[Whole], low: torch.dtype, keep: bool = False
) -> tuple[Tensor, Tensor, list[_Choice | None], Tensor | None]:
    """Returns the stream, what is to be added to it, the choices, and with `keep` what one block's way back needs."""
    x, delta = x.contiguous(), None if delta is None else delta.contiguous()
    choices = _room(x, blocks)
    described = [_described(x, of, choice) for of, choice in zip(blocks, choices, strict=True)]
    kinds = x.dtype == torch.bfloat16, low == torch.bfloat16
    kept = room("moekit_block_bytes", *kinds, described[0][0]) if keep else None
    stream, y = empty(x.shape, x.dtype), empty(x.shape, low)
    part: list[bytes] = []
    work = 0
    for number, ((block, _), of) in enumerate(zip(described, blocks, strict=True), 1):
        part.append(block)
        work += of.work(*x.shape[:2])
        if work >= TOGETHER or number == len(blocks):
            library().moekit_blocks(*kinds, len(part), b"".join(part), *map(at, (x, delta, kept, stream, y)))
            x, delta, part, work = stream, y, [], 0
    return stream, y, choices, kept


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, of: Whole, low: torch.dtype, x: Tensor, delta: Tensor | None, *parameters: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, block = x.contiguous(), of.having(Parameters(*parameters))
        stream, y, (choice,), kept = _run(x, delta, [block], low, any(ctx.needs_input_grad))
        if kept is not None:
            chosen = [None] * 5 if choice is None else (*choice.routes[:3], choice.log_sums, choice.pairs)
            ctx.of, ctx.low = of, low
            ctx.save_for_backward(kept, x if delta is None else None, stream, *chosen, *parameters)
        ctx.set_materialize_grads(False)
        if choice is None:
            return stream, y
        ctx.mark_non_differentiable(choice.routes.ids, choice.routes.counts)
        return stream, y, *choice.routes

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_stream: Tensor | None, dy: Tensor | None, *given: Tensor | None) -> tuple[Any, ...]:
        kept, x, stream, scores, ids, weights, log_sums, pairs, *saved = ctx.saved_tensors
        choice = None if scores is None else _Choice((scores, ids, weights, None, None, None), log_sums, pairs)
        parameters, low = Parameters(*saved), ctx.low
        router = parameters.router
        exact = parameters._replace(router=None if router is None else router.float())
        block, _kept = _described(stream, ctx.of.having(exact), choice)
        dy = torch.zeros(stream.shape, dtype=low, device="cpu") if dy is None else dy.contiguous()
        d_stream = None if d_stream is None else d_stream.contiguous()
        around = [None if d is None else d.contiguous() for d in (*given[:1], *given[2:5])] or [None] * 4
        _, _, of_x, of_delta, *wanted = ctx.needs_input_grad
        dx = empty(stream.shape, stream.dtype) if of_x or of_delta else None
        d_delta = (dx if low == stream.dtype else empty(stream.shape, low)) if of_delta else None
        made = [
            empty(p.shape, torch.float32 if name in _EXACT else p.dtype) if want and p is not None else None
            for name, p, want in zip(Parameters._fields, parameters, wanted, strict=True)
        ]
        experts = low if choice is None else parameters.experts_down.dtype
        kinds = (dtype == torch.bfloat16 for dtype in (stream.dtype, low, experts))
        library().moekit_block_backward(
            *(*kinds, block, *map(at, (x, stream, kept, d_stream, dy, dx, None if d_delta is dx else d_delta))),
            _GRADIENTS.pack(*(at(t) or 0 for t in (*around, *made))),
        )
        rounded = (d if d is None else d.to(p.dtype) for d, p in zip(made, parameters, strict=True))
        return None, None, dx, d_delta, *rounded


_GRADIENTS = struct.Struct("=19q")
