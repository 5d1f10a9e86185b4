"""Text to the windows that a model reads: one domain each, none larger than the sequence length, one at a time."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from moekit.data import Batch, TokenDataset
from moekit.data.sampler import IGNORE
from moekit.data.text import Document, file_documents, text_files
from moekit.errors import CheckpointError
from moekit.formats.tokenizer import Tokenizer

PIECE = 1 << 18
"""Characters that are tokenised at once."""
PATIENCE = 1_000
"""Documents in a row that are of no use (their domains have enough) after which the rest of a file is left unread."""

Progress = Callable[[str, int, int], None]


class Window(NamedTuple):
    """Tokens that follow each other in the text of one domain. `number` counts the domain's windows from 0."""

    domain: str
    number: int
    tokens: Int[np.ndarray, " length"]


class Rows(NamedTuple):
    """Windows side by side, padded on the right. `real` is None where nothing is padded."""

    input_ids: Int[Tensor, "batch length"]
    real: Bool[Tensor, "batch length"] | None
    windows: list[Window]


def text_windows(
    paths: Sequence[str | Path],
    tokenizer: Tokenizer,
    length: int,
    limit: int,
    *,
    text_field: str = "text",
    domain_field: str = "domain",
    progress: Progress | None = None,
) -> Iterator[Window]:
    """Yields the first `limit` tokens of every domain in windows of `length`, the last of each domain shorter.

    Documents of a domain follow each other with one end-of-text token after each, as they do in training; nothing else
    is added. Memory: one window a domain and a piece of a file. A file is left when 1,000 documents in a row were of
    domains that have enough.
    """
    left = dict[str, list[int]]()
    windows, taken = dict[str, int](), dict[str, int]()

    def add(documents: list[Document]) -> Iterator[Window]:
        for document, ids in zip(documents, tokenizer.encode_batch([one.text for one in documents]), strict=True):
            domain = document.domain
            room = limit - taken.setdefault(domain, 0)
            kept = [*ids, tokenizer.eos_id][:room]
            taken[domain] += len(kept)
            rest = [*left.get(domain, ()), *kept]
            whole = len(rest) // length * length
            for start in range(0, whole, length):
                windows[domain] = windows.get(domain, -1) + 1
                yield Window(domain, windows[domain], np.array(rest[start : start + length], dtype=np.int64))
            left[domain] = rest[whole:]

    files = text_files(paths, text_field, domain_field)
    sizes, done = {path: path.stat().st_size for path in files}, 0
    for path, folder in files.items():
        with path.open("rb") as raw:
            piece, characters, useless = list[Document](), 0, 0
            for document in file_documents(path, raw, text_field, domain_field, folder):
                if taken.get(document.domain, 0) >= limit:
                    useless += 1
                    if useless == PATIENCE:
                        break
                    continue
                useless = 0
                piece.append(document)
                characters += len(document.text)
                if characters >= min(PIECE, 8 * limit):  # little more is tokenised than is wanted
                    yield from add(piece)
                    piece, characters = [], 0
                    if progress is not None:
                        progress("inspect", done + min(raw.tell(), sizes[path]), sum(sizes.values()))
            yield from add(piece)
        done += sizes[path]
        if progress is not None:
            progress("inspect", done, sum(sizes.values()))
    for domain, rest in left.items():
        if rest:
            yield Window(domain, windows.get(domain, -1) + 1, np.array(rest, dtype=np.int64))


def dataset_windows(
    dataset: TokenDataset, length: int, limit: int, progress: Progress | None = None
) -> Iterator[Window]:
    """Yields the first `limit` tokens of every domain of a split, in windows of `length`."""
    ranges = {domain: dataset.domain_range(domain) for domain in dataset.domains}
    total, done = sum(min(limit, stop - start) for start, stop in ranges.values()), 0
    for domain, (start, stop) in ranges.items():
        stop = min(stop, start + limit)
        for number, first in enumerate(range(start, stop, length)):
            tokens = dataset.read(first, min(length, stop - first))
            yield Window(domain, number, tokens)
            done += len(tokens)
            if progress is not None:
                progress("inspect", 2 * done, 2 * total)  # in bytes, as they lie on the disk


def rows(windows: Iterable[Window], batch_size: int, vocab_size: int) -> Iterator[Rows]:
    """Yields `batch_size` windows at a time. Padding has token 0. CheckpointError for an id that the model lacks."""
    windows = iter(windows)
    while batch := list(islice(windows, batch_size)):
        longest = max(len(window.tokens) for window in batch)
        ids, real = np.zeros((len(batch), longest), dtype=np.int64), np.zeros((len(batch), longest), dtype=bool)
        for row, window in enumerate(batch):
            ids[row, : len(window.tokens)] = window.tokens
            real[row, : len(window.tokens)] = True
        if (highest := int(ids.max())) >= vocab_size:
            raise CheckpointError(f"the tokenizer gives the id {highest} but the model's vocab_size is {vocab_size}")
        yield Rows(torch.from_numpy(ids), None if real.all() else torch.from_numpy(real), batch)


def predictions(windows: Iterable[Window], batch_size: int) -> Iterator[tuple[str, Batch]]:
    """Yields each domain's windows side by side, every token but a window's first to be predicted; padded as in
    validation. A window of one token predicts nothing and is left out."""
    waiting: dict[str, list[Window]] = {}
    for window in windows:
        if len(window.tokens) > 1:
            waiting.setdefault(window.domain, []).append(window)
            if len(waiting[window.domain]) == batch_size:
                yield window.domain, _side_by_side(waiting.pop(window.domain))
    for domain, rest in waiting.items():
        yield domain, _side_by_side(rest)


def _side_by_side(windows: list[Window]) -> Batch:
    shape = len(windows), max(len(window.tokens) for window in windows) - 1
    batch = Batch(np.zeros(shape, np.int64), np.full(shape, IGNORE), np.full(shape, -1))
    for row, window in enumerate(windows):
        length = len(window.tokens) - 1
        batch.input_ids[row, :length], batch.labels[row, :length] = window.tokens[:-1], window.tokens[1:]
        batch.document_ids[row, :length] = 0
    return batch
