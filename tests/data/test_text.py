"""Reading text: every format gives the same documents, and every kind of damage is an error with file and line."""

import gzip
import io
import json
import random
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moekit.data.text import CUT_DOCUMENT, WHOLE_FILE, Document, file_documents, text_files
from moekit.errors import ConfigError, DataError

Reader = Callable[..., Iterator[Document]]

ROWS = [{"text": f"Document {i}: été 中文 🙂\nline", "domain": "a" if i % 3 else "b"} for i in range(700)]
JSONL = "".join(json.dumps(row, ensure_ascii=i % 2 == 0) + "\n" for i, row in enumerate(ROWS)).encode()


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue())


def parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=64)
    return sink.getvalue()


def write(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


FORMS = {
    "x.jsonl": JSONL,
    "x.JSONL": JSONL,
    "x.jsonl.gz": gzip.compress(JSONL),
    "x.jsonl.zst": zstd(JSONL),
    "x.train.jsonl": b"\xef\xbb\xbf" + JSONL.replace(b"\n", b"\r\n"),
    "x.valid.jsonl.gz": gzip.compress(JSONL[:500]) + gzip.compress(JSONL[500:]),
    "x.parquet": parquet(pa.Table.from_pylist(ROWS)),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_documents(read_documents: Reader, tmp_path: Path, name: str) -> None:
    path = write(tmp_path, name, FORMS[name])
    expected = [Document(row["text"], row["domain"], f"{path}:{i + 1}") for i, row in enumerate(ROWS)]
    assert list(read_documents([path])) == expected


@pytest.mark.parametrize(
    ("name", "pack"), [("news.jsonl", bytes), ("news.train.jsonl.gz", gzip.compress), ("news.valid.jsonl.zst", zstd)]
)
def test_the_domain_is_the_file_name_where_no_field_says_it(
    read_documents: Reader, tmp_path: Path, name: str, pack: Callable[[bytes], bytes]
) -> None:
    content = b'{"body": "a"}\n{"body": "b", "kind": null}\n{"body": "c", "kind": "k"}\n'
    path = write(tmp_path, name, pack(content))
    documents = list(read_documents([path], text_field="body", domain_field="kind"))
    assert [(d.text, d.domain) for d in documents] == [("a", "news"), ("b", "news"), ("c", "k")]


def test_the_domain_of_a_text_in_a_named_folder_is_that_folder(
    read_documents: Reader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("books/one.txt", "books/old/two.train.txt", "alone.txt", "poems.valid/three.txt"):
        write(tmp_path, name, b"text")
    write(tmp_path, "books/four.jsonl", b'{"text": "a"}\n{"text": "b", "domain": "k"}')

    def domains(*paths: str) -> dict[str, str]:
        documents = read_documents([tmp_path / path for path in paths])
        return {Path(d.source).name.partition(".")[0] + d.source[-2:]: d.domain for d in documents}

    books = {"four:1": "books", "four:2": "k", "two:1": "books", "one:1": "books"}
    assert domains("books") == books
    assert domains("books", "alone.txt", "poems.valid") == {**books, "alone:1": "alone", "three:1": "poems"}
    assert domains("books/one.txt", "books/old")["one:1"] == "one"
    assert domains("books/one.txt", "books/old")["two:1"] == "old"
    assert domains("books/one.txt", "books") == {**books, "one:1": "one"}
    monkeypatch.chdir(tmp_path / "books")
    assert {d.domain for d in read_documents(["."])} == {"books", "k"}


def test_blank_texts_are_left_out_and_counted(
    read_documents: Reader, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, "a.jsonl", b'{"text": ""}\n\n{"text": "x"}\n{"text": " \\n"}')
    assert [d.source for d in read_documents([path])] == [f"{path}:3"]
    assert "2 texts of white space alone left out" in caplog.text


def test_a_short_txt_file_is_one_document_with_line_feeds(read_documents: Reader, tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", b"\xef\xbb\xbfone\r\n\r\ntwo\rthree\x00\n")
    assert list(read_documents([path])) == [Document("one\n\ntwo\rthree\x00\n", "a", f"{path}:1")]


def test_a_long_txt_file_is_cut_at_blank_lines_and_loses_nothing_else(read_documents: Reader, tmp_path: Path) -> None:
    paragraphs = [f"Paragraph {i}. " + "words and 字 " * (i % 90 + 1) + "\nend" for i in range(2500)]
    text = "\n\n".join(paragraphs)
    assert len(text.encode()) > WHOLE_FILE
    path = write(tmp_path, "book.txt.gz", gzip.compress(text.encode()))
    documents = list(read_documents([path]))
    assert "\n\n".join(d.text for d in documents) == text
    assert all(CUT_DOCUMENT <= len(d.text) < 2 * CUT_DOCUMENT for d in documents[:-1])
    lines = text.split("\n")
    for document in documents:
        first = int(document.source.rsplit(":", 1)[1])
        assert lines[first - 1] == document.text.split("\n")[0]


def test_a_long_txt_file_without_blank_lines_is_cut_at_line_ends(read_documents: Reader, tmp_path: Path) -> None:
    line = "x" * 99
    path = write(tmp_path, "log.txt", (line + "\n").encode() * 20_000)
    documents = list(read_documents([path]))
    assert len(documents) > 10
    assert all(set(d.text.split("\n")) == {line} for d in documents)
    assert sum(d.text.count("x") for d in documents) == 99 * 20_000


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.zst"])
def test_memory_does_not_grow_with_the_file(read_documents: Reader, tmp_path: Path, name: str) -> None:
    line = json.dumps({"text": "word " * 200}).encode() + b"\n\n"
    content = line * 30_000  # 30 MB
    path = write(tmp_path, name, gzip.compress(content, 1) if name.endswith("gz") else zstd(content))
    tracemalloc.start()
    count = sum(1 for _ in read_documents([path]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count > 1000
    assert peak < 6_000_000  # measured: 1.6 MB for txt, which holds its first MiB back


def test_folders_are_searched_in_order_and_a_file_counts_once(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/1.jsonl", "a/3.TXT", "a/notes.md", "a/.hidden.txt", "a/.cache/4.txt", "5.parquet"):
        write(tmp_path, name, b"x")
    names = [
        p.relative_to(tmp_path).as_posix() for p in text_files([tmp_path / "b" / "2.txt", tmp_path, tmp_path / "a"])
    ]
    assert names == ["b/2.txt", "5.parquet", "a/3.TXT", "b/1.jsonl"]


def test_fields_of_records_that_are_not_there_are_refused(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt.gz"):
        (tmp_path / name).touch()
    for fields in (["body"], ["text", "kind"]):
        with pytest.raises(ConfigError, match=f"-field {fields[-1]} has no effect: the files are .txt"):
            text_files([tmp_path], *fields)
    (tmp_path / "c.jsonl").touch()
    assert len(text_files([tmp_path], "body", "kind")) == 3


def test_paths_that_cannot_be_text_are_refused_with_what_is_allowed(tmp_path: Path) -> None:
    write(tmp_path, "notes.md", b"x")
    for paths, message in (
        ([tmp_path / "notes.md"], r"notes\.md has an unknown suffix; known suffixes: \.jsonl, .*\.parquet"),
        ([tmp_path], r"holds no text file; known suffixes"),
        ([tmp_path / "note.md"], r"note\.md does not exist \(did you mean notes\.md\?\)"),
        ([], "no text files were given"),
    ):
        with pytest.raises(DataError, match=message):
            text_files(paths)


NUMBERS = pa.table({"text": [1, 2]})
BAD_UTF8 = pa.table({"text": pa.array([b"fine", b"\xff\xfe"]).view(pa.utf8())})
BROKEN = {
    "empty": ("a.jsonl", b"", r"a\.jsonl holds no documents"),
    "empty gz": ("a.jsonl.gz", b"", r"a\.jsonl\.gz holds no documents"),
    "nothing inside the gz": ("a.jsonl.gz", gzip.compress(b""), "holds no documents"),
    "line ends only": ("a.jsonl", b"\n\r\n", "holds no documents"),
    "blank texts only": ("a.jsonl", b'{"text": " "}', "only 1 texts of white space"),
    "half an object": (
        "a.jsonl",
        b'{"text": "a"}\n{"text": "b',
        r"a\.jsonl:2: Invalid JSON: EOF while parsing a string at column 11, found '{\"text\": \"b'",
    ),
    "two objects": ("a.jsonl", b'{"text": "a"} {"text": "a"}', r"a\.jsonl:1: Invalid JSON: trailing characters"),
    "deep nesting": ("a.jsonl", b"[" * 200_000, r"a\.jsonl:1: Invalid JSON"),
    "a number of 5000 digits": ("a.jsonl", b'{"text": "a", "n": ' + b"1" * 5000 + b"}", r"a\.jsonl:1: Invalid JSON"),
    "a list": ("a.jsonl", b'{"text": "a"}\n["a"]', r"a\.jsonl:2: Input should be an object, found \['a'\]"),
    "another field": (
        "a.jsonl",
        b'{"texts": "a"}',
        r"a\.jsonl:1: text: Field required \(did you mean texts\?\), found \['texts'\]",
    ),
    "no field": ("a.jsonl", b"{}", r"a\.jsonl:1: text: Field required, found \[\]"),
    "a number": ("a.jsonl", b'{"text": 3}', r"a\.jsonl:1: text: Input should be a valid string, found 3"),
    "null": ("a.jsonl", b'{"text": null}', r"text: Input should be a valid string, found None"),
    "true": ("a.jsonl", b'{"text": true}', r"text: Input should be a valid string, found True"),
    "domain is a list": (
        "a.jsonl",
        b'{"text": "a", "domain": []}',
        r"a\.jsonl:1: domain: Input should be a valid string, found \[\]",
    ),
    "half a surrogate pair": (
        "a.jsonl",
        b'{"text": "ab\\ud83d"}',
        r"a\.jsonl:1: Invalid JSON: unexpected end of hex escape at column 19",
    ),
    "latin-1": (
        "a.jsonl",
        b'{"text": "a"}\n{"text": "caf\xe9"}',
        r"a\.jsonl:2: not UTF-8, 0xe9 at byte 13; convert",
    ),
    "utf-16": ("a.txt", "é\n".encode("utf-16"), r"a\.txt:1: not UTF-8, 0xff at byte 0; convert"),
    "cut gz": ("a.jsonl.gz", FORMS["x.jsonl.gz"][:-5], r"a\.jsonl\.gz:\d+: .*cut short"),
    "cut zst": ("a.jsonl.zst", FORMS["x.jsonl.zst"][:-5], r"a\.jsonl\.zst:\d+: .*cut short"),
    "not gz": ("a.txt.gz", b"plain text", r"a\.txt\.gz:1: cannot be read further"),
    "wrong check sum": (
        "a.jsonl.gz",
        FORMS["x.jsonl.gz"][:-8] + bytes(4) + FORMS["x.jsonl.gz"][-4:],
        "incorrect data check",
    ),
    "not zst": ("a.jsonl.zst", b"plain text", r"a\.jsonl\.zst:1: cannot be read further"),
    "cut parquet": ("a.parquet", FORMS["x.parquet"][:-9], r"a\.parquet:1: cannot be read further"),
    "not parquet": ("a.parquet", b"PAR1 no", r"a\.parquet:1: cannot be read further"),
    "missing column": (
        "a.parquet",
        parquet(pa.table({"txt": ["a"]})),
        r"a\.parquet:1: text: Field required \(did you mean txt\?\), found \['txt'\]",
    ),
    "number column": ("a.parquet", parquet(NUMBERS), r"a\.parquet:1: text: Input should be a valid string, found 1"),
    "null row": (
        "a.parquet",
        parquet(pa.table({"text": ["a", None]})),
        r"a\.parquet:2: text: Input should be a valid string, found None",
    ),
    "bad row": ("a.parquet", parquet(BAD_UTF8), r"a\.parquet:2: not UTF-8, 0xff at byte 0"),
    "no rows": ("a.parquet", parquet(pa.table({"text": pa.array([], pa.utf8())})), r"a\.parquet holds no documents"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_an_error_of_one_line_that_says_where(
    read_documents: Reader, tmp_path: Path, case: str
) -> None:
    name, content, message = BROKEN[case]
    path = write(tmp_path, name, content)
    with pytest.raises(DataError, match=message) as caught:
        list(read_documents([path]))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FORMS)
def test_random_damage_gives_documents_or_a_data_error_and_nothing_else(
    read_documents: Reader, tmp_path: Path, name: str
) -> None:
    random_ = random.Random(name)
    outcomes = set()
    for _ in range(40):
        damaged = bytearray(FORMS[name])
        if random_.random() < 0.3:
            del damaged[random_.randrange(len(damaged)) :]
        else:
            for _ in range(random_.randint(1, 4)):
                damaged[random_.randrange(len(damaged))] = random_.randrange(256)
        try:
            outcomes.add(all(isinstance(d.text, str) for d in read_documents([write(tmp_path, name, bytes(damaged))])))
        except DataError:
            outcomes.add("error")
    assert outcomes <= {True, "error"}
    assert "error" in outcomes


@pytest.mark.parametrize("content", ["short", "\n\n".join(["ab " * 5334] * 70)], ids=["one document", "cut"])
def test_the_position_can_be_asked_for_after_the_last_document(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.txt").write_text(content)
    with (tmp_path / "a.txt").open("rb") as raw:
        positions = [raw.tell() for _ in file_documents(tmp_path / "a.txt", raw)]
    assert positions[-1] == len(content)
