"""Text in: documents from jsonl, txt and parquet files, plain or compressed, one at a time in bounded memory."""

import codecs
import io
import itertools
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from moekit.errors import DataError, nearest

logger = logging.getLogger(__name__)

# Suffix -> how it is compressed. Parquet compresses inside.
SUFFIXES = {
    **{
        f".{kind}{end}": codec
        for kind in ("jsonl", "txt")
        for end, codec in (("", None), (".gz", "gzip"), (".zst", "zstd"))
    },
    ".parquet": None,
}
WHOLE_FILE = 1 << 20  # bytes: a longer .txt file is cut into documents
CUT_DOCUMENT = 16_000  # characters after which a long .txt file is cut at the next blank line


class Document(NamedTuple):
    """One text. `source` is "file:line" (jsonl, txt) or "file:row" (parquet), both counted from 1."""

    text: str
    domain: str
    source: str


def text_files(paths: Iterable[str | Path]) -> dict[Path, str | None]:
    """Returns the files that `paths` name, in their order, each with the folder that it was found in.

    Folders are searched recursively, sorted by name, for files with a known suffix, nothing hidden. Their folder is
    the one that `paths` names, without its parents; it is None for a file that `paths` names itself. A file that is
    named twice is read once.

    Raises DataError for a path that does not exist, a named file of another kind, and a folder without text.
    """
    allowed = ", ".join(SUFFIXES)
    found: dict[Path, tuple[Path, str | None]] = {}
    for path in map(Path, paths):
        folder = path.resolve().name if path.is_dir() else None
        if path.is_dir():
            inside = [file for file in sorted(path.rglob("*")) if _suffix(file) is not None and file.is_file()]
            files = [file for file in inside if not any(part.startswith(".") for part in file.relative_to(path).parts)]
            if not files:
                raise DataError(f"{path} holds no text file; known suffixes: {allowed}")
        elif not path.exists():
            raise DataError(f"{path} does not exist{nearest(path.name, _siblings(path))}")
        elif _suffix(path) is None:
            raise DataError(f"{path} has an unknown suffix; known suffixes: {allowed}")
        else:
            files = [path]
        for file in files:
            found.setdefault(file.resolve(), (file, folder))
    if not found:
        raise DataError("no text files were given")
    return dict(found.values())


def read_documents(
    paths: Iterable[str | Path], text_field: str = "text", domain_field: str = "domain"
) -> Iterator[Document]:
    """Yields the documents of files and folders in order; `file_documents` says what an error looks like."""
    for path, folder in text_files(paths).items():
        with open(path, "rb") as raw:
            yield from file_documents(path, raw, text_field, domain_field, folder)


def file_documents(
    path: Path, raw: IO[bytes], text_field: str = "text", domain_field: str = "domain", folder: str | None = None
) -> Iterator[Document]:
    """Yields the documents of one file, opened as `raw` (whose position tells how far the reading is).

    jsonl: an object a line. parquet: a row each. txt: the whole file, or documents of about 16 thousand characters cut
    at blank lines when it is larger than 1 MiB; there CRLF becomes LF. The domain is the field, else the name of the
    `folder`, else that of the file without suffixes; a last `.train` or `.valid` is no part of it. Texts of white space
    alone are left out, and the log says how many. Raises DataError with file and line (or row) for anything that is not
    such a document.
    """
    suffix = _suffix(path)
    if suffix is None:
        raise DataError(f"{path} has an unknown suffix; known suffixes: {', '.join(SUFFIXES)}")
    if not path.stat().st_size:
        raise DataError(f"{path} is empty (0 bytes)")
    name = folder or path.name[: -len(suffix)]
    name = name.removesuffix(".train").removesuffix(".valid") or name
    if suffix.lower() == ".parquet":
        records = _parquet_records(path, raw, text_field, domain_field)
    else:
        stream = io.BufferedReader(pa.input_stream(raw, compression=SUFFIXES[suffix.lower()]), 1 << 16)
        if suffix.lower().startswith(".jsonl"):
            records = _jsonl_records(path, stream, text_field, domain_field)
        else:
            records = _txt_records(path, stream)
    documents = blank = 0
    for number, text, domain in records:
        if not isinstance(text, str):
            raise DataError(f"{path}:{number}: field {text_field!r} is {_kind(text)}, not a string")
        if domain is not None and not isinstance(domain, str):
            raise DataError(f"{path}:{number}: field {domain_field!r} is {_kind(domain)}, not a string")
        if not text.strip():
            blank += 1
            continue
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{path}:{number}: text holds half a surrogate pair at character {error.start}") from None
        documents += 1
        yield Document(text, domain or name, f"{path}:{number}")
    if not documents:
        raise DataError(f"{path} holds no documents" + (f", only {blank} texts of white space" if blank else ""))
    if blank:
        logger.warning("%s: %d texts of white space alone left out", path, blank)


Record = tuple[int, Any, Any]  # line or row, text, domain or None; the values are checked by file_documents


def _jsonl_records(path: Path, stream: io.BufferedReader, text_field: str, domain_field: str) -> Iterator[Record]:
    for number, line in _lines(path, stream):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            where = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise DataError(f"{path}:{number}: not JSON: {reason}{where}") from None
        if not isinstance(record, dict):
            raise DataError(
                f"{path}:{number}: the line holds {_kind(record)}, not an object; jsonl is one object a line"
            )
        if text_field not in record:
            raise DataError(_missing(f"{path}:{number}", "field", text_field, record))
        yield number, record[text_field], record.get(domain_field)


def _txt_records(path: Path, stream: io.BufferedReader) -> Iterator[Record]:
    """Yields the whole text when it is short, else pieces without blank lines at their ends."""
    lines = (
        (number, line.removesuffix("\r\n") + "\n" * line.endswith("\r\n")) for number, line in _lines(path, stream)
    )
    head, size = [], 0
    for number, line in lines:
        head.append((number, line))
        size += len(line)
        if size > WHOLE_FILE:
            break
    else:
        yield 1, "".join(line for _, line in head), None
        return
    first, piece, size = 1, list[str](), 0
    for number, line in itertools.chain(head, lines):
        blank = not line.strip()
        # Where no blank line comes, a line end will do, four times later.
        if (size >= CUT_DOCUMENT and blank) or size >= 4 * CUT_DOCUMENT:
            yield first, "".join(piece).strip("\n"), None
            piece, size = [], 0
        if not piece and blank:
            continue
        first = first if piece else number
        piece.append(line)
        size += len(line)
    if piece:
        yield first, "".join(piece).strip("\n"), None


def _parquet_records(path: Path, raw: IO[bytes], text_field: str, domain_field: str) -> Iterator[Record]:
    row = 0
    try:
        file = pq.ParquetFile(raw)
        schema = file.schema_arrow
        if text_field not in schema.names:
            raise DataError(_missing(str(path), "column", text_field, schema.names))
        columns = [name for name in (text_field, domain_field) if name in schema.names]
        for batch in file.iter_batches(batch_size=256, columns=columns):
            texts = batch.column(text_field)
            domains = batch.column(domain_field) if domain_field in columns else [None] * len(texts)
            for text, domain in zip(texts, domains, strict=True):
                row += 1
                yield row, text.as_py(), domain and domain.as_py()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{row}: text is not UTF-8 at byte {error.start}") from None
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a whole parquet file, after row {row}: {_first_line(error)}") from None


def _lines(path: Path, stream: io.BufferedReader) -> Iterator[tuple[int, str]]:
    """Yields (line number, line with its end); a byte-order mark is dropped. Memory is bounded by the longest line."""
    number = 0
    while True:
        number += 1
        try:
            line = stream.readline()
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{path}:{number}: cannot be read further, damaged or cut short: {_first_line(error)}"
            ) from None
        if not line:
            return
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        try:
            yield number, line.decode()
        except UnicodeDecodeError as error:
            hint = "; it looks like UTF-16" if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else ""
            raise DataError(
                f"{path}:{number}: not UTF-8 at byte {error.start} of the line (0x{line[error.start]:02x}){hint}; "
                "convert the file to UTF-8"
            ) from None


def _suffix(path: Path) -> str | None:
    """Returns the known suffix that the file's name ends with, as it is spelt there."""
    return next((path.name[-len(s) :] for s in SUFFIXES if path.name.lower().endswith(s)), None)


def _siblings(path: Path) -> list[str]:
    return [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []


def _missing(where: str, what: str, name: str, known: Iterable[str]) -> str:
    known = list(known)
    return f"{where}: no {what} {name!r}{nearest(name, known)}; found: {', '.join(map(repr, known[:10])) or 'none'}"


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else f"of type {type(value).__name__}")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
