"""A directory appears whole or not at all, and a changed one is found out."""

import os
from pathlib import Path

import pytest

from moekit.errors import CheckpointError
from moekit.formats.directory import MANIFEST, atomic_directory, check_directory


def write(path: Path, content: str = "old", overwrite: bool = False) -> None:
    with atomic_directory(path, overwrite) as folder:
        (folder / "a.txt").write_text(content)
        (folder / "b.bin").write_bytes(bytes(range(256)))


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        check_directory(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_it_appears_only_at_the_end_and_lists_every_file(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "x") as folder:
        (folder / "a.txt").write_text("hello")
        assert not (tmp_path / "x").exists()
    files = check_directory(tmp_path / "x")
    assert files == {
        "a.txt": {"bytes": 5, "sha256": "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"}
    }
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


def test_missing_parents_are_made(tmp_path: Path) -> None:
    write(tmp_path / "a" / "b" / "c")
    check_directory(tmp_path / "a" / "b" / "c")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_inside_passes_through_and_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def write_half() -> None:
        with atomic_directory(tmp_path / "x") as folder:
            (folder / "a.txt").write_text("half")
            raise error

    with pytest.raises(error):
        write_half()
    assert list(tmp_path.iterdir()) == []


def test_an_existing_directory_is_refused_and_stays(tmp_path: Path) -> None:
    write(tmp_path / "x")
    with pytest.raises(CheckpointError, match="exists already"):
        write(tmp_path / "x", "new")
    assert (tmp_path / "x" / "a.txt").read_text() == "old"


def test_overwrite_replaces_a_directory_but_never_a_file(tmp_path: Path) -> None:
    write(tmp_path / "x")
    write(tmp_path / "x", "new", overwrite=True)
    check_directory(tmp_path / "x")
    assert (tmp_path / "x" / "a.txt").read_text() == "new"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="exists already"):
        write(tmp_path / "file", overwrite=True)
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "x"]


def test_an_older_directory_stays_when_the_writing_fails(tmp_path: Path) -> None:
    write(tmp_path / "x")

    def write_badly() -> None:
        with atomic_directory(tmp_path / "x", overwrite=True) as folder:
            (folder / "a.txt").write_text("new")
            (folder / "no-file").mkdir()  # cannot be opened, as a file on a broken disk

    with pytest.raises(CheckpointError, match="could not be written"):
        write_badly()
    check_directory(tmp_path / "x")
    assert (tmp_path / "x" / "a.txt").read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


def test_an_older_directory_stays_when_the_replacing_fails(tmp_path: Path) -> None:
    write(tmp_path / "x")
    in_the_way = tmp_path / f".x.replaced-{os.getpid()}"
    in_the_way.mkdir()
    (in_the_way / "something").touch()
    with pytest.raises(CheckpointError, match="could not be written"):
        write(tmp_path / "x", "new", overwrite=True)
    check_directory(tmp_path / "x")
    assert (tmp_path / "x" / "a.txt").read_text() == "old"


def test_a_file_as_parent_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"file/x could not be written: Not a directory") as caught:
        write(tmp_path / "file" / "x")
    assert "\n" not in str(caught.value)


def test_what_a_killed_process_with_this_number_left_is_no_obstacle(tmp_path: Path) -> None:
    left = tmp_path / f".x.writing-{os.getpid()}"
    left.mkdir()
    (left / "half").touch()
    write(tmp_path / "x")
    assert sorted(check_directory(tmp_path / "x")) == ["a.txt", "b.bin"]


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ("", "Invalid JSON"),
        ("{", "Invalid JSON"),
        ("\udcff", "Invalid JSON"),
        ("[]", "Input should be an object, found []"),
        ("{}", "format: Field required, found []"),
        ('{"format": 2, "files": {}}', "format: Input should be 1, found 2"),
        ('{"format": 1}', "files: Field required, found ['format']"),
        ('{"format": 1, "files": {}}', "files: Dictionary should have at least 1 item"),
        ('{"format": 1, "files": ["a.txt"]}', "files: Input should be an object, found ['a.txt']"),
        ('{"format": 1, "files": {"../evil": {"bytes": 4, "sha256": ""}}}', "found '../evil'"),
        ('{"format": 1, "files": {"/etc/passwd": {"bytes": 4, "sha256": ""}}}', "found '/etc/passwd'"),
        ('{"format": 1, "files": {"..": {"bytes": 4, "sha256": ""}}}', "is missing"),
        ('{"format": 1, "files": {"a.txt": "yes"}}', "files.a.txt: Input should be an object, found 'yes'"),
        ('{"format": 1, "files": {"a.txt": {}}}', "files.a.txt.bytes: Field required"),
        ('{"format": 1, "files": {"a.txt": {"bytes": 3, "sha256": ""}}}', "has changed since it was written"),
        ('{"format": 1, "files": {"c.txt": {"bytes": 3, "sha256": ""}}}', "c.txt is missing"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(tmp_path: Path, manifest: str, message: str) -> None:
    write(tmp_path / "x")
    (tmp_path / "evil").write_text("evil")
    (tmp_path / "x" / MANIFEST).write_bytes(manifest.encode(errors="surrogateescape"))
    assert message in refusal(tmp_path / "x")


def test_a_file_that_is_missing_cut_or_changed_is_named(tmp_path: Path) -> None:
    write(tmp_path / "x")
    file = tmp_path / "x" / "b.bin"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    assert "b.bin has changed since it was written: 255 bytes, manifest.json says 256" in refusal(tmp_path / "x")
    file.write_bytes(content[::-1])
    assert "b.bin has changed since it was written: its hash is" in refusal(tmp_path / "x")
    file.unlink()
    assert "b.bin is missing but manifest.json lists it" in refusal(tmp_path / "x")
    (tmp_path / "x" / MANIFEST).unlink()
    assert "has no manifest.json" in refusal(tmp_path / "x")
    assert "is not a directory" in refusal(tmp_path / "nothing")


def test_a_flipped_bit_in_any_byte_of_a_manifest_is_found(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "x") as folder:
        (folder / "a").write_text("hello")
    file = tmp_path / "x" / MANIFEST
    good = file.read_bytes()
    for place in range(len(good)):
        file.write_bytes(good[:place] + bytes([good[place] ^ 1 << place % 8]) + good[place + 1 :])
        refusal(tmp_path / "x")
