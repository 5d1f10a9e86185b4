"""A file is there whole or not at all, and what is read from it is checked."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from moekit import files
from moekit.errors import ConfigError


def test_sha256_and_sizes_are_those_of_the_files(tmp_path: Path) -> None:
    contents = {"b": b"\x00" * 3_000_000, "a": b"", "c": "é".encode()}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "other").touch()
    found = files.hashes(tmp_path, contents)
    assert list(found) == ["a", "b", "c"]
    for name, content in contents.items():
        assert found[name] == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_text_is_written_as_it_is_read(tmp_path: Path) -> None:
    files.write_json(tmp_path / "x.json", {"域": "诗 é \u2028"})
    assert "诗 é" in (tmp_path / "x.json").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == {"域": "诗 é \u2028"}


def test_writing_replaces_the_content_and_makes_the_folder(tmp_path: Path) -> None:
    file = tmp_path / "a" / "b.txt"
    for content in ("é\r\n", b"\xff\x00", ""):
        files.write(file, content)
        assert file.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert [path.name for path in file.parent.iterdir()] == ["b.txt"]


def test_a_file_that_cannot_be_written_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for path in (tmp_path / "folder", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match=rf"Errno .*{path}") as caught:
            files.write(path, b"content")
        assert caught.value.filename == str(path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]


class Inner(BaseModel):
    size: int


class Outer(BaseModel):
    parts: dict[str, Inner]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Invalid JSON: EOF while parsing a value at line 1 column 0, found b''"),
        (b"\xff\xfe", "Invalid JSON: .*, found b'"),
        (b"[]", r"Input should be an object, found \[\]"),
        (b'{"part": {}}', r"parts: Field required \(did you mean part\?\), found \['part'\]"),
        (b'{"parts": {"a": {"size": "x"}}}', r"parts\.a\.size: Input should be a valid integer, .*, found 'x'"),
        (b'{"parts": "' + b"x" * 1000 + b'"}', r"parts: Input should be an object, found 'x{76}\.\.\.$"),
    ],
)
def test_json_of_another_kind_is_one_line_with_file_field_and_what_was_found(
    tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"x\.json: {message}") as caught:
        files.read_json(tmp_path / "x.json", Outer, ConfigError)
    assert "\n" not in str(caught.value)


def test_json_of_the_right_kind_comes_back_to_the_last_bit(tmp_path: Path) -> None:
    content = {"a": [0.1, 1e-320, -0.0, 2**70, None, float("inf")], "b": {"c": "\u2028"}}
    files.write_json(tmp_path / "x.json", content)
    assert files.read_json(tmp_path / "x.json", dict[str, Any], ConfigError) == content
    with pytest.raises(ConfigError, match=r"none\.json cannot be read: No such file"):
        files.read_json(tmp_path / "none.json", Outer, ConfigError)
