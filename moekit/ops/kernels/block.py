"""A block of a model in one call of our own compiled kernels, for tokens whose way back is not wanted.

What Python does between two calls of a layer waits for memory that the last product has pushed out of the caches: a
tenth of a short prompt's time (decision 61).
"""

import struct
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from moekit.ops.kernels.addresses import at, contiguous, matrix, table
from moekit.ops.kernels.build import library
from moekit.ops.kernels.choice import Routes, room_for_routes
from moekit.ops.kernels.decode import Routed
from moekit.ops.kernels.layer import FEED_FORWARD, Attending, layer_of
from moekit.ops.kernels.memory import empty
from moekit.ops.mapped import Mapped
from moekit.ops.quantize import Quantized

_REST = struct.Struct("=q3qq6q2q2d10q")


def whole_block(
    x: Float[Tensor, "batch length dim"],
    delta: Float[Tensor, "batch length dim"] | None,
    norms: tuple[Float[Tensor, " dim"], Float[Tensor, " dim"]],
    eps: float,
    attention: Attending,
    ffn: Sequence[Float[Tensor, "_ _"] | Quantized],
    routed: Routed | None,
) -> tuple[Float[Tensor, "batch length dim"], Float[Tensor, "batch length dim"], Routes | None]:
    """Returns x + delta + attention, what the feed-forward network adds to it, and the choice of experts.

    `ffn` is gate, up and down of a dense layer or of the shared experts, or empty. Experts are chosen without
    groups; there are no gradients.
    """
    x, delta = x.contiguous(), None if delta is None else delta.contiguous()
    (sequences, length, dim), scales = x.shape, [norm.float() for norm in norms]
    layer, _kept = layer_of(x, *attention)
    threads = torch.get_num_threads()
    matrices = [number for w in ffn for number in matrix(w)] or [0] * 9
    network = FEED_FORWARD.pack(sequences * length, dim, ffn[0].shape[0] if ffn else 0, *matrices, threads)
    experts, routes, numbers, factor, places = None, None, [0] * 11, 1.0, [0] * 10
    if routed is not None:
        gate_up, down, router = contiguous(routed.gate_up), contiguous(routed.down), routed.router.contiguous()
        bias = None if routed.bias is None else routed.bias.float().contiguous()
        (count, _, ff), k, factor = down.shape, routed.k, routed.scale
        experts, routes = table(gate_up, down), room_for_routes(sequences * length, sequences, count, k)
        pairs = empty((2 * sequences * length * k + count + 2,), torch.int64)
        log_sums = empty((sequences * length,), torch.float32)
        numbers = [experts.ctypes.data, *matrix(router), at(bias) or 0, count, ff, k, routed.sigmoid, routed.normalise]
        numbers.append(isinstance(down, Mapped))
        scores, ids, weights, score_sums, squared, counts = routes
        places = [t.data_ptr() for t in (scores, weights, log_sums, score_sums, squared, ids, counts, pairs)]
        places += [places[-1] + 8 * ids.numel(), places[-1] + 16 * ids.numel()]
    rest = _REST.pack(*numbers, *map(at, scales), factor, eps, *places)
    stream, y = empty(x.shape, x.dtype), empty(x.shape, x.dtype)
    library().moekit_block(x.dtype == torch.bfloat16, layer + network + rest, *map(at, (x, delta, stream, y)))
    return stream, y, routes
