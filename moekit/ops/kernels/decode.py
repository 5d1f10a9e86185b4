"""One decoding step of a whole model in one call of the native library."""

import ctypes
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moekit.ops.kernels.addresses import KINDS, contiguous, matrix, readable, stored, table
from moekit.ops.kernels.build import library, native
from moekit.ops.kernels.memory import empty
from moekit.ops.mapped import Mapped, Weights
from moekit.ops.quantize import GROUP, Quantized
from moekit.ops.scaled import Matrix, Scaled

_LONG, _FLOAT, _POINTER = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class Routed(NamedTuple):
    """The routed experts of a layer and what chooses them; the settings are `ops.routing.route`'s."""

    gate_up: Weights
    """(experts, 2 ff, dim)."""
    down: Weights
    """(experts, dim, ff)."""
    router: Float[Tensor, "experts dim"]
    bias: Float[Tensor, " experts"] | None
    k: int
    n_group: int
    topk_group: int
    group_best: int
    sigmoid: bool
    normalise: bool
    scale: float

    def fit(self, dim: int) -> bool:
        """Returns whether router, bias and stacks are of as many experts, and take and give rows of this width: the
        library asks no further."""
        experts, _, ff = self.down.shape
        shapes = tuple(self.gate_up.shape), tuple(self.down.shape), tuple(self.router.shape)
        wanted = (experts, 2 * ff, dim), (experts, dim, ff), (experts, dim)
        return shapes == wanted and (self.bias is None or self.bias.shape == (experts,)) and self.k <= experts


class Heads(NamedTuple):
    """How many heads attention has, and how wide they are."""

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    rope: int
    """What rotation turns of `head_dim`: all of it, or its end in latent attention."""
    rank: int
    """Width of latent attention's latent; 0: multi-head attention."""
    q_rank: int
    """Width of its compressed queries; 0: they are not."""
    qk_norm: int
    """RMSNorm of multi-head attention's queries and keys: 0 none, 1 of each head, 2 of all heads as one."""


class Projections(NamedTuple):
    """The parameters of a layer's attention. Latent attention's k is kv_a, its v is kv_b, in numbers."""

    q: Matrix
    """The queries' own, or the last of their two."""
    k: Matrix
    v: Matrix
    o: Matrix
    q_a: Matrix | None = None
    q_norm: Float[Tensor, " _"] | None = None
    """Of compressed queries, or as `Heads.qk_norm` says."""
    kv_norm: Float[Tensor, " _"] | None = None
    """Of the latent, or of keys as `Heads.qk_norm` says."""
    q_bias: Float[Tensor, " _"] | None = None
    """Of queries; of latent attention's q_a."""
    k_bias: Float[Tensor, " _"] | None = None
    v_bias: Float[Tensor, " _"] | None = None
    o_bias: Float[Tensor, " _"] | None = None


class Layer(NamedTuple):
    """One block: attention, a dense or shared FFN, routed experts."""

    norms: tuple[Tensor, Tensor]
    attention: Projections
    ffn: tuple[Matrix, Matrix, Matrix] | None
    """gate, up, down."""
    routed: Routed | None
    cache: Float[Tensor, "batch keys width"]
    shared_gate: Float[Tensor, " dim"] | None = None
    """The shared FFN's output is multiplied by sigmoid(x w)."""


class Decoder:
    """Holds the addresses of a model's weights and of a cache, both of which must stay where they are."""

    def __init__(
        self,
        layers: Sequence[Layer],
        *,
        embedding: Float[Tensor, "vocab dim"],
        head: Matrix,
        norm: Float[Tensor, " dim"],
        eps: float,
        latent_eps: float,
        heads: Heads,
        softmax_scale: float,
        cos: Float[Tensor, "positions half"],
        sin: Float[Tensor, "positions half"],
    ) -> None:
        self._kept: list[Any] = []
        self.vocab, dim = embedding.shape
        cache = layers[0].cache
        described = (_Layer * len(layers))(*map(self._layer, layers))
        self._model = _Model(
            *(len(layers), dim, self.vocab, *heads, cache.shape[1], KINDS[cache.dtype]),
            *(eps, latent_eps, softmax_scale, ctypes.cast(described, _POINTER)),
            *(self._matrix(embedding), self._matrix(head)),
            *(self._floats(norm), self._floats(cos), self._floats(sin)),
        )
        self._kept += [described, layers]

    def step(self, ids: Int[Tensor, " batch"], lengths: Int[Tensor, " batch"]) -> Float[Tensor, "batch vocab"]:
        """Returns the logits in float32 after one more token of each sequence, written to the cache at `lengths`."""
        ids, lengths = ids.contiguous(), lengths.contiguous()
        logits = empty((len(ids), self.vocab), torch.float32)
        addresses = (ids.data_ptr(), lengths.data_ptr(), logits.data_ptr())
        library().moekit_decode(ctypes.byref(self._model), len(ids), *addresses, torch.get_num_threads())
        return logits

    def _layer(self, layer: Layer) -> "_Layer":
        norms = [self._floats(norm) for norm in layer.norms]
        attention = [self._matrix(matrix) for matrix in layer.attention[:5]]
        numbers = [self._floats(values) for values in layer.attention[5:]]
        ffn = [self._matrix(matrix) for matrix in layer.ffn or (None,) * 3]
        width = layer.ffn[0].shape[0] if layer.ffn else 0
        routed = layer.routed
        gate = self._floats(layer.shared_gate)
        described = _Layer(*norms, *attention, *numbers, layer.cache.data_ptr(), *ffn, width, gate)
        if routed is not None:
            weights = contiguous(routed.gate_up), contiguous(routed.down)
            self._kept += [weights, experts := table(*weights)]
            described.routed, described.mapped = experts.ctypes.data, isinstance(routed.gate_up, Mapped)
            described.router = self._floats(routed.router)
            described.bias = self._floats(routed.bias)
            described.experts, _, described.ff = routed.down.shape
            described.chosen, described.groups, described.chosen_groups = routed.k, routed.n_group, routed.topk_group
            described.group_best, described.sigmoid = routed.group_best, routed.sigmoid
            described.normalise, described.scale = routed.normalise, routed.scale
        return described

    def _matrix(self, weight: Matrix | None) -> "_Matrix":
        if weight is None:
            return _Matrix()
        self._kept.append(weight := contiguous(weight))
        assert not isinstance(weight, Scaled)
        return _Matrix(*matrix(weight))

    def _floats(self, values: Tensor | None) -> int | None:
        if values is None:
            return None
        self._kept.append(values := values.detach().float().contiguous())
        return values.data_ptr()


class _Matrix(ctypes.Structure):
    _fields_ = (("data", _POINTER), ("scales", _POINTER), ("kind", _LONG))


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("attention_norm", "ffn_norm")),
        *((name, _Matrix) for name in ("q", "k", "v", "o", "q_a")),
        *((name, _POINTER) for name in ("q_norm", "kv_norm", "q_bias", "k_bias", "v_bias", "o_bias", "cache")),
        *((name, _Matrix) for name in ("gate", "up", "down")),
        ("dense_ff", _LONG),
        *((name, _POINTER) for name in ("shared_gate", "routed", "router", "bias")),
        *((name, _LONG) for name in ("mapped", "experts", "ff", "chosen", "groups", "chosen_groups", "group_best")),
        *((name, _LONG) for name in ("sigmoid", "normalise")),
        ("scale", _FLOAT),
    )


class _Model(ctypes.Structure):
    _fields_ = (
        *((name, _LONG) for name in ("layers", "dim", "vocab", *Heads._fields)),
        *((name, _LONG) for name in ("cache_length", "cache_bf16")),
        *((name, _FLOAT) for name in ("eps", "latent_eps", "softmax_scale")),
        ("layer", _POINTER),
        *((name, _Matrix) for name in ("embedding", "head")),
        *((name, _POINTER) for name in ("norm", "cos", "sin")),
    )


def unavailable(numbers: Iterable[Tensor], weights: Iterable[Weights | Matrix]) -> str | None:
    """Returns why `Decoder` cannot run on such parameters and cache, or such matrices, or None."""
    for tensor in numbers:
        if not readable(tensor):
            return "it reads plain tensors on a CPU"
        if tensor.dtype not in (torch.float32, torch.bfloat16):
            return f"it takes float32 and bfloat16, not {tensor.dtype}"
    for weight in weights:
        one = weight.one if isinstance(weight, Mapped) else weight
        if isinstance(one, Scaled):
            return f"a matrix is in {one.codes.dtype}, which it does not read"
        if (kept := stored(weight)).dtype not in KINDS or not readable(kept):
            return f"a matrix is in {kept.dtype}, or no plain tensor on a CPU"
        if isinstance(one, Quantized) and one.width % GROUP:
            return f"a matrix in {one.kind} is {one.width} wide, which is not whole groups of {GROUP}"
    return native().reason
