"""What the counts ask of a feed-forward layer that is neither dense nor DeepSeekMoE's."""

from typing import ClassVar, NamedTuple

from moekit.config.strict import Strict


class Count(NamedTuple):
    """Parameters of one role: all of them, and those used for one token."""

    total: int
    active: int


class Variant(Strict):
    """One layer in every block; its module is in `nn.variants`."""

    n_routed_experts: int
    gates: ClassVar[int] = 1
    """Gates of one layer whose routing the model returns."""

    def sees_future(self) -> str | None:
        """Returns why a token's output would depend on later tokens of its sequence, or None where it does not."""
        return None

    def parameters(self, dim: int) -> dict[str, Count]:
        """Returns one layer's parameters by role, of those of `counts.parameters`."""
        raise NotImplementedError

    def forward_flops(self, dim: int, length: int) -> int:
        """Returns the FLOPs of one layer's forward pass over one sequence, 2 a multiply-add; backward is twice that."""
        raise NotImplementedError

    def kept_bytes(self, dim: int, length: int, size: int) -> int:
        """Returns the bytes that one layer's backward pass needs for one sequence, in numbers of `size` bytes."""
        raise NotImplementedError

    def buffer_bytes(self) -> int:
        """Returns the bytes of one layer's buffers."""
        return 0
