"""Text in: documents from jsonl, txt and parquet files, plain or compressed, one at a time in bounded memory."""

import io
import itertools
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ConfigDict, Field, ValidationError, create_model

from moekit.errors import ConfigError, DataError, nearest
from moekit.files import explain

logger = logging.getLogger(__name__)

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".txt.gz", ".txt.zst", ".parquet")
COMPRESSION = {".gz": "gzip", ".zst": "zstd"}  # parquet compresses inside
WHOLE_FILE = 1 << 20  # characters: a longer .txt file is cut into documents
CUT_DOCUMENT = 16_000  # characters after which a long .txt file is cut at the next blank line


class Document(NamedTuple):
    """One text. `source` is "file:line" (jsonl, txt) or "file:row" (parquet), both counted from 1."""

    text: str
    domain: str
    source: str
    prompt: str = ""
    """What stands before the text and is given: read, but not learned."""


def text_files(
    paths: Iterable[str | Path], text_field: str = "text", domain_field: str = "domain"
) -> dict[Path, str | None]:
    """Returns the files that `paths` name, in their order, each with the folder that it was found in.

    Folders are searched recursively, sorted by name, for files with a known suffix, nothing hidden. Their folder is
    the one that `paths` names, without its parents; it is None for a file that `paths` names itself. A file that is
    named twice is read once.

    Raises DataError for a path that does not exist, a named file of another kind, and a folder without text, and
    ConfigError for fields of records where there are none.
    """
    found: dict[Path, tuple[Path, str | None]] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise DataError(f"{path} does not exist{nearest(path.name, [file.name for file in path.parent.glob('*')])}")
        inside = [file for file in (sorted(path.rglob("*")) if path.is_dir() else [path]) if _suffix(file)]
        shown = [file for file in inside if not any(part.startswith(".") for part in file.relative_to(path).parts)]
        files = [file for file in shown if file.is_file()]
        if not files:
            problem = "holds no text file" if path.is_dir() else "has an unknown suffix"
            raise DataError(f"{path} {problem}; known suffixes: {', '.join(SUFFIXES)}")
        for file in files:
            found.setdefault(file.resolve(), (file, path.resolve().name if path.is_dir() else None))
    if not found:
        raise DataError("no text files were given")
    if all(_suffix(file).startswith(".txt") for file, _ in found.values()):
        for option, field, usual in (("--text-field", text_field, "text"), ("--domain-field", domain_field, "domain")):
            if field != usual:
                raise ConfigError(f"{option} {field} has no effect: the files are .txt, without records; leave it out")
    return dict(found.values())


def file_documents(
    path: Path,
    raw: IO[bytes],
    text_field: str = "text",
    domain_field: str = "domain",
    folder: str | None = None,
    prompt_field: str | None = None,
) -> Iterator[Document]:
    """Yields the documents of one file, opened as `raw` (whose position tells how far the reading is).

    jsonl: an object a line. parquet: a row each. txt: the whole file, or documents of about 16 thousand characters cut
    at blank lines when it is larger than 1 MiB; there CRLF becomes LF. The domain is the field, else the name of the
    `folder`, else that of the file without suffixes; a last `.train` or `.valid` is no part of it. With `prompt_field`
    every record must have it. Texts of white space alone are left out, and the log says how many. Raises DataError with
    file and line (or row) for anything that is not such a document.
    """
    suffix = _suffix(path)
    name = folder or path.name[: -len(suffix)]
    name = name.removesuffix(".train").removesuffix(".valid") or name
    if suffix == ".parquet":
        records = _numbered(path, _parquet_rows(raw, text_field, domain_field, prompt_field))
    else:
        stream = pa.input_stream(raw, compression=COMPRESSION.get(path.suffix.lower()))
        reader = io.BufferedReader(stream, 1 << 16)  # held: when it goes, it closes `raw`, whose position is asked for
        lines = _numbered(path, _lines(reader))
        if suffix.startswith(".jsonl"):
            records = (line for line in lines if line[1].strip())
        else:
            records = ((number, {text_field: text}) for number, text in _cut(lines))
    fields: Any = {"text": (str, Field(alias=text_field)), "domain": (str | None, Field(None, alias=domain_field))}
    if prompt_field is not None:
        fields["prompt"] = (str, Field(alias=prompt_field))
    schema: Any = create_model("Record", __config__=ConfigDict(strict=True), **fields)
    documents = blank = 0
    for number, record in records:
        try:
            read: Any = schema.model_validate_json if isinstance(record, str) else schema.model_validate
            found = read(record)
        except ValidationError as error:
            raise DataError(f"{path}:{number}: {explain(error).replace('at line 1 column', 'at column')}") from None
        if found.text.strip():
            documents += 1
            yield Document(found.text, found.domain or name, f"{path}:{number}", getattr(found, "prompt", ""))
        else:
            blank += 1
    if not documents:
        raise DataError(f"{path} holds no documents" + (f", only {blank} texts of white space" if blank else ""))
    if blank:
        logger.warning("%s: %d texts of white space alone left out", path, blank)


def _numbered(path: Path, items: Iterator[Any]) -> Iterator[tuple[int, Any]]:
    """Yields lines or rows with their numbers; one that cannot be read is an error that names it."""
    number = 0
    try:
        for number, item in enumerate(items, start=1):
            yield number, item
    except UnicodeDecodeError as error:
        found = f"0x{error.object[error.start]:02x} at byte {error.start}"
        raise DataError(f"{path}:{number + 1}: not UTF-8, {found}; convert the file to UTF-8") from None
    except (pa.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{path}:{number + 1}: cannot be read further, damaged or cut short: {reason}") from None


def _lines(stream: Iterable[bytes]) -> Iterator[str]:
    """Yields the lines, each with its end, which is always LF; a byte-order mark is dropped."""
    encoding = "utf-8-sig"
    for line in stream:
        yield line.decode(encoding).replace("\r\n", "\n")
        encoding = "utf-8"


def _cut(lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Yields the whole text when it is short, else pieces without blank lines at their ends, each with its first line.

    Memory is bounded by `WHOLE_FILE` and the longest line.
    """
    head, size = list[tuple[int, str]](), 0
    for number, line in lines:
        head.append((number, line))
        size += len(line)
        if size > WHOLE_FILE:
            break
    else:
        yield 1, "".join(line for _, line in head)
        return
    first, piece = 1, ""
    for number, line in itertools.chain(head, lines):
        blank = not line.strip()
        # Where no blank line comes, a line end will do, four times later.
        if len(piece) >= (CUT_DOCUMENT if blank else 4 * CUT_DOCUMENT):
            yield first, piece.strip("\n")
            piece = ""
        if piece:
            piece += line
        elif not blank:
            first, piece = number, line
    if piece:
        yield first, piece.strip("\n")


def _parquet_rows(raw: IO[bytes], text_field: str, *others: str | None) -> Iterator[dict[str, Any]]:
    file = pq.ParquetFile(raw)
    known = text_field in file.schema_arrow.names
    columns = [text_field, *filter(None, others)] if known else None  # all: the error shows them
    for batch in file.iter_batches(batch_size=256, columns=columns):
        for row in batch.to_struct_array():
            yield row.as_py()


def _suffix(path: Path) -> str:
    """Returns the known suffix that the file's name ends with, in whatever case, or an empty string."""
    return next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), "")
