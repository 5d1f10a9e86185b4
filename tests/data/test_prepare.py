"""Preparing data: deterministic, resumable after a kill at any moment to the same bytes, and never silently wrong."""

import gzip
import json
import logging
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moekit.data import open_dataset, prepare, shards
from moekit.data.text import Document
from moekit.errors import CheckpointError, ConfigError, DataError
from moekit.formats.tokenizer import load_tokenizer

Reader = Callable[..., Iterator[Document]]
DOMAINS = ["gov_en", "math_en", "poetry_zh"]
MODULE = sys.modules["moekit.data.prepare"]  # `moekit.data.prepare` is the function


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packaged validation texts of three domains."""
    folder = tmp_path_factory.mktemp("texts")
    for domain in DOMAINS:
        name = f"{domain}.valid.jsonl.gz"
        (folder / name).write_bytes((files("moekit") / "quickstart" / "text" / name).read_bytes())
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def make(texts: Path, out: Path, **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"shard_tokens": 9000}
    settings |= {} if "valid_paths" in changes else {"valid_fraction": 0.1}
    settings |= {} if "tokenizer" in changes else {"vocab_size": 400}
    return prepare([texts], out, **{**settings, **changes})


def test_the_manifest_counts_every_document_and_byte(read_documents: Reader, texts: Path, tmp_path: Path) -> None:
    manifest = make(texts, tmp_path / "out")
    documents = list(read_documents([texts]))
    for domain in DOMAINS:
        mine = [d for d in documents if d.domain == domain]
        parts = [split["domains"].get(domain) for split in manifest["splits"].values()]
        assert sum(part["documents"] for part in parts if part) == len(mine)
        assert sum(part["bytes"] for part in parts if part) == sum(len(d.text.encode()) for d in mine)
    for name, split in manifest["splits"].items():
        for total in ("documents", "tokens", "bytes"):
            assert split[total] == sum(part[total] for part in split["domains"].values())
        assert open_dataset(tmp_path / "out", name).num_tokens == split["tokens"]
    assert manifest == json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["tokenizer"] == load_tokenizer(tmp_path / "out").fingerprint
    assert not (tmp_path / "out" / "progress.json").exists()


def test_two_runs_give_the_same_bytes_whatever_the_batches(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(texts, tmp_path / "a")
    monkeypatch.setattr(MODULE, "BATCH_CHARACTERS", 7_000)
    make(texts, tmp_path / "b")
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_the_split_follows_the_text_and_not_the_order(read_documents: Reader, texts: Path, tmp_path: Path) -> None:
    def validation_texts(out: Path) -> list[str]:
        dataset = open_dataset(out, "valid")
        return sorted(load_tokenizer(out).decode(dataset.read(0, dataset.num_tokens)).split("<|endoftext|>"))

    tokenizer = tmp_path / "a"
    make(texts, tmp_path / "a")
    rows = [json.dumps({"text": d.text, "domain": d.domain}) for d in read_documents([texts])]
    random.Random(0).shuffle(rows)
    (tmp_path / "shuffled.jsonl").write_text("\n".join(rows))
    make(tmp_path / "shuffled.jsonl", tmp_path / "b", tokenizer=tokenizer)
    assert validation_texts(tmp_path / "a") == validation_texts(tmp_path / "b")
    assert 0.05 < (len(validation_texts(tmp_path / "a")) - 1) / len(rows) < 0.15


def test_domains_without_validation_are_named(texts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(texts, tmp_path / "all", valid_fraction=0.3)
    assert not caplog.records
    none = make(texts, tmp_path / "none", valid_fraction=0.0)
    assert list(none["splits"]) == ["train"]
    assert none["domains_without_validation"] == DOMAINS
    assert "no validation text of gov_en, math_en, poetry_zh: training will not be evaluated on it" in caplog.text
    caplog.clear()
    with pytest.raises(DataError, match="no split 'valid'; found: train"):
        open_dataset(tmp_path / "none", "valid")
    some = make(texts / "math_en.valid.jsonl.gz", tmp_path / "some", valid_paths=[texts / "gov_en.valid.jsonl.gz"])
    assert some["domains_without_validation"] == ["math_en"]
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["no validation text of math_en"]
    assert some["arguments"]["valid_fraction"] is None
    assert sorted(some["splits"]["valid"]["domains"]) == ["gov_en"]


def test_a_folder_of_texts_is_one_domain_to_its_end(tmp_path: Path) -> None:
    books = tmp_path / "books"
    books.mkdir()
    for i in range(8):
        (books / f"{i}.txt").write_text(f"book {i} " + "word " * 20)
    prepare([books], tmp_path / "out", valid_fraction=0.4, vocab_size=260)
    for split in ("train", "valid"):
        assert open_dataset(tmp_path / "out", split).domains == ["books"]
    with pytest.raises(
        DataError, match=r"begun with file 1 = 0\.txt \(both, in books, .*, now it is 0\.txt \(both, by itself, .*; rep"
    ):
        prepare(sorted(books.iterdir()), tmp_path / "out", valid_fraction=0.4, vocab_size=260)


def test_a_given_tokenizer_is_used_and_copied(texts: Path, tmp_path: Path) -> None:
    make(texts, tmp_path / "a", vocab_size=300)
    manifest = make(texts, tmp_path / "b", tokenizer=tmp_path / "a" / "tokenizer.json")
    assert manifest["vocab_size"] == 300
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (tmp_path / "b" / "tokenizer.json").read_bytes()


def test_the_tokenizer_learns_from_every_file_and_not_from_validation_text(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("aaaa bbbb " * 5000)
    (tmp_path / "short.txt").write_text("qqqq " * 50)
    (tmp_path / "held_out.jsonl").write_text('{"text": "' + "zzzz " * 5000 + '"}')
    paths = [tmp_path / "long.txt", tmp_path / "short.txt"]
    prepare(paths, tmp_path / "o", valid_paths=[tmp_path / "held_out.jsonl"], vocab_size=270, tokenizer_bytes=1000)
    tokenizer = load_tokenizer(tmp_path / "o")
    lengths = {word: len(tokenizer.encode(word)) for word in (" aaaa", " qqqq", " zzzz")}
    assert lengths == {" aaaa": 1, " qqqq": 1, " zzzz": 5}


def test_a_finished_directory_is_left_as_it_is(texts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    manifest = make(texts, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    with caplog.at_level(logging.INFO):
        assert make(texts, tmp_path / "out") == manifest
    assert "is finished, nothing to do" in caplog.text
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}


CHANGES = {
    "valid_fraction = 0.1, now it is 0.2": {"valid_fraction": 0.2},
    "vocab_size = 400, now it is 401": {"vocab_size": 401},
    "shard_tokens = 9000, now it is 9001": {"shard_tokens": 9001},
    "text_field = text, now it is domain": {"text_field": "domain"},
    "domain_field = domain, now it is source": {"domain_field": "source"},
    "tokenizer_bytes = 50000000, now it is 9": {"tokenizer_bytes": 9},
}


def interrupt(texts: Path, out: Path, units: int) -> None:
    """Leaves `out` as a run leaves it that ends after so many shards."""

    class Stop(Exception):
        pass

    def stop(phase: str, done: int, total: int) -> None:
        if phase == "tokenise" and json.loads((out / "progress.json").read_text())["units"] >= units:
            raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODULE, "BATCH_CHARACTERS", 1)  # else all this text is read before the first shard is full
        with pytest.raises(Stop):
            make(texts, out, progress=stop)


@pytest.mark.parametrize("finished", [True, False])
def test_other_arguments_or_sources_are_an_error_that_names_them(texts: Path, tmp_path: Path, finished: bool) -> None:
    mine, out = tmp_path / "texts", tmp_path / "out"
    shutil.copytree(texts, mine)
    make(mine, out) if finished else interrupt(mine, out, 2)
    before = content(out)
    for message, change in CHANGES.items():
        with pytest.raises(DataError, match=f"out was begun with {message}; repeat the first command"):
            make(mine, out, **change)
    with pytest.raises(DataError, match=r"was begun with number of files = 3, now it is 1; repeat"):
        make(mine / "gov_en.valid.jsonl.gz", out)
    with pytest.raises(DataError, match=r"was begun with file 1 = gov_en.*, now it is poetry_zh"):
        prepare(sorted(mine.iterdir(), reverse=True), out, valid_fraction=0.1, vocab_size=400, shard_tokens=9000)
    path = mine / "math_en.valid.jsonl.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()), 1))
    with pytest.raises(
        DataError, match=r"out was begun with file 2 = math_en\.valid\.jsonl\.gz .*, now it is math_en\.valid"
    ):
        make(mine, out)
    assert content(out) == before


def test_resuming_does_not_tokenise_finished_shards_again_and_follows_moved_files(texts: Path, tmp_path: Path) -> None:
    make(texts, tmp_path / "straight")
    interrupt(texts, tmp_path / "out", 3)
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("0000[012].*")}
    moved = tmp_path / "moved" / texts.name
    shutil.copytree(texts, moved)
    make(moved, tmp_path / "out")
    assert len(stamps) >= 6
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}
    a, b = content(tmp_path / "straight"), content(tmp_path / "out")
    assert a.pop("manifest.json").replace(str(texts).encode(), str(moved).encode()) == b.pop("manifest.json")
    assert a == b


@pytest.mark.parametrize("name", ["train/00000.bin", "train/00000.npy", "tokenizer.json"])
def test_resuming_on_damaged_work_is_an_error(texts: Path, tmp_path: Path, name: str) -> None:
    interrupt(texts, tmp_path / "out", 2)
    path = tmp_path / "out" / name
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(DataError, match=f"{name}.* delete "):
        make(texts, tmp_path / "out")


def test_a_damaged_journal_is_an_error(texts: Path, tmp_path: Path) -> None:
    interrupt(texts, tmp_path / "out", 1)
    (tmp_path / "out" / "progress.json").write_text("{")
    with pytest.raises(DataError, match=r"progress\.json: Invalid JSON.*, found .*; delete .*out and start again"):
        make(texts, tmp_path / "out")


@pytest.mark.parametrize("name", ["notes.txt", "tokenizer.json", "train/00000.bin", ".git/config"])
def test_a_folder_with_other_files_is_left_alone(texts: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(DataError, match=r"out holds something else .*choose another --out"):
        make(texts, tmp_path / "out")
    assert content(tmp_path / "out") == {name: b"mine"}
    with pytest.raises(DataError, match="is a file; --out must be a new or empty directory"):
        make(texts, path)


def test_bad_arguments_are_refused_before_anything_is_written(texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for error, message, change in (
        (ConfigError, r"valid_fraction is 1\.0 but must be less than 1", {"valid_fraction": 1.0}),
        (ConfigError, "valid_fraction is -0.1", {"valid_fraction": -0.1}),
        (ConfigError, "shard_tokens is 0", {"shard_tokens": 0}),
        (ConfigError, "tokenizer_bytes is 0", {"tokenizer_bytes": 0}),
        (ConfigError, "vocab_size is 256", {"vocab_size": 256}),
        (CheckpointError, "does not exist", {"tokenizer": tmp_path}),
        (ConfigError, "vocab_size is 400 but a tokenizer is given", {"tokenizer": tmp_path, "vocab_size": 400}),
        (ConfigError, "valid_fraction is 0.0 but validation", {"valid_paths": [texts], "valid_fraction": 0.0}),
        (
            DataError,
            "given both as training and as validation text",
            {"valid_paths": [texts / "gov_en.valid.jsonl.gz"]},
        ),
    ):
        with pytest.raises(error, match=message):
            make(texts, out, **change)
        assert not out.exists()


def test_an_error_in_the_text_names_the_line_and_leaves_no_dataset(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' * 30 + "broken\n")
    with pytest.raises(DataError, match=r"a\.jsonl:31: Invalid JSON"):
        make(tmp_path / "a.jsonl", tmp_path / "out", vocab_size=257)
    with pytest.raises(DataError, match="is not finished"):
        open_dataset(tmp_path / "out", "train")


def test_repaired_text_starts_again_where_no_shard_was_finished(tmp_path: Path) -> None:
    text = tmp_path / "a.jsonl"
    text.write_text('{"text": "one two three"}\n{"text": broken}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2"):
        prepare([text], tmp_path / "out", vocab_size=300, valid_fraction=0)
    text.write_text('{"text": "one two three"}\n{"text": "four"}\n')
    manifest = prepare([text], tmp_path / "out", vocab_size=300, valid_fraction=0)
    assert manifest["splits"]["train"]["documents"] == 2
    assert content(tmp_path / "out").keys() >= {"manifest.json", "tokenizer.json"}


def test_text_that_is_all_validation_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n')
    with pytest.raises(DataError, match=r"every document became validation text; lower valid_fraction, now 0\.999999"):
        make(tmp_path / "a.jsonl", tmp_path / "out", valid_fraction=0.999999, vocab_size=257)


def test_progress_grows_to_its_total_in_each_phase(texts: Path, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    make(texts, tmp_path / "out", progress=lambda *call: calls.append(call))
    for phase in ("hash", "tokenizer", "tokenise"):
        done = [call[1] for call in calls if call[0] == phase]
        assert done == sorted(done)
        assert all(call[1] <= call[2] for call in calls if call[0] == phase)
    size = sum(path.stat().st_size for path in texts.iterdir())
    assert calls[-1] == ("tokenise", size, size)


PROGRAM = """
import sys
from moekit.data import prepare
from moekit.errors import DataError
if sys.argv[3] == "small disk":
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))
try:
    prepare([sys.argv[1]], sys.argv[2], valid_fraction=0.1, vocab_size=400, shard_tokens=2000)
except DataError as error:
    sys.exit(str(error))
"""


def start(texts: Path, out: Path, disk: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, str(texts), str(out), disk]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def units_done(out: Path) -> int:
    journal = out / "progress.json"
    return int(json.loads(journal.read_text())["units"]) if journal.exists() else -1


def test_a_run_killed_at_random_moments_ends_with_the_same_bytes(texts: Path, tmp_path: Path) -> None:
    prepare([texts], tmp_path / "straight", valid_fraction=0.1, vocab_size=400, shard_tokens=2000)
    random_, out, killed_at = random.Random(1), tmp_path / "out", []
    for shards_more in (0, 1, 2, 5, 8):  # the first kill comes before there is a journal
        run, target = start(texts, out), units_done(out) + shards_more
        while run.poll() is None and units_done(out) < target:
            time.sleep(0.0005)
        time.sleep(random_.random() * 0.01)
        run.send_signal(signal.SIGKILL)
        assert run.communicate()[1] == ""
        killed_at.append(units_done(out))
    assert sum(0 < units < 30 for units in killed_at) >= 2, killed_at
    run = start(texts, out)
    assert run.communicate()[1] == ""
    assert run.returncode == 0
    assert content(out) == content(tmp_path / "straight")


def test_a_full_disk_is_an_error_and_the_run_can_be_finished_later(texts: Path, tmp_path: Path) -> None:
    run = start(texts, tmp_path / "out", "small disk")
    assert "make room and run the same command again" in run.communicate()[1]
    assert run.returncode == 1
    with pytest.raises(DataError, match="is not finished"):
        open_dataset(tmp_path / "out", "train")
    assert not list((tmp_path / "out").rglob("*.writing"))
    assert start(texts, tmp_path / "out").wait() == 0
    prepare([texts], tmp_path / "straight", valid_fraction=0.1, vocab_size=400, shard_tokens=2000)
    assert content(tmp_path / "out") == content(tmp_path / "straight")


@pytest.mark.skipif(sys.platform != "linux", reason="/sys, where nobody makes folders, root neither")
def test_a_folder_that_may_not_be_written_is_named_without_advice_on_room() -> None:
    with pytest.raises(DataError, match=r"cannot write /sys/moekit/a: [^;]*$"):
        shards.write(Path("/sys/moekit/a"), b"")


def test_a_long_text_may_end_where_progress_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(["ab " * 5334] * 256))  # the reader closes the file with its last piece
    manifest = make(tmp_path / "a.txt", tmp_path / "out", tokenizer_bytes=10_000, shard_tokens=10**7)
    assert sum(split["documents"] for split in manifest["splits"].values()) == 256


def test_a_prompt_is_tokenised_by_itself_and_counted_with_its_text(tmp_path: Path) -> None:
    rows = [{"question": "one two ", "text": "three four"}, {"question": "", "text": "five"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 40))
    made = prepare([tmp_path / "a.jsonl"], tmp_path / "out", valid_fraction=0, prompt_field="question", vocab_size=300)
    dataset, vocabulary = open_dataset(tmp_path / "out", "train"), load_tokenizer(tmp_path / "out")
    ids = [(vocabulary.encode(row["question"]), [*vocabulary.encode(row["text"]), vocabulary.eos_id]) for row in rows]
    tokens = [token for prompt, text in ids * 40 for token in prompt + text]
    assert dataset.read(0, dataset.num_tokens).tolist() == tokens
    expected = [place < len(prompt) for prompt, text in ids * 40 for place in range(len(prompt) + len(text))]
    assert dataset.is_prompt(0, dataset.num_tokens).tolist() == expected
    assert made["splits"]["train"]["bytes"] == 40 * len("one two three fourfive")
    assert made["arguments"]["prompt_field"] == "question"


def test_a_record_without_the_prompt_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "question": "b"}\n{"text": "a"}\n')
    with pytest.raises(DataError, match=r"a.jsonl:2: question: Field required"):
        prepare([tmp_path / "a.jsonl"], tmp_path / "out", prompt_field="question")


def test_prompts_come_from_parquet_too(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["ab"] * 9, "asked": ["xyz"] * 9}), tmp_path / "a.parquet")
    prepare([tmp_path / "a.parquet"], tmp_path / "out", valid_fraction=0, prompt_field="asked", vocab_size=257)
    assert open_dataset(tmp_path / "out", "train").is_prompt(0, 6).tolist() == [True] * 3 + [False] * 3


def test_texts_with_other_prompts_are_held_out_each_by_itself(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": "same", "q": str(i)}) + "\n" for i in range(200)))
    made = prepare([tmp_path / "a.jsonl"], tmp_path / "out", valid_fraction=0.5, prompt_field="q", vocab_size=257)
    assert 60 < made["splits"]["valid"]["documents"] < 140
