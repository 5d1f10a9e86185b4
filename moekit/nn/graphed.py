"""A decoding step as a CUDA graph: one launch instead of hundreds, which is what a step of one token waits for."""

import copy
import logging

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moekit.nn.cache import KVCache
from moekit.nn.model import Model
from moekit.ops.experts import choose

logger = logging.getLogger(__name__)
WARM_UP = 3
"""Steps before the graph is taken, in which libraries choose and allocate what they need."""


class StaticStep:
    """The model's own step with the same shapes and addresses at every length: attention looks at the whole cache.

    What lies behind a sequence's length is masked. Weights and cache must stay where they are.
    """

    def __init__(self, model: Model, cache: KVCache) -> None:
        self.model = model
        self.ids = torch.zeros(len(cache.lengths), 1, dtype=torch.int64, device=cache.lengths.device)
        self.lengths = cache.lengths.clone()
        self.cache = copy.copy(cache)  # the same buffers, other lengths
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits: Tensor

    def step(self, ids: Int[Tensor, " batch"], lengths: Int[Tensor, " batch"]) -> Float[Tensor, "batch vocab"]:
        """Returns the logits after one more token of each sequence, written to the cache at `lengths`."""
        self.ids.copy_(ids.unsqueeze(1))
        self.lengths.copy_(lengths)
        if self.graph is None:
            self.run()
        else:
            self.graph.replay()
        return self.logits.clone()

    @torch.no_grad()
    def run(self) -> None:
        """Takes the step that `ids` and `lengths` say, asking the device for nothing."""
        self.cache.lengths, self.cache.longest = self.lengths, self.cache.max_length - 1
        self.logits = self.model(self.ids, cache=self.cache).logits[:, -1]

    def capture(self) -> None:
        """Records the step, to be replayed from then on; what it writes meanwhile lies behind the lengths."""
        device = self.ids.device
        stream, before = torch.cuda.Stream(device), torch.cuda.current_stream(device)
        stream.wait_stream(before)
        # on the model's device, or the graph of another would be recorded, which is empty; and the stream from before
        # is set again by us: torch leaves the recording one behind where the recording fails
        with torch.cuda.device(device), torch.cuda.stream(before):
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    self.run()
            before.wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                self.run()
        self.graph = graph


def graphed(model: Model, cache: KVCache) -> StaticStep | None:
    """Returns the recorded step of a model on a GPU, or None where it cannot be recorded: then the model takes it."""
    device = cache.lengths.device
    if device.type != "cuda" or not asks_nothing(model):
        return None
    step = StaticStep(model, cache)
    try:
        step.capture()
    except RuntimeError as error:
        logger.info("no CUDA graph of the decoding step: %s", str(error).splitlines()[0])
        return None
    return step


def asks_nothing(model: Model) -> bool:
    """Returns whether no layer's experts wait for the device to say how many tokens each has, nor for a file."""
    dtype, device = model.embed_tokens.weight.dtype, model.embed_tokens.weight.device
    x = torch.empty(1, model.config.hidden_size, dtype=dtype, device=device)
    return not model.mapped and all(
        isinstance(gate_up, Tensor) and choose(model.experts_backend, x, gate_up, down) in ("grouped", "triton")
        for gate_up, down in (layer.experts.stacked for layer in model.moe_layers)
    )
