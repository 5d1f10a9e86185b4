"""Tokenised text on disk: flat arrays of token ids beside an index of documents, opened as one long stream of tokens.

DATA/manifest.json                        written last: a folder without it is not a dataset
DATA/tokenizer.json, tokenizer_config.json
DATA/train/00000.bin                      uint16 or uint32 token ids, every document followed by end-of-text
DATA/train/00000.npy                      int64 (documents, 4): first token, tokens, UTF-8 bytes, domain
DATA/train/token_counts.npy               int64 (vocab,)
DATA/valid/...
"""

import hashlib
import io
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError

from moekit.config.model import Strict
from moekit.errors import DataError, nearest

MANIFEST, JOURNAL = "manifest.json", "progress.json"
START, TOKENS, BYTES, DOMAIN = range(4)  # columns of the index


class FileEntry(Strict):
    """What a file must be."""

    size: int
    sha256: str


class Shard(Strict):
    """Some documents of a split, in `name`.bin and `name`.npy; `name` is relative to the dataset."""

    name: str
    documents: int
    tokens: int
    data: FileEntry
    index: FileEntry


class Counts(Strict):
    """Amounts of text: bytes are UTF-8 bytes of text, tokens include one end-of-text per document."""

    documents: int
    tokens: int
    bytes: int


class Split(Counts):
    """One split: totals, totals by domain, and files."""

    domains: dict[str, Counts]
    shards: list[Shard]
    token_counts: FileEntry


class Source(FileEntry):
    """A file that text was read from."""

    path: str
    split: Literal["train", "valid", "both"]
    folder: str | None = None
    """The one it was found in, by name: the domain of documents that name none. None: the file was named itself."""


class Manifest(Strict):
    """What a dataset holds and where it came from; `domains` is in order of first appearance, as the index counts."""

    format: Literal["moekit-tokens"] = "moekit-tokens"
    version: Literal[1] = 1
    tokenizer: str
    vocab_size: int
    eos_id: int
    arguments: dict[str, Any]
    sources: list[Source]
    domains: list[str]
    domains_without_validation: list[str]
    splits: dict[str, Split]


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Returns the narrowest type that holds every id, little-endian on any machine."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def write_atomic(path: Path, content: bytes) -> FileEntry:
    """Writes a file so that after a crash it is there whole or not at all. Raises DataError when the disk refuses."""
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        if os.name == "posix":  # elsewhere a directory cannot be opened; here the new name must be on disk too
            handle = os.open(path.parent, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise DataError(f"cannot write {path}: {error.strerror}; make room and run the same command again") from error
    return FileEntry(size=len(content), sha256=hashlib.sha256(content).hexdigest())


def array_bytes(array: np.ndarray) -> bytes:
    """Returns `array` as the content of a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def write_shard(directory: Path, name: str, documents: list[tuple[int, np.ndarray, int]]) -> Shard:
    """Returns the entry of a shard written from (domain, ids with end-of-text, UTF-8 bytes of text) in source order.

    Documents of one domain are put together, so that the stream, which goes domain by domain, reads long runs.
    """
    documents = sorted(documents, key=lambda document: document[0])
    tokens = np.concatenate([ids for _, ids, _ in documents])
    index = np.array([(0, len(ids), size, domain) for domain, ids, size in documents], dtype="<i8")
    index[:, START] = np.cumsum(index[:, TOKENS]) - index[:, TOKENS]
    return Shard(
        name=name,
        documents=len(index),
        tokens=len(tokens),
        data=write_atomic(directory / f"{name}.bin", tokens.tobytes()),
        index=write_atomic(directory / f"{name}.npy", array_bytes(index)),
    )


def check_file(path: Path, entry: FileEntry, verify: bool = False) -> None:
    """Raises DataError unless `path` has the size, and with `verify` the sha256, of `entry`."""
    size = path.stat().st_size if path.is_file() else None
    if size != entry.size:
        found = "is missing" if size is None else f"has {size} bytes"
        raise DataError(f"{path} {found}, it was written with {entry.size}; delete the dataset and prepare it again")
    if verify and file_sha256(path) != entry.sha256:
        raise DataError(f"{path} has changed since it was written (sha256); delete the dataset and prepare it again")


def file_sha256(path: Path) -> str:
    """Returns the sha256 of a file in hexadecimal."""
    # receipts.sha256 is the same; its import would bring torch, which nothing here needs
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_index(directory: Path, shard: Shard, n_domains: int) -> np.ndarray:
    """Returns int64 (documents, 4), the checked index of a shard."""
    path = directory / f"{shard.name}.npy"
    try:
        index: np.ndarray = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise DataError(f"{path} is not a document index: {error}") from None
    good = index.shape == (shard.documents, 4) and index.dtype == np.int64 and index.size > 0
    if good:
        stops = np.cumsum(index[:, TOKENS])
        good = stops[-1] == shard.tokens and bool((index[:, TOKENS] > 0).all())
        good = good and bool((index[:, START] == stops - index[:, TOKENS]).all())
        good = good and index[:, DOMAIN].min() >= 0 and index[:, DOMAIN].max() < n_domains
    if not good:
        raise DataError(f"{path} does not fit its shard in {MANIFEST}; delete the dataset and prepare it again")
    return index


def split_entry(directory: Path, split: str, shards: list[Shard], domains: list[str], vocab_size: int) -> Split:
    """Returns the manifest's entry of a split, counted in its files; writes token_counts.npy."""
    table = np.zeros((len(domains), 3), dtype=np.int64)
    tokens = np.zeros(vocab_size, dtype=np.int64)
    for shard in shards:
        index = read_index(directory, shard, len(domains))
        np.add.at(table, index[:, DOMAIN], np.column_stack([np.ones(len(index), np.int64), index[:, [TOKENS, BYTES]]]))
        tokens += np.bincount(
            np.fromfile(directory / f"{shard.name}.bin", token_dtype(vocab_size)), minlength=vocab_size
        )
    by_domain = {name: _counts(row) for name, row in sorted(zip(domains, table, strict=True)) if row[0]}
    entry = write_atomic(directory / split / "token_counts.npy", array_bytes(tokens))
    totals = _counts(table.sum(0)).model_dump()
    return Split(**totals, domains=by_domain, shards=shards, token_counts=entry)


def _counts(row: np.ndarray) -> Counts:
    documents, tokens, size = row.tolist()
    return Counts(documents=documents, tokens=tokens, bytes=size)


class TokenDataset:
    """One split as one stream of tokens: all documents, domain by domain (by name), in source order within a domain.

    `domains` are the names over all splits, sorted; a domain's number is its place there, so it is the same in every
    split. Positions count tokens of the stream. Shards stay on disk (memory-mapped); the index is in memory.
    """

    def __init__(self, directory: Path, split: str, manifest: Manifest, verify: bool = False):
        self.directory, self.split, self.manifest = directory, split, manifest
        part = manifest.splits[split]
        self.tokenizer_fingerprint = manifest.tokenizer
        self.vocab_size, self.eos_id = manifest.vocab_size, manifest.eos_id
        self.domains = sorted(manifest.domains)
        self.num_tokens, self.num_documents = part.tokens, part.documents

        dtype = token_dtype(self.vocab_size)
        self._shards, indices = [], []
        for number, shard in enumerate(part.shards):
            data = directory / f"{shard.name}.bin"
            check_file(data, shard.data, verify)
            check_file(data.with_suffix(".npy"), shard.index, verify)
            if shard.data.size != shard.tokens * dtype.itemsize:
                raise DataError(f"{data} has {shard.data.size} bytes, not {shard.tokens} tokens of type {dtype.name}")
            self._shards.append(np.memmap(data, dtype=dtype, mode="r"))
            index = read_index(directory, shard, len(self.domains))
            indices.append(np.column_stack([index, np.full(len(index), number)]))
        index = np.concatenate(indices)

        rank = np.array([self.domains.index(name) for name in manifest.domains])
        index[:, DOMAIN] = rank[index[:, DOMAIN]]
        index = index[np.argsort(index[:, DOMAIN], kind="stable")]
        shard_of = index[:, 4]
        self._starts = np.concatenate([[0], np.cumsum(index[:, TOKENS])])  # of each document, and the end
        if self._starts[-1] != self.num_tokens or len(index) != self.num_documents:
            raise DataError(f"{directory / MANIFEST}: the {split} shards do not add up to its totals")
        self._domain_stops = np.searchsorted(index[:, DOMAIN], np.arange(len(self.domains)), side="right")
        # A run is a stretch of the stream that is contiguous in one shard.
        joined = (shard_of[1:] == shard_of[:-1]) & (index[1:, START] == index[:-1, START] + index[:-1, TOKENS])
        heads = np.concatenate([[0], np.flatnonzero(~joined) + 1])
        self._runs = list(zip(shard_of[heads].tolist(), index[heads, START].tolist(), strict=True))
        self._run_starts = np.append(self._starts[heads], self.num_tokens)

    def read(self, start: int, length: int) -> np.ndarray:
        """Returns int64 (length,), the tokens from position `start` on. Raises IndexError outside of the stream."""
        stop = self._stop(start, length)
        tokens = np.empty(length, dtype=np.int64)
        run = int(np.searchsorted(self._run_starts, start, side="right")) - 1
        position = start
        while position < stop:
            shard, offset = self._runs[run]
            begin, end = int(self._run_starts[run]), min(stop, int(self._run_starts[run + 1]))
            tokens[position - start : end - start] = self._shards[shard][
                offset + position - begin : offset + end - begin
            ]
            position, run = end, run + 1
        return tokens

    def document_ids(self, start: int, length: int) -> np.ndarray:
        """Returns int64 (length,): the number, counted along the stream, of the document that each token belongs to."""
        return np.searchsorted(self._starts, np.arange(start, self._stop(start, length)), side="right") - 1

    def domain_at(self, position: int) -> int:
        """Returns the number of the domain at a position, its place in `domains`."""
        document = np.searchsorted(self._starts, position, side="right") - 1
        return int(np.searchsorted(self._domain_stops, document, side="right"))

    def domain_range(self, domain: str) -> tuple[int, int]:
        """Returns the positions (start, stop) of a domain; equal when this split has nothing of it."""
        if domain not in self.domains:
            known = ", ".join(self.domains)
            raise DataError(
                f"domain {domain!r} is not in {self.directory}{nearest(domain, self.domains)}; found: {known}"
            )
        number = self.domains.index(domain)
        first = self._domain_stops[number - 1] if number else 0
        return int(self._starts[first]), int(self._starts[self._domain_stops[number]])

    def token_counts(self) -> np.ndarray:
        """Returns int64 (vocab,): how often each id occurs in the split, end-of-text included."""
        path = self.directory / self.split / "token_counts.npy"
        check_file(path, self.manifest.splits[self.split].token_counts, verify=True)
        counts: np.ndarray = np.load(path, allow_pickle=False)
        return counts

    def _stop(self, start: int, length: int) -> int:
        if start < 0 or length < 0 or start + length > self.num_tokens:
            raise IndexError(f"tokens {start} to {start + length} of a stream of {self.num_tokens}")
        return start + length


def read_manifest(path: str | Path) -> Manifest:
    """Returns the manifest of a finished dataset; DataError when `path` is none, or of another version."""
    directory = Path(path)
    if not (directory / MANIFEST).is_file():
        if (directory / JOURNAL).is_file():
            raise DataError(f"{directory} is not finished; run the same `moekit prepare` again to complete it")
        raise DataError(
            f"{directory} is not a dataset (no {MANIFEST}); `moekit prepare FILES --out {directory}` makes one"
        )
    try:
        return Manifest.model_validate_json((directory / MANIFEST).read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the file"
        raise DataError(f"{directory / MANIFEST}: {field}: {first['msg']}; prepare the data again") from None


def open_dataset(path: str | Path, split: str, verify: bool = False) -> TokenDataset:
    """Returns a split of a prepared directory, after checks of every file's size, and with `verify` of its sha256.

    Raises DataError when the directory is not a finished dataset of this version, has no such split, or is damaged.
    """
    manifest = read_manifest(path)
    if split not in manifest.splits:
        known = ", ".join(manifest.splits)
        raise DataError(f"{path} has no split {split!r}{nearest(split, manifest.splits)}; found: {known}")
    return TokenDataset(Path(path), split, manifest, verify)
