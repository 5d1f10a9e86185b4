"""Text to tokenised shards, in steps: a run that was killed is taken up again and ends with the same bytes.

A journal (progress.json) is replaced after every shard. It holds the arguments, the sources' hashes, the finished
shards and the place in the text where the next one begins; whatever is not in the journal is made again.
"""

import hashlib
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moekit.config import validate
from moekit.data import shards
from moekit.data import similar as similar_documents
from moekit.data.shards import Arguments, Encoded, Journal, Manifest, Side, Similar, Source
from moekit.data.text import Document, file_documents, text_files
from moekit.errors import ConfigError, DataError
from moekit.files import read_json, sha256
from moekit.formats.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

logger = logging.getLogger(__name__)

Paths = Iterable[str | Path]
Progress = Callable[[str, int, int], None]
BATCH_CHARACTERS = 1 << 20  # text that is tokenised at once


class Piece(NamedTuple):
    """A document, the split that it belongs to, and its place: number of the source, number within it."""

    document: Document
    split: str
    file: int
    number: int


def prepare(
    paths: Paths,
    out: str | Path,
    *,
    valid_paths: Paths | None = None,
    valid_fraction: float | None = None,
    vocab_size: int | None = None,
    tokenizer: str | Path | None = None,
    text_field: str = "text",
    domain_field: str = "domain",
    prompt_field: str | None = None,
    tokenizer_bytes: int = 50_000_000,
    shard_tokens: int = 16_000_000,
    similar: bool = False,
    embeddings: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Returns the manifest of the dataset that it writes to `out`; `shards.Manifest` names its fields.

    Without `valid_paths` a hash of its text makes a document validation text, `valid_fraction` of all (0.01), in
    whatever order the files come. Without `tokenizer` (a tokenizer.json or a directory with one) a vocabulary of
    `vocab_size` (4096) is trained on at most `tokenizer_bytes` of training text: the beginning of every file, in shares
    as equal as the files allow. With `prompt_field` a document is that field and then its text, tokenised each by
    itself; the prompt's tokens are read but not learned. A shard ends with the document that fills `shard_tokens`.
    `similar` writes the order of the training documents in which like stand beside like, by `embeddings` (a .npy file,
    a row for each in the stream's order) or hashed TF-IDF. `progress` gets a phase, how much is done and how much there
    is: "hash" and "tokenise" in bytes of files, "tokenizer" in bytes of text, at most; "terms" and "embed" in bytes of
    tokens, "neighbours" in bytes of embeddings.

    The same call on an unfinished `out` completes it; on a finished one it returns at once, with `similar` after it has
    added that order where it is not there or was made of other embeddings. Raises DataError for text
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
    if embeddings is not None and not similar:
        raise ConfigError(f"embeddings is {embeddings} but takes effect only with similar")
    if embeddings is not None and not Path(embeddings).is_file():
        raise DataError(f"{embeddings} does not exist")
    vocab_size = 4096 if vocab_size is None else vocab_size
    given = None if tokenizer is None else load_tokenizer(tokenizer)
    arguments = {
        "valid_fraction": 0.01 if valid_fraction is None and valid_paths is None else valid_fraction,
        "tokenizer": given and given.fingerprint,
        "vocab_size": None if given else vocab_size,
        "tokenizer_bytes": None if given else tokenizer_bytes,
        "text_field": text_field,
        "domain_field": domain_field,
        "prompt_field": prompt_field,
        "shard_tokens": shard_tokens,
    }
    sources = _sources(paths, valid_paths, report, text_field, domain_field)
    new = Journal(arguments=validate(Arguments, arguments), sources=sources)
    if (out / shards.MANIFEST).exists():
        manifest = shards.read_manifest(out)
        _check_same(out, manifest, new)
        (out / shards.JOURNAL).unlink(missing_ok=True)
        if similar:
            return _with_order(out, manifest, embeddings, report).model_dump()
        logger.info("%s is finished, nothing to do", out)
        return manifest.model_dump()

    journal = _begin(out, new)
    if journal.tokenizer is None:
        vocabulary = given or train_tokenizer(_sample(journal, tokenizer_bytes, report), vocab_size)
        for name, content in vocabulary.files().items():
            shards.write(out / name, content)
        journal = _save(out, journal, tokenizer=vocabulary.fingerprint)
    else:
        vocabulary = load_tokenizer(out)
        if vocabulary.fingerprint != journal.tokenizer:
            raise DataError(f"{out / 'tokenizer.json'} has changed since the run began; delete {out} and start again")
        for shard in itertools.chain(*journal.shards.values()):
            shards.open_shard(out, shard, vocabulary.vocab_size)  # an error where it is damaged
        logger.info("%s: %d shards are done, going on", out, journal.units)
    manifest = _finish(out, _tokenise(out, journal, vocabulary, report), vocabulary)
    return (_with_order(out, manifest, embeddings, report) if similar else manifest).model_dump()


def _sources(paths: Paths, valid_paths: Paths | None, report: Progress, *fields: str) -> list[Source]:
    """Returns every file with its size, sha256 and split; "both" where the text's hash decides."""
    train, valid = text_files(paths, *fields), {} if valid_paths is None else text_files(valid_paths)
    for file in {file.resolve() for file in train} & {file.resolve() for file in valid}:
        raise DataError(f"{file} is given both as training and as validation text; give it once")
    side: Side = "both" if valid_paths is None else "train"
    given = [(file, folder, side) for file, folder in train.items()]
    given += [(file, folder, "valid") for file, folder in valid.items()]
    sources, sizes = list[Source](), [file.stat().st_size for file, *_ in given]
    for (file, folder, side), size, done in zip(given, sizes, itertools.accumulate(sizes), strict=True):
        sources.append(Source(path=str(file), split=side, folder=folder, size=size, sha256=sha256(file)))
        report("hash", done, sum(sizes))
    return sources


def _check_same(out: Path, old: Manifest | Journal, new: Journal) -> None:
    """Raises DataError unless both have the same arguments and files; these may have moved."""

    def described(run: Manifest | Journal) -> dict[str, Any]:
        files = {
            f"file {number}": f"{Path(source.path).name} ({source.split}, "
            f"{f'in {source.folder}' if source.folder else 'by itself'}, {source.size} bytes, SHA-256 {source.sha256})"
            for number, source in enumerate(run.sources, start=1)
        }
        return {**run.arguments.model_dump(), "number of files": len(run.sources), **files}

    before = described(old)
    for name, now in described(new).items():
        if before[name] != now:
            advice = f"repeat the first command, choose another --out, or delete {out}"
            raise DataError(f"{out} was begun with {name} = {before[name]}, now it is {now}; {advice}")


def _begin(out: Path, new: Journal) -> Journal:
    """Returns the journal of an unfinished run, or the new one; leaves a folder of something else as it is."""
    if not (out / shards.JOURNAL).is_file():
        if out.exists() and not out.is_dir():
            raise DataError(f"{out} is a file; --out must be a new or empty directory")
        for path in sorted(out.glob("*")):
            if path.name not in (f".{shards.JOURNAL}.writing", shards.SYNTHETIC):  # a run was killed before it began
                raise DataError(f"{out} holds something else ({path.name}); choose another --out")
        return _save(out, new)
    journal = read_json(out / shards.JOURNAL, Journal, DataError, f"delete {out} and start again")
    if not journal.units:
        return _save(out, new)  # nothing was made from the old sources yet: a repaired file just starts again
    _check_same(out, journal, new)
    return journal.model_copy(update={"sources": new.sources})


def _save(out: Path, journal: Journal, **changes: Any) -> Journal:
    """Returns the changed journal after it is on disk."""
    journal = journal.model_copy(update=changes)
    shards.write(out / shards.JOURNAL, journal.model_dump_json(indent=1).encode())
    return journal


def _pieces(journal: Journal, numbers: Iterable[int], report: Progress) -> Iterator[Piece]:
    """Yields the documents of these sources with their splits."""
    arguments, ends = journal.arguments, list(itertools.accumulate(source.size for source in journal.sources))
    for file in numbers:
        source = journal.sources[file]
        path, fields = Path(source.path), (arguments.text_field, arguments.domain_field, source.folder)
        with path.open("rb") as raw:
            for number, document in enumerate(file_documents(path, raw, *fields, arguments.prompt_field)):
                split = source.split
                if split == "both":
                    draw = int.from_bytes(hashlib.sha256(_whole(document).encode()).digest()[:8]) / 2**64
                    split = "valid" if draw < (arguments.valid_fraction or 0) else "train"
                yield Piece(document, split, file, number)
                if number % 256 == 255:
                    report("tokenise", ends[file] - max(source.size - raw.tell(), 0), ends[-1])
        report("tokenise", ends[file], ends[-1])


def _whole(document: Document) -> str:
    return document.prompt + document.text


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
                text = _whole(piece.document).encode()[:share]
                share, budget = share - len(text), budget - len(text)
                yield text.decode(errors="ignore")
                if not share:
                    break
        report("tokenizer", total - budget, total)


def _tokenise(out: Path, journal: Journal, vocabulary: Tokenizer, report: Progress) -> Journal:
    """Returns the journal with every shard written."""
    domains = {name: number for number, name in enumerate(journal.domains)}
    unit: dict[str, list[Encoded]] = {"train": [], "valid": []}
    tokens, dtype = 0, shards.token_dtype(vocabulary.vocab_size)

    def flush(file: int, document: int) -> Journal:
        done = {split: list(finished) for split, finished in journal.shards.items()}
        for split, documents in unit.items():
            if documents:
                done[split].append(shards.write_shard(out, f"{split}/{journal.units:05d}", documents))
        place = {"file": file, "document": document, "units": journal.units + 1}
        return _save(out, journal, domains=list(domains), shards=done, **place)

    pieces = _pieces(journal, range(journal.file, len(journal.sources)), report)
    begin = journal.file, journal.document
    for batch in _batches(piece for piece in pieces if (piece.file, piece.number) >= begin):
        prompts = vocabulary.encode_batch([piece.document.prompt for piece in batch])
        texts = vocabulary.encode_batch([piece.document.text for piece in batch])
        for piece, prompt, text in zip(batch, prompts, texts, strict=True):
            domain = domains.setdefault(piece.document.domain, len(domains))
            ids = np.array([*prompt, *text, vocabulary.eos_id], dtype)
            unit[piece.split].append(Encoded(domain, ids, len(_whole(piece.document).encode()), len(prompt)))
            tokens += len(ids)
            if tokens >= journal.arguments.shard_tokens:
                journal = flush(piece.file, piece.number + 1)
                unit, tokens = {"train": [], "valid": []}, 0
    return flush(len(journal.sources), 0) if tokens else journal


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Yields the documents many at a time, as the tokenizer is fastest."""
    batch, size = list[Piece](), 0
    for piece in pieces:
        batch.append(piece)
        size += len(_whole(piece.document)) + BATCH_CHARACTERS // 1024  # so a batch has at most 1024 documents
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    yield batch


def _finish(out: Path, journal: Journal, vocabulary: Tokenizer) -> Manifest:
    """Returns the manifest, written last, of all shards."""
    if not journal.shards["train"]:
        raise DataError(
            f"every document became validation text; lower valid_fraction, now {journal.arguments.valid_fraction}"
        )
    splits = {
        split: shards.split_entry(out, split, written, journal.domains, vocabulary.vocab_size)
        for split, written in journal.shards.items()
        if written
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
    shards.write(out / shards.MANIFEST, manifest.model_dump_json(indent=1).encode())
    (out / shards.JOURNAL).unlink()
    return manifest


def _with_order(out: Path, manifest: Manifest, embeddings: str | Path | None, report: Progress) -> Manifest:
    """Returns the manifest after the order of similar documents, if it is not there yet, and then it are on disk."""
    made_of = None if embeddings is None else sha256(Path(embeddings))
    if manifest.similar is not None and manifest.similar.embeddings == made_of:
        return manifest
    dataset = shards.TokenDataset(out, "train", manifest)
    documents = manifest.splits["train"].documents
    rows = (
        similar_documents.embeddings(dataset, report)
        if embeddings is None
        else similar_documents.given_embeddings(str(embeddings), documents)
    )
    order = similar_documents.similar_order(rows, report)
    shuffled = shards.shuffled_order(documents)
    similar = Similar(
        order=shards.write_array(out / shards.SIMILAR, order),
        embeddings=made_of,
        similarity=round(similar_documents.adjacent_similarity(rows, order), 4),
        similarity_shuffled=round(similar_documents.adjacent_similarity(rows, shuffled), 4),
    )
    manifest = manifest.model_copy(update={"similar": similar})
    shards.write(out / shards.MANIFEST, manifest.model_dump_json(indent=1).encode())
    return manifest
