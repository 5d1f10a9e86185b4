"""Text in: documents from files, tokenised shards, batches as a function of (seed, step)."""

from moekit.data.prepare import prepare
from moekit.data.sampler import Batch, Sampler, validation_windows
from moekit.data.shards import TokenDataset, open_dataset

__all__ = ["Batch", "Sampler", "TokenDataset", "open_dataset", "prepare", "validation_windows"]
