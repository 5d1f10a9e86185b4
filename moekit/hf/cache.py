"""Our key-value cache as transformers' `generate` handles one."""

import torch
import transformers
from torch import Tensor

from moekit.config import ModelConfig
from moekit.nn.cache import KVCache

ROOM = 256
"""Tokens that a cache has room for beyond the first input; it doubles when it is full."""


class Cache(transformers.Cache):
    """Holds a KVCache, made at the first forward pass and made longer as it fills.

    Padding takes no place in it: after a padded prompt each sequence goes on from its own length.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(layers=[])
        self.config = config
        self.held: KVCache | None = None

    def room_for(self, ids: Tensor, dtype: torch.dtype) -> KVCache:
        """Returns the cache, with room for these tokens as far as the model has positions."""
        batch, length = ids.shape
        if self.held is None:
            room = min(length + ROOM, self.config.max_position_embeddings)
            self.held = KVCache(self.config, batch, room, ids.device, dtype)
        elif self.held.longest + length > self.held.max_length:
            wanted = max(2 * self.held.max_length, self.held.longest + length)
            self.held.resize(max(self.held.max_length, min(wanted, self.config.max_position_embeddings)))
        return self.held

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Returns the columns seen so far, padding included."""
        return 0 if self.held is None else self.held.longest

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self.config.max_position_embeddings

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.held is not None:
            self.held.select(indices.to(self.held.lengths.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.held is not None:
            rows = torch.arange(len(self.held.lengths), device=self.held.lengths.device)
            self.held.select(rows.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        if self.held is not None:
            self.held.drop(tokens_to_remove)

    def reset(self) -> None:
        self.held = None

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return True

    @property
    def is_initialized(self) -> bool:
        return self.held is not None

    @property
    def batch_size(self) -> int:
        return 0 if self.held is None else len(self.held.lengths)
