"""Tokenised text on disk: flat arrays of token ids beside an index of documents, opened as one long stream of tokens.

DATA/manifest.json                        written last: a folder without it is not a dataset
DATA/tokenizer.json, tokenizer_config.json
DATA/train/00000.bin                      uint16 or uint32 token ids, every document followed by end-of-text
DATA/train/00000.npy                      int64 (documents, 5): first token, tokens, UTF-8 bytes, domain, prompt tokens
DATA/train/token_counts.npy               int64 (vocab,)
DATA/train/similar.npy                    int64 (documents,), where asked for: the stream's documents, like beside like
DATA/valid/...
"""

import errno
import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from shlex import quote
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from moekit import files
from moekit.config import Strict
from moekit.errors import DataError, nearest
from moekit.formats.tokenizer import MIN_VOCAB_SIZE

MANIFEST, JOURNAL = "manifest.json", "progress.json"
SIMILAR = "train/similar.npy"
SYNTHETIC = "synthetic"  # folder of the text and questions of a synthetic task
START, TOKENS, BYTES, DOMAIN, PROMPT = range(5)  # columns of the index
Order = Literal["source", "shuffled", "similar"]
SHUFFLE = 2**63  # key of the shuffled order, which no seed has
Side = Literal["train", "valid", "both"]  # where a file's documents go; "both": the hash of each decides


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
    split: Side
    folder: str | None = None
    """The one it was found in, by name: the domain of documents that name none. None: the file was named itself."""


class Arguments(Strict):
    """What a dataset is made with; null is what has no effect."""

    valid_fraction: float | None = Field(ge=0, lt=1)
    tokenizer: str | None
    vocab_size: int | None = Field(ge=MIN_VOCAB_SIZE)
    tokenizer_bytes: int | None = Field(gt=0)
    text_field: str
    domain_field: str
    prompt_field: str | None = None
    shard_tokens: int = Field(gt=0)


class Similar(Strict):
    """The order of the training documents in which like stand beside like, in train/similar.npy."""

    order: FileEntry
    embeddings: str | None
    """SHA-256 of the embeddings that were given; null: hashed TF-IDF of the tokens."""
    similarity: float
    """Mean cosine of neighbours in this order."""
    similarity_shuffled: float
    """The same in shuffled order, for comparison."""


class Manifest(Strict):
    """What a dataset holds and where it came from; `domains` is in order of first appearance, as the index counts."""

    format: Literal["moekit-tokens"] = "moekit-tokens"
    version: Literal[1] = 1
    tokenizer: str
    vocab_size: int
    eos_id: int
    arguments: Arguments
    sources: list[Source]
    domains: list[str]
    domains_without_validation: list[str]
    splits: dict[str, Split]
    similar: Similar | None = None


class Journal(Strict):
    """How far an unfinished `prepare` has come: everything before document `document` of source `file` is done."""

    version: Literal[1] = 1
    arguments: Arguments
    sources: list[Source]
    tokenizer: str | None = None
    domains: list[str] = Field([])
    shards: dict[str, list[Shard]] = Field({"train": [], "valid": []})
    units: int = 0
    file: int = 0
    document: int = 0


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Returns the narrowest type that holds every id, little-endian on any machine."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def write(path: Path, content: bytes) -> FileEntry:
    """Returns the entry of a file after it is on disk, whole. Raises DataError when the disk refuses."""
    try:
        files.write(path, content)
    except OSError as error:
        denied = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
        advice = "" if denied else "; make room and run the same command again"
        raise DataError(f"cannot write {path}: {error.strerror}{advice}") from error
    return FileEntry(size=len(content), sha256=hashlib.sha256(content).hexdigest())


def write_array(path: Path, array: np.ndarray) -> FileEntry:
    """Returns the entry of a .npy file after it is on disk."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return write(path, buffer.getvalue())


class Encoded(NamedTuple):
    """A document as tokens."""

    domain: int
    ids: np.ndarray
    """With end-of-text."""
    size: int
    """UTF-8 bytes of its text, prompt included."""
    prompt: int
    """How many of the ids, the first ones, are the prompt."""


def write_shard(directory: Path, name: str, documents: list[Encoded]) -> Shard:
    """Returns the entry of a shard written from documents in source order.

    Documents of one domain are put together, so that the stream, which goes domain by domain, reads long runs.
    """
    documents = sorted(documents, key=lambda document: document.domain)
    tokens = np.concatenate([document.ids for document in documents])
    index = np.array([(0, len(d.ids), d.size, d.domain, d.prompt) for d in documents], dtype="<i8")
    index[:, START] = np.cumsum(index[:, TOKENS]) - index[:, TOKENS]
    return Shard(
        name=name,
        documents=len(index),
        tokens=len(tokens),
        data=write(directory / f"{name}.bin", tokens.tobytes()),
        index=write_array(directory / f"{name}.npy", index),
    )


def shuffled_order(documents: int) -> np.ndarray:
    """Returns int64 (documents,): a permutation, always the same; seeds shuffle windows, not documents."""
    return np.argsort(np.random.Philox(key=[SHUFFLE, 0]).random_raw(documents), kind="stable")


def check_file(path: Path, entry: FileEntry, verify: bool = False) -> Path:
    """Returns `path`; raises DataError unless it has the size, and with `verify` the sha256, of `entry`."""
    size = path.stat().st_size if path.is_file() else None
    if size != entry.size or (verify and files.sha256(path) != entry.sha256):
        found = "is missing" if size is None else f"has changed since it was written, it has {size} bytes now"
        raise DataError(
            f"{path} {found}, not {entry.size} of SHA-256 {entry.sha256}; delete the dataset and prepare it again"
        )
    return path


def open_shard(directory: Path, shard: Shard, vocab_size: int, verify: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tokens, which stay on disk, and the index, int64 (documents, 5), of a shard.

    Raises DataError unless the index is what was written, and the tokens are: by size, with `verify` by sha256.
    """
    tokens = check_file(directory / f"{shard.name}.bin", shard.data, verify)
    index = check_file(directory / f"{shard.name}.npy", shard.index, verify=True)
    columns = np.load(index, allow_pickle=False)
    columns = np.pad(columns, ((0, 0), (0, PROMPT + 1 - columns.shape[1])))  # the first datasets knew no prompts
    return np.memmap(tokens, token_dtype(vocab_size), mode="r"), columns


def split_entry(directory: Path, split: str, shards: list[Shard], domains: list[str], vocab_size: int) -> Split:
    """Returns the manifest's entry of a split, counted in its files; writes token_counts.npy."""
    table = np.zeros((len(domains), 3), dtype=np.int64)
    counts = np.zeros(vocab_size, dtype=np.int64)
    for shard in shards:
        tokens, index = open_shard(directory, shard, vocab_size)
        index[:, START] = 1  # from here on the number of documents
        np.add.at(table, index[:, DOMAIN], index[:, [START, TOKENS, BYTES]])
        counts += np.bincount(tokens, minlength=vocab_size)
    rows = {name: row.tolist() for name, row in sorted(zip(domains, table, strict=True)) if row[0]}
    by_domain = {name: Counts(documents=row[0], tokens=row[1], bytes=row[2]) for name, row in rows.items()}
    documents, tokens, size = table.sum(0).tolist()
    entry = write_array(directory / split / "token_counts.npy", counts)
    return Split(documents=documents, tokens=tokens, bytes=size, domains=by_domain, shards=shards, token_counts=entry)


class TokenDataset:
    """One split as one stream of tokens: all documents, domain by domain (by name), in source order within a domain.

    `domains` are the names over all splits, sorted; a domain's number is its place there, so it is the same in every
    split. Positions count tokens of the stream. Shards stay on disk (memory-mapped); the index is in memory.
    With `order` shuffled or similar the stream's documents stand in another order, and no domain has a range.
    """

    def __init__(self, directory: Path, split: str, manifest: Manifest, verify: bool = False, order: Order = "source"):
        self.directory, self.split, self.manifest, self.order = directory, split, manifest, order
        part = manifest.splits[split]
        self.tokenizer_fingerprint = manifest.tokenizer
        self.vocab_size, self.eos_id = manifest.vocab_size, manifest.eos_id
        self.domains = sorted(manifest.domains)
        self.num_tokens = part.tokens

        opened = [open_shard(directory, shard, self.vocab_size, verify) for shard in part.shards]
        self._shards = [tokens for tokens, _ in opened]
        index = np.concatenate([index for _, index in opened])
        shard_of = np.repeat(np.arange(len(opened)), [len(index) for _, index in opened])
        rank = np.array([self.domains.index(name) for name in manifest.domains])[index[:, DOMAIN]]
        places = np.argsort(rank, kind="stable")
        self._domain_documents = np.searchsorted(rank[places], np.arange(len(self.domains) + 1))
        places = places[self._ordered(len(places))]
        index, shard_of = index[places], shard_of[places]
        self._starts = np.concatenate([[0], np.cumsum(index[:, TOKENS])])  # of each document, and the end
        self._prompts: np.ndarray = index[:, PROMPT]
        if not self._starts[-1] == sum(map(len, self._shards)) == self.num_tokens:
            raise DataError(f"{directory / MANIFEST}: the {split} shards do not add up to its totals")
        self._sizes = index[:, BYTES]
        # A run is a stretch of the stream that is contiguous in one shard, `shift` tokens further on.
        shift = index[:, START] - self._starts[:-1]
        heads = np.flatnonzero(np.diff(shift, prepend=-1) | np.diff(shard_of, prepend=-1))
        self._runs = list(zip(shard_of[heads].tolist(), shift[heads].tolist(), strict=True))
        self._run_starts = np.append(self._starts[heads], self.num_tokens)

    def read(self, start: int, length: int) -> np.ndarray:
        """Returns int64 (length,), the tokens from position `start` on. Raises IndexError outside of the stream."""
        stop = self._stop(start, length)
        first, last = np.searchsorted(self._run_starts, start, "right") - 1, np.searchsorted(self._run_starts, stop)
        parts = [np.empty(0, dtype=np.int64)]
        for run in range(first, last):
            shard, shift = self._runs[run]
            begin, end = max(start, self._run_starts[run]), min(stop, self._run_starts[run + 1])
            parts.append(self._shards[shard][shift + begin : shift + end])
        return np.concatenate(parts)

    def document_ids(self, start: int, length: int) -> np.ndarray:
        """Returns int64 (length,): the number, counted along the stream, of the document that each token belongs to."""
        return np.searchsorted(self._starts, np.arange(start, self._stop(start, length)), side="right") - 1

    def documents(self, domain: str) -> Iterator[tuple[np.ndarray, int]]:
        """Yields the tokens of each document of a domain, without end-of-text, and the UTF-8 bytes of its text."""
        first, last = np.searchsorted(self._starts, self.domain_range(domain))
        for number in range(first, last):
            start, stop = self._starts[number : number + 2]
            yield self.read(start, stop - start - 1), int(self._sizes[number])

    def is_prompt(self, start: int, length: int) -> np.ndarray:
        """Returns bool (length,): whether each token belongs to a prompt, which is read but not learned."""
        documents = self.document_ids(start, length)
        ends = self._starts[documents] + self._prompts[documents]
        inside: np.ndarray = np.arange(start, start + length) < ends
        return inside

    def whole_documents(self, start: int, stop: int, most: int) -> np.ndarray:
        """Returns int64 (windows + 1,): `start` and the ends of windows of whole documents, as many as `most`
        tokens hold. `start` and `stop` are positions at which documents begin. DataError for a longer document.
        """
        cuts = [start]
        while cuts[-1] < stop:
            end = int(self._starts[np.searchsorted(self._starts, min(cuts[-1] + most, stop), "right") - 1])
            if end == cuts[-1]:
                lengths = np.diff(self._starts)
                longest, number = int(lengths.argmax()), int((lengths > most).sum())
                raise DataError(
                    f"{self.directory}: {number:,} of the {len(lengths):,} documents of split {self.split} are longer "
                    f"than a window's {most} tokens with data.packing documents; document {longest} has "
                    f"{lengths[longest]}: raise data.sequence_length to {lengths[longest] - 1}"
                )
            cuts.append(end)
        return np.array(cuts)

    def domain_range(self, domain: str) -> tuple[int, int]:
        """Returns the positions (start, stop) of a domain; equal when this split has nothing of it."""
        if domain not in self.domains:
            hint = f"{nearest(domain, self.domains)}; found: {', '.join(self.domains)}"
            raise DataError(f"domain {domain!r} is not in {self.directory}{hint}")
        assert self.order == "source", "only in that order a domain is a range"
        number = self.domains.index(domain)
        start, stop = self._starts[self._domain_documents[number : number + 2]]
        return int(start), int(stop)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what training depends on: the tokenizer, every file of tokens of every split, a computed order."""
        text = self.manifest.model_dump_json(include={"tokenizer", "domains", "splits"})
        if self.order == "similar" and self.manifest.similar is not None:
            text += self.manifest.similar.order.sha256
        return hashlib.sha256(text.encode()).hexdigest()

    def token_counts(self) -> np.ndarray:
        """Returns int64 (vocab,): how often each id occurs in the split, end-of-text included."""
        path = self.directory / self.split / "token_counts.npy"
        check_file(path, self.manifest.splits[self.split].token_counts, verify=True)
        return np.asarray(np.load(path, allow_pickle=False))

    def _ordered(self, documents: int) -> np.ndarray:
        """Returns int64 (documents,): which document of the source order stands at each place."""
        if self.order == "shuffled":
            return shuffled_order(documents)
        if self.order == "source":
            return np.arange(documents)
        if self.manifest.similar is None or self.split != "train":
            raise DataError(
                f"{self.directory} has no similar order; run the same `moekit prepare` again with --similar"
            )
        file = check_file(self.directory / SIMILAR, self.manifest.similar.order, verify=True)
        return np.asarray(np.load(file, allow_pickle=False))

    def _stop(self, start: int, length: int) -> int:
        if start < 0 or length < 0 or start + length > self.num_tokens:
            raise IndexError(f"tokens {start} to {start + length} of a stream of {self.num_tokens}")
        return start + length


def read_manifest(path: str | Path) -> Manifest:
    """Returns the manifest of a finished dataset; DataError when `path` is none, or of another version."""
    directory = Path(path)
    if (directory / MANIFEST).is_file():
        return files.read_json(directory / MANIFEST, Manifest, DataError, "prepare the data again")
    if (directory / JOURNAL).is_file():
        raise DataError(f"{directory} is not finished; run the same `moekit prepare` again to complete it")
    then = f"`moekit prepare FILES --out {quote(str(directory))}` makes one"
    raise DataError(f"{directory} is not a dataset (no {MANIFEST}); {then}")


def open_dataset(path: str | Path, split: str, verify: bool = False, order: Order = "source") -> TokenDataset:
    """Returns a split of a prepared directory, after checks of every file's size, and with `verify` of its sha256.

    Raises DataError when the directory is not a finished dataset of this version, has no such split, or is damaged.
    """
    manifest = read_manifest(path)
    if split not in manifest.splits:
        found = ", ".join(manifest.splits)
        raise DataError(f"{path} has no split {split!r}{nearest(split, manifest.splits)}; found: {found}")
    return TokenDataset(Path(path), split, manifest, verify, order)
