"""Text in: documents from files, tokenised shards, batches as a function of (seed, step)."""

from moekit.data.prepare import prepare
from moekit.data.sampler import IGNORE, Batch, Sampler, validation_windows
from moekit.data.shards import Manifest, TokenDataset, open_dataset, read_manifest
from moekit.data.text import Document, file_documents, text_files

__all__ = [
    "IGNORE",
    "Batch",
    "Document",
    "Manifest",
    "Sampler",
    "TokenDataset",
    "file_documents",
    "open_dataset",
    "prepare",
    "read_manifest",
    "text_files",
    "validation_windows",
]
