"""The embedding of tokens."""

from jaxtyping import Float, Int
from torch import Tensor, nn

from moekit.ops.embedding import embedding


class Embedding(nn.Embedding):
    """torch's embedding, without its options: training does not ask the system for its gradient's memory each step."""

    def __init__(self, vocab: int, dim: int) -> None:
        super().__init__(vocab, dim)

    def forward(self, input: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch dim"]:
        return embedding(input, self.weight)
