"""What scores a sequence as a whole: a class each, or one number."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from moekit.nn.linear import Linear
from moekit.ops.segments import sequence_means


class SentenceHead(nn.Module):
    """out tanh(dense mean(hidden)), the mean over real tokens.

    As in BERT (arXiv 1810.04805) but for the mean: BERT reads the first token, which its second objective trains, and
    masked language modelling alone does not. There is no dropout.
    """

    def __init__(self, dim: int, labels: int) -> None:
        super().__init__()
        self.dense = Linear(dim, dim, bias=True)
        self.out = Linear(dim, labels, bias=True)

    def forward(
        self, hidden: Float[Tensor, "batch length dim"], real: Bool[Tensor, "batch length"] | None
    ) -> Float[Tensor, "batch labels"]:
        """Returns the scores; those of a sequence without a real token are those of a mean of 0."""
        mean = sequence_means(hidden, real).to(hidden.dtype)
        scores: Tensor = self.out(torch.tanh(self.dense(mean)))
        return scores if scores.dtype == torch.float64 else scores.float()
