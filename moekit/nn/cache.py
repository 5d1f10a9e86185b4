"""The key-value cache: one contiguous buffer a layer, one row a sequence, each sequence with its own length."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from moekit.config import ModelConfig
from moekit.errors import ConfigError, UnsupportedError


class KVCache:
    """Holds what attention keeps of past tokens; sequences in a batch may have different lengths.

    Multi-head attention keeps keys and values, 2 kv_heads head_dim per token and layer; MLA keeps the latent and the
    rotated key, kv_lora_rank + qk_rope_head_dim (DeepSeek-V2, arXiv 2405.04434, section 2.1.2).
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        max_length: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        width = config.kv_cache_bytes_per_token(dtype_bytes=1) // config.num_hidden_layers
        self.max_length = max_length
        self.longest = 0
        """Upper bound of all lengths, known without asking the device."""
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.routing: dict[int, Tensor] = {}
        """By layer, a row a sequence: what a layer routes the rest of each sequence by, where it decides once."""
        self.merged: dict[int, tuple[Tensor, ...]] = {}
        """By layer: each sequence's matrices, merged by that routing. Bytes: batch times those of one network."""
        self.sums: dict[int, Tensor] = {}
        """By gate: sums over each segment of each sequence, of what has been read so far."""
        self._layers = [
            torch.zeros(batch, max_length, width, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)
        ]

    @property
    def layers(self) -> int:
        """Layers that have a place."""
        return len(self._layers)

    def positions(self, batch: int, length: int) -> Int[Tensor, "batch length"]:
        """Returns where `length` new tokens of each of `batch` sequences go."""
        if batch != len(self.lengths):
            raise ConfigError(f"the cache holds {len(self.lengths)} sequences but {batch} are given")
        if self.longest + length > self.max_length:
            raise ConfigError(
                f"the cache holds {self.max_length} tokens per sequence but {self.longest + length} are asked for; "
                "make it longer"
            )
        return self.lengths.unsqueeze(1) + torch.arange(length, device=self.lengths.device)

    def extend(
        self, layer: int, new: Float[Tensor, "batch length width"], positions: Int[Tensor, "batch length"]
    ) -> Float[Tensor, "batch keys width"]:
        """Writes the new tokens' entries and returns all entries up to the longest sequence."""
        buffer = self._layers[layer]
        buffer[torch.arange(len(buffer), device=buffer.device).unsqueeze(1), positions] = new.to(buffer.dtype)
        return buffer[:, : self.longest + new.shape[1]]

    def advance(self, counts: Int[Tensor, " batch"], at_most: int) -> None:
        """Makes the last `counts` written tokens of each sequence permanent; what lies behind is written over later."""
        self.lengths = self.lengths + counts
        self.longest += at_most

    def layer(self, layer: int) -> Float[Tensor, "batch keys width"]:
        """Returns the buffer of a layer, to be written in place."""
        return self._layers[layer]

    def resize(self, max_length: int) -> None:
        """Makes room for `max_length` tokens per sequence, keeping what is held."""
        self.max_length = max_length
        self._layers = [
            F.pad(buffer[:, :max_length], (0, 0, 0, max(0, max_length - buffer.shape[1]))).contiguous()
            for buffer in self._layers
        ]

    def select(self, rows: Int[Tensor, " rows"]) -> None:
        """Keeps these sequences, in this order; one may be taken several times."""
        self.lengths = self.lengths[rows]
        self._layers = [buffer[rows] for buffer in self._layers]
        self.routing = {layer: kept[rows] for layer, kept in self.routing.items()}
        self.sums = {gate: kept[rows] for gate, kept in self.sums.items()}
        self.merged = {layer: tuple(matrix[rows] for matrix in kept) for layer, kept in self.merged.items()}

    def drop(self, count: int) -> None:
        """Forgets the last `count` tokens of every sequence; what was decided on all that was read stays, unless
        nothing is left of any sequence. UnsupportedError where routing still goes on by all that was read.
        """
        if self.sums:
            raise UnsupportedError("tokens cannot be taken back from a cache: the model routes by what it has read")
        self.lengths = (self.lengths - count).clamp(min=0)
        self.longest = max(self.longest - count, 0)
        if not self.longest:
            self.routing, self.merged = {}, {}
