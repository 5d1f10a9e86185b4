"""Text to tokenised shards, in steps: a run that was killed is taken up again and ends with the same bytes.

A journal (progress.json) is replaced after every shard. It holds the arguments, the sources' hashes, the finished
shards and the place in the text where the next one begins; whatever is not in the journal is made again.
"""

import hashlib
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import ValidationError

from moekit.config.model import Strict
from moekit.data.shards import (
    JOURNAL,
    MANIFEST,
    Manifest,
    Shard,
    Source,
    check_file,
    file_sha256,
    read_manifest,
    split_entry,
    token_dtype,
    write_atomic,
    write_shard,
)
from moekit.data.text import Document, file_documents, text_files
from moekit.errors import ConfigError, DataError
from moekit.formats.tokenizer import Tokenizer, check_vocab_size, load_tokenizer, train_tokenizer

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
BATCH_DOCUMENTS, BATCH_CHARACTERS = 1024, 1 << 20  # text that is tokenised at once
OURS = re.compile(
    r"\.?(progress\.json|tokenizer(_config)?\.json|manifest\.json|(train|valid)(/\.?(\d+\.(bin|npy)|token_counts\.npy))?)(\.part)?"
)


class Journal(Strict):
    """How far an unfinished `prepare` has come: everything before document `document` of source `file` is done."""

    version: Literal[1] = 1
    arguments: dict[str, Any]
    sources: list[Source]
    tokenizer: str | None = None
    domains: list[str]
    shards: dict[str, list[Shard]]
    units: int = 0
    file: int = 0
    document: int = 0


class Piece(NamedTuple):
    """A document, the split that it belongs to, and its place: number of the source, number within it."""

    document: Document
    split: str
    file: int
    number: int


def prepare(
    paths: Iterable[str | Path],
    out: str | Path,
    *,
    valid_paths: Iterable[str | Path] | None = None,
    valid_fraction: float | None = None,
    vocab_size: int | None = None,
    tokenizer: str | Path | None = None,
    text_field: str = "text",
    domain_field: str = "domain",
    tokenizer_bytes: int = 50_000_000,
    shard_tokens: int = 16_000_000,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Returns the manifest of the dataset that it writes to `out`; `shards.Manifest` names its fields.

    Without `valid_paths` a hash of its text makes a document validation text, `valid_fraction` of all (0.01), in
    whatever order the files come. Without `tokenizer` (a tokenizer.json or a directory with one) a vocabulary of
    `vocab_size` (4096) is trained on at most `tokenizer_bytes` of training text: the beginning of every file, in shares
    as equal as the files allow. A shard ends with the document that fills `shard_tokens`. `progress` gets a phase, how
    much is done and how much there is: "hash" and "tokenise" in bytes of files, "tokenizer" in bytes of text, at most.

    The same call on an unfinished `out` completes it; on a finished one it returns at once. Raises DataError for text
    that cannot be read, for other arguments or sources than `out` was begun with, and for a folder of something else.
    """
    out = Path(out)
    report: Progress = progress or (lambda phase, done, total: None)
    if valid_paths is not None and valid_fraction is not None:
        raise ConfigError(f"valid_fraction is {valid_fraction} but validation text is given; leave one of them out")
    if tokenizer is not None and vocab_size is not None:
        raise ConfigError(
            f"vocab_size is {vocab_size} but a tokenizer is given, which has its own vocabulary; leave one of them out"
        )
    valid_fraction = 0.01 if valid_fraction is None else valid_fraction
    vocab_size = 4096 if vocab_size is None else vocab_size
    if not 0 <= valid_fraction < 1:
        raise ConfigError(f"valid_fraction is {valid_fraction}; choose at least 0 and less than 1")
    for name, value in (("tokenizer_bytes", tokenizer_bytes), ("shard_tokens", shard_tokens)):
        if value < 1:
            raise ConfigError(f"{name} is {value}; choose at least 1")
    if tokenizer is None:
        check_vocab_size(vocab_size)
    given = None if tokenizer is None else load_tokenizer(tokenizer)
    arguments = {
        "valid_fraction": valid_fraction if valid_paths is None else None,
        "tokenizer": given and given.fingerprint,
        "vocab_size": None if given else vocab_size,
        "tokenizer_bytes": None if given else tokenizer_bytes,
        "text_field": text_field,
        "domain_field": domain_field,
        "shard_tokens": shard_tokens,
    }
    sources = _sources(paths, valid_paths, report)
    if (out / MANIFEST).exists():
        manifest = read_manifest(out)
        _check_same(out, manifest, arguments, sources)
        (out / JOURNAL).unlink(missing_ok=True)
        logger.info("%s is finished, nothing to do", out)
        return manifest.model_dump()

    journal = _open_journal(out, arguments, sources)
    if journal.tokenizer is None:
        vocabulary = given or train_tokenizer(_sample(journal, tokenizer_bytes, report), vocab_size)
        for name, content in vocabulary.files().items():
            write_atomic(out / name, content)
        journal = _save(out, journal, tokenizer=vocabulary.fingerprint)
    else:
        vocabulary = load_tokenizer(out)
        if vocabulary.fingerprint != journal.tokenizer:
            raise DataError(f"{out / 'tokenizer.json'} has changed since the run began; delete {out} and start again")
        logger.info("%s: %d shards are done, going on", out, journal.units)
    return _finish(out, _tokenise(out, journal, vocabulary, report), vocabulary).model_dump()


def _sources(paths: Iterable[str | Path], valid_paths: Iterable[str | Path] | None, report: Progress) -> list[Source]:
    """Returns every file with its size, sha256 and split; "both" where the text's hash decides."""
    split: Literal["train", "both"] = "both" if valid_paths is None else "train"
    files: list[tuple[Path, str | None, Literal["train", "valid", "both"]]]
    files = [(file, folder, split) for file, folder in text_files(paths).items()]
    if valid_paths is not None:
        train = {file.resolve() for file, *_ in files}
        for file, folder in text_files(valid_paths).items():
            if file.resolve() in train:
                raise DataError(f"{file} is given both as training and as validation text; give it once")
            files.append((file, folder, "valid"))
    sources: list[Source] = []
    total, done = sum(file.stat().st_size for file, *_ in files), 0
    for file, folder, name in files:
        size = file.stat().st_size
        sources.append(Source(path=str(file), split=name, folder=folder, size=size, sha256=file_sha256(file)))
        done += size
        report("hash", done, total)
    return sources


def _check_same(out: Path, old: Manifest | Journal, arguments: dict[str, Any], sources: list[Source]) -> None:
    """Raises DataError unless `old` was begun with these arguments and files; they may have moved."""
    advice = f"repeat the first command, choose another --out, or delete {out}"
    for name, value in arguments.items():
        if old.arguments.get(name) != value:
            raise DataError(f"{out} was begun with {name} = {old.arguments.get(name)}, now it is {value}; {advice}")
    if len(old.sources) != len(sources):
        raise DataError(f"{out} was begun with {len(old.sources)} files, now there are {len(sources)}; {advice}")
    for before, now in zip(old.sources, sources, strict=True):
        if Path(before.path).name != Path(now.path).name or before.split != now.split:
            raise DataError(f"{out} was begun with {before.path} ({before.split}) where {now.path} is now; {advice}")
        if before.folder != now.folder:
            old_name, new_name = (source.folder or "a file by itself" for source in (before, now))
            raise DataError(f"{out} was begun with {now.path} in {old_name}, now it is in {new_name}; {advice}")
        if (before.size, before.sha256) != (now.size, now.sha256):
            raise DataError(f"{now.path} has changed since {out} was begun; {advice}")


def _open_journal(out: Path, arguments: dict[str, Any], sources: list[Source]) -> Journal:
    """Returns the journal of an unfinished run, or a new one; leaves every folder that is not ours as it is."""
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file; --out must be a new or empty directory")
    begun = (out / JOURNAL).is_file()
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if not (OURS.fullmatch(name) if begun else name == f".{JOURNAL}.part"):
            raise DataError(f"{out} holds something else ({name}); choose another --out")
    new = Journal(arguments=arguments, sources=sources, domains=[], shards={"train": [], "valid": []})
    if not begun:
        return _save(out, new)
    try:
        journal = Journal.model_validate_json((out / JOURNAL).read_bytes())
    except ValidationError as error:
        raise DataError(
            f"{out / JOURNAL} is damaged ({error.errors()[0]['msg']}); delete {out} and start again"
        ) from None
    try:
        _check_same(out, journal, arguments, sources)
    except DataError:
        if any(journal.shards.values()):
            raise
        return _save(out, new)  # nothing was made from the old sources yet: a repaired file just starts again
    for shard in (shard for shards in journal.shards.values() for shard in shards):
        check_file(out / f"{shard.name}.bin", shard.data)
        check_file(out / f"{shard.name}.npy", shard.index)
    return journal.model_copy(update={"sources": sources})


def _save(out: Path, journal: Journal, **changes: Any) -> Journal:
    """Returns the changed journal after it is on disk."""
    journal = journal.model_copy(update=changes)
    write_atomic(out / JOURNAL, journal.model_dump_json(indent=1).encode())
    return journal


def _pieces(journal: Journal, numbers: Iterable[int], report: Progress) -> Iterator[Piece]:
    """Yields the documents of these sources with their splits."""
    sizes = [source.size for source in journal.sources]
    fields = journal.arguments["text_field"], journal.arguments["domain_field"]
    for file in numbers:
        source = journal.sources[file]
        with open(source.path, "rb") as raw:
            for number, document in enumerate(file_documents(Path(source.path), raw, *fields, source.folder)):
                split = source.split
                if split == "both":
                    draw = int.from_bytes(hashlib.sha256(document.text.encode()).digest()[:8]) / 2**64
                    split = "valid" if draw < journal.arguments["valid_fraction"] else "train"
                yield Piece(document, split, file, number)
                if number % 256 == 255:
                    report("tokenise", sum(sizes[:file]) + min(raw.tell(), source.size), sum(sizes))
        report("tokenise", sum(sizes[: file + 1]), sum(sizes))


def _sample(journal: Journal, budget: int, report: Progress) -> Iterator[str]:
    """Yields training text for the tokenizer, at most `budget` bytes of it."""
    # Smallest files first: what they leave of their share goes to the larger ones.
    order = sorted(range(len(journal.sources)), key=lambda file: journal.sources[file].size)
    order = [file for file in order if journal.sources[file].split != "valid"]
    total = budget
    for place, file in enumerate(order):
        share = budget // (len(order) - place)
        for piece in _pieces(journal, [file], lambda *_: None):
            if piece.split == "train":
                text = piece.document.text.encode()[:share]
                share, budget = share - len(text), budget - len(text)
                yield text.decode(errors="ignore")
                if not share:
                    break
        report("tokenizer", total - budget, total)


def _tokenise(out: Path, journal: Journal, vocabulary: Tokenizer, report: Progress) -> Journal:
    """Returns the journal with every shard written."""
    domains = {name: number for number, name in enumerate(journal.domains)}
    unit: dict[str, list[tuple[int, np.ndarray, int]]] = {"train": [], "valid": []}
    tokens = 0

    def flush(file: int, document: int) -> Journal:
        shards = {split: list(done) for split, done in journal.shards.items()}
        for split, documents in unit.items():
            if documents:
                shards[split].append(write_shard(out, f"{split}/{journal.units:05d}", documents))
        place = {"file": file, "document": document, "units": journal.units + 1}
        return _save(out, journal, domains=list(domains), shards=shards, **place)

    for piece, ids in _encoded(_remaining(journal, report), vocabulary):
        domain = domains.setdefault(piece.document.domain, len(domains))
        unit[piece.split].append((domain, ids, len(piece.document.text.encode())))
        tokens += len(ids)
        if tokens >= journal.arguments["shard_tokens"]:
            journal = flush(piece.file, piece.number + 1)
            unit, tokens = {"train": [], "valid": []}, 0
    return flush(len(journal.sources), 0) if tokens else journal


def _remaining(journal: Journal, report: Progress) -> Iterator[Piece]:
    """Yields the documents that no shard holds yet."""
    for piece in _pieces(journal, range(journal.file, len(journal.sources)), report):
        if piece.file > journal.file or piece.number >= journal.document:
            yield piece


def _encoded(pieces: Iterable[Piece], vocabulary: Tokenizer) -> Iterator[tuple[Piece, np.ndarray]]:
    """Yields each document with its ids and end-of-text, tokenised many at a time."""
    dtype = token_dtype(vocabulary.vocab_size)

    def encode(batch: list[Piece]) -> Iterator[tuple[Piece, np.ndarray]]:
        for piece, ids in zip(batch, vocabulary.encode_batch([p.document.text for p in batch]), strict=True):
            yield piece, np.array([*ids, vocabulary.eos_id], dtype=dtype)

    batch, size = list[Piece](), 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.document.text)
        if len(batch) >= BATCH_DOCUMENTS or size >= BATCH_CHARACTERS:
            yield from encode(batch)
            batch, size = [], 0
    yield from encode(batch)


def _finish(out: Path, journal: Journal, vocabulary: Tokenizer) -> Manifest:
    """Returns the manifest, written when every other file is there."""
    if not journal.shards["train"]:
        raise DataError(
            f"every document became validation text; lower valid_fraction, now {journal.arguments['valid_fraction']}"
        )
    splits = {
        split: split_entry(out, split, shards, journal.domains, vocabulary.vocab_size)
        for split, shards in journal.shards.items()
        if shards
    }
    validated = splits["valid"].domains if "valid" in splits else {}
    if unseen := [name for name in splits["train"].domains if name not in validated]:
        rest = f" and {len(unseen) - 10} more" if len(unseen) > 10 else ""
        logger.warning("no validation text of %s%s: training will not be evaluated on it", ", ".join(unseen[:10]), rest)
    manifest = Manifest(
        tokenizer=vocabulary.fingerprint,
        vocab_size=vocabulary.vocab_size,
        eos_id=vocabulary.eos_id,
        arguments=journal.arguments,
        sources=journal.sources,
        domains=journal.domains,
        domains_without_validation=unseen,
        splits=splits,
    )
    for part in out.rglob(".*.part"):  # of a run that was killed while writing
        part.unlink()
    write_atomic(out / MANIFEST, manifest.model_dump_json(indent=1).encode())
    (out / JOURNAL).unlink()
    return manifest
