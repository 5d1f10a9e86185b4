"""Documents in an order in which like stand beside like, so that a segment tells of the next (Lory, arXiv 2405.03133).

A greedy walk over the nearest neighbours (section 3.4): go to the most similar document that is not used yet, and where
all neighbours are, begin anew at one that is not. Differs from the paper: documents are hashed TF-IDF vectors of their
tokens, where it has Contriever's embeddings; those or others can be given. Cost: 2 documents^2 x width FLOPs for up
to 65,536 documents, and as much again for each such group: some minutes a group on one core.
"""

import itertools
from collections.abc import Callable, Iterator

import numpy as np

from moekit.data.shards import TokenDataset
from moekit.errors import DataError

Progress = Callable[[str, int, int], None]
WIDTH = 512
NEIGHBOURS = 20
GROUP = 65_536  # documents of which each is compared with each
PAIRS = 1 << 18  # numbers that pairs of tokens are hashed to
BLOCK = 1 << 25  # similarities in memory at once
SEED = 2**63 + 1  # of the groups and of where walks begin


def embeddings(dataset: TokenDataset, progress: Progress, width: int = WIDTH) -> np.ndarray:
    """Returns float32 (documents, width), rows of length 1: TF-IDF of tokens and of pairs of adjacent tokens.

    Terms count 1 + log(times), times log(documents / documents that have it) + 1, and are hashed to +-1 in one column
    each, so that products of rows estimate those of the whole vectors, to about 1 / sqrt(width).
    """
    terms = dataset.vocab_size + PAIRS
    hashes = np.random.Philox(key=[SEED, 1]).random_raw(terms)
    column, sign = (hashes >> np.uint64(1)) % np.uint64(width), 1.0 - 2.0 * (hashes & np.uint64(1))
    column, having = column.astype(np.int64), np.zeros(terms)
    documents = 0
    for document in _terms(dataset, progress, "terms"):
        having[np.unique(document)] += 1
        documents += 1
    weight = (np.log(max(documents, 1) / np.maximum(having, 1)) + 1) * sign
    rows = np.zeros((documents, width), dtype=np.float32)
    for row, document in zip(rows, _terms(dataset, progress, "embed"), strict=True):
        found, times = np.unique(document, return_counts=True)
        row += np.bincount(column[found], weights=(1 + np.log(times)) * weight[found], minlength=width)
    return normalised(rows)


def normalised(rows: np.ndarray) -> np.ndarray:
    """Returns the rows at length 1; a row of zeros stays one."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.where(lengths == 0, 1, lengths), dtype=np.float32)


def neighbours(rows: np.ndarray, count: int, progress: Progress) -> np.ndarray:
    """Returns int64 (documents, count): the rows with the largest products, best first, none its own neighbour."""
    documents = len(rows)
    count = max(0, min(count, documents - 1))
    found = np.empty((documents, count), dtype=np.int64)
    size = max(1, BLOCK // max(documents, 1))
    for first in range(0, documents, size):
        products = rows[first : first + size] @ rows.T
        these = np.arange(len(products))
        products[these, first + these] = -np.inf
        if count:  # in order of number first: of equal products the lower number is the nearer
            best = np.sort(np.argpartition(products, -count, axis=1)[:, -count:], axis=1)
            ranks = np.argsort(-np.take_along_axis(products, best, axis=1), axis=1, kind="stable")
            found[first : first + size] = np.take_along_axis(best, ranks, axis=1)
        progress("neighbours", rows[: first + size].nbytes, rows.nbytes)
    return found


def walk(nearest: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Returns int64 (documents,): each once, the nearest unused neighbour next, else the first unused of `starts`."""
    order, used, fresh = list[int](), bytearray(len(nearest)), iter(starts.tolist())
    current: int | None = None
    for _ in range(len(nearest)):
        near = () if current is None else nearest[current].tolist()
        current = next((one for one in near if not used[one]), None)
        if current is None:
            current = next(one for one in fresh if not used[one])
        used[current] = 1
        order.append(current)
    return np.array(order, dtype=np.int64)


def similar_order(rows: np.ndarray, progress: Progress, group: int = GROUP) -> np.ndarray:
    """Returns int64 (documents,), an order of the rows: one walk for each random group of at most `group` documents."""
    shuffled = np.argsort(np.random.Philox(key=[SEED, 0]).random_raw(len(rows)), kind="stable")
    groups = np.array_split(shuffled, max(1, -(-len(rows) // group)))
    walks = (part[walk(neighbours(rows[part], NEIGHBOURS, progress), np.arange(len(part)))] for part in groups)
    return np.concatenate(list(walks))


def adjacent_similarity(rows: np.ndarray, order: np.ndarray) -> float:
    """Returns the mean product of each row and the next one, 0 where there is none."""
    return float(np.mean([rows[a] @ rows[b] for a, b in itertools.pairwise(order)])) if len(order) > 1 else 0.0


def given_embeddings(file: str, documents: int) -> np.ndarray:
    """Returns the rows of a .npy file, one for each training document, at length 1; DataError for anything else."""
    try:
        rows = np.load(file, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{file} is not a .npy file of numbers: {error}") from None
    if rows.ndim != 2 or len(rows) != documents or not np.issubdtype(rows.dtype, np.floating):
        raise DataError(
            f"{file} holds {rows.dtype} {rows.shape} but must be floating-point, ({documents}, width): a row for each "
            "training document, domain by domain by name, in source order"
        )
    if not np.isfinite(rows).all():
        raise DataError(f"{file} holds numbers that are not finite")
    return normalised(rows.astype(np.float32))


def _terms(dataset: TokenDataset, progress: Progress, phase: str) -> Iterator[np.ndarray]:
    """Yields the numbers of all tokens of each document, and of all pairs of adjacent ones."""
    done = 0
    for domain in dataset.domains:
        for number, (tokens, _) in enumerate(dataset.documents(domain)):
            pairs = (tokens[:-1] * 1_000_003 + tokens[1:]) % PAIRS + dataset.vocab_size
            yield np.concatenate((tokens, pairs))
            done += len(tokens) + 1
            if number % 256 == 255:
                progress(phase, 2 * done, 2 * dataset.num_tokens)
    progress(phase, 2 * dataset.num_tokens, 2 * dataset.num_tokens)
