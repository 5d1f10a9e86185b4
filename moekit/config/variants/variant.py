"""What the counts ask of a feed-forward layer that is neither dense nor DeepSeekMoE's."""

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

from moekit.config.strict import Strict

MERGED_BYTES = 1 << 28
"""What merged matrices may take at once: the bound of `ops.merge.merged_linear`."""


class Count(NamedTuple):
    """Parameters of one role: all of them, and those used for one token."""

    total: int
    active: int


class Variant(Strict, ABC):
    """One layer in every block; its module is in `nn.variants`."""

    n_routed_experts: int
    gates: ClassVar[int] = 1
    """Gates of one layer whose routing the model returns."""
    remedy: ClassVar[str] = "raise ffn.aux_loss_alpha"
    """What helps where an expert is not used."""

    def sees_future(self) -> str | None:
        """Returns why no causal model may have this layer: outputs depend on later tokens by its nature; or None."""
        return None

    def leak(self) -> str | None:
        """Returns in which way scores of a causal model may look ahead where its paper allows it, or None."""
        return None

    @abstractmethod
    def parameters(self, dim: int) -> dict[str, Count]:
        """Returns one layer's parameters by role, of those of `counts.parameters`."""

    def shared_parameters(self, vocab_size: int) -> dict[str, Count]:
        """Returns what all layers have together, by role."""
        return {}

    @abstractmethod
    def forward_flops(self, dim: int, length: int) -> int:
        """Returns the FLOPs of one layer's forward pass over one sequence, 2 a multiply-add; backward is twice that."""

    @abstractmethod
    def kept_bytes(self, dim: int, length: int, size: int) -> int:
        """Returns the bytes that one layer's backward pass needs for one sequence, in numbers of `size` bytes."""

    def merged_bytes(self, dim: int, length: int, batch: int, size: int) -> int:
        """Returns the most bytes of merged matrices at any one time, for `batch` sequences; 0 where none is formed."""
        return 0

    def cached_bytes(self, dim: int, length: int, size: int) -> int:
        """Returns the bytes that one layer adds to the cache of one sequence of up to `length` tokens."""
        return 0

    def buffer_bytes(self) -> int:
        """Returns the bytes of one layer's buffers."""
        return 0


def merged_at_once(matrix_bytes: int, units: int) -> int:
    """Returns the bytes of the merged matrices that exist at once, each of `matrix_bytes` and for one unit."""
    return min(units, max(1, MERGED_BYTES // matrix_bytes)) * matrix_bytes
