"""The dataset on disk: the stream holds every document once, domain by domain, and damage is an error that names it."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moekit.data import open_dataset, prepare
from moekit.data.shards import token_dtype, write
from moekit.data.text import Document
from moekit.errors import DataError
from moekit.formats.tokenizer import load_tokenizer

Reader = Callable[..., Iterator[Document]]
DOMAINS = ["zebra", "apple", "mango"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files in which three domains alternate, documents of 1 to 60 words."""
    folder = tmp_path_factory.mktemp("source")
    for file in range(2):
        rows = [{"text": f"{file}-{i} " + "word 字 " * (i % 60), "domain": DOMAINS[i % 3]} for i in range(150)]
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def data(source: Path, tmp_path: Path) -> Path:
    prepare([source], tmp_path / "data", valid_fraction=0.1, vocab_size=300, shard_tokens=3000)
    return tmp_path / "data"


def test_the_stream_is_every_document_by_domain_in_source_order(
    read_documents: Reader, source: Path, data: Path
) -> None:
    tokenizer = load_tokenizer(data)
    train, valid = open_dataset(data, "train", verify=True), open_dataset(data, "valid", verify=True)
    documents = list(read_documents([source]))
    seen = []
    for dataset in (train, valid):
        assert dataset.domains == sorted(DOMAINS)
        for domain in dataset.domains:
            start, stop = dataset.domain_range(domain)
            texts = tokenizer.decode(dataset.read(start, stop - start).tolist()).split("<|endoftext|>")
            assert texts.pop() == ""
            in_order = [d.text for d in documents if d.domain == domain and d.text in set(texts)]
            assert texts == in_order
            seen += texts
            counts = dataset.manifest.splits[dataset.split].domains[domain]
            assert counts.documents == len(texts)
            assert counts.tokens == stop - start
            assert counts.bytes == sum(len(text.encode()) for text in texts)
    assert sorted(seen) == sorted(d.text for d in documents)
    assert len(train.manifest.splits["train"].shards) > 3


def test_any_stretch_equals_the_same_stretch_of_the_whole(data: Path) -> None:
    dataset = open_dataset(data, "train")
    whole = dataset.read(0, dataset.num_tokens)
    ids = dataset.document_ids(0, dataset.num_tokens)
    generator = np.random.default_rng(0)
    for start, stop in np.sort(generator.integers(0, dataset.num_tokens + 1, (200, 2)), axis=1):
        assert np.array_equal(dataset.read(start, stop - start), whole[start:stop])
        assert np.array_equal(dataset.document_ids(start, stop - start), ids[start:stop])
    assert whole.dtype == ids.dtype == np.int64
    # A document ends with end-of-text and nowhere else, so the numbers step up just behind each one.
    expected = np.concatenate([[0], np.cumsum(whole[:-1] == dataset.eos_id)])
    assert np.array_equal(ids, expected)


def test_token_counts_are_the_counts_of_the_stream(data: Path) -> None:
    for split in ("train", "valid"):
        dataset = open_dataset(data, split)
        stream = dataset.read(0, dataset.num_tokens)
        assert np.array_equal(dataset.token_counts(), np.bincount(stream, minlength=dataset.vocab_size))


@pytest.mark.parametrize(("start", "length"), [(-1, 2), (0, 10**9), (10**9, 0), (3, -1)])
def test_reading_outside_of_the_stream_is_an_error(data: Path, start: int, length: int) -> None:
    with pytest.raises(IndexError, match="of a stream of"):
        open_dataset(data, "train").read(start, length)


def test_ids_are_two_bytes_up_to_65536_and_four_beyond() -> None:
    assert token_dtype(65536).itemsize == 2
    assert token_dtype(65537).itemsize == 4


def test_what_is_not_a_dataset_is_refused(tmp_path: Path, data: Path) -> None:
    with pytest.raises(DataError, match=r"is not a dataset \(no manifest\.json\)"):
        open_dataset(tmp_path / "nothing", "train")
    with pytest.raises(DataError, match=r"no split 'vald' \(did you mean valid\?\); found: train, valid"):
        open_dataset(data, "vald")
    with pytest.raises(DataError, match=r"domain 'aple' is not in .*did you mean apple"):
        open_dataset(data, "train").domain_range("aple")
    (data / "manifest.json").rename(data / "progress.json")
    with pytest.raises(DataError, match="is not finished; run the same"):
        open_dataset(data, "train")


def _without(name: str) -> Any:
    return lambda manifest: manifest.pop(name)


MANIFEST_DAMAGE = {
    "version": lambda manifest: manifest.update(version=2),
    "format": lambda manifest: manifest.update(format="other"),
    "tokenizer": _without("tokenizer"),
    "domains": lambda manifest: manifest.update(domains=3),
    "surprise": lambda manifest: manifest.update(surprise=1),
    "splits.train.tokens": lambda manifest: manifest["splits"]["train"].pop("tokens"),
}


@pytest.mark.parametrize("field", MANIFEST_DAMAGE)
def test_a_wrong_manifest_is_an_error_that_names_the_field(data: Path, field: str) -> None:
    manifest = json.loads((data / "manifest.json").read_text())
    MANIFEST_DAMAGE[field](manifest)
    (data / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=rf"manifest\.json: {field}: "):
        open_dataset(data, "train")


def test_totals_that_do_not_add_up_are_an_error(data: Path) -> None:
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"].pop()
    (data / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="do not add up"):
        open_dataset(data, "train")


@pytest.mark.parametrize("name", ["train/00001.bin", "train/00001.npy"])
def test_a_cut_or_missing_shard_is_an_error_at_once_and_a_changed_one_when_verified(data: Path, name: str) -> None:
    path = data / name
    content = path.read_bytes()
    path.write_bytes(content[:-2])
    with pytest.raises(
        DataError, match=rf"{name} has changed .* it has {len(content) - 2} bytes now, not {len(content)} of"
    ):
        open_dataset(data, "train")
    path.unlink()
    with pytest.raises(DataError, match=f"{name} is missing"):
        open_dataset(data, "train")
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DataError, match="has changed since it was written"):
        open_dataset(data, "train", verify=True)


@pytest.mark.parametrize("damage", ["header", "starts", "domain"])
def test_a_damaged_index_is_an_error_without_verifying(data: Path, damage: str) -> None:
    path = data / "train" / "00000.npy"
    index = np.load(path)
    index[{"starts": (3, 0), "domain": (3, 3), "header": (0, 0)}[damage]] += 7
    np.save(path, index)
    if damage == "header":
        path.write_bytes(b"\0" * 16 + path.read_bytes()[16:])
    with pytest.raises(DataError, match=r"00000\.npy has changed since it was written"):
        open_dataset(data, "train")


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="cannot write"):
        write(tmp_path / "folder", b"content")
    assert [path.name for path in tmp_path.rglob("*")] == ["folder"]


def test_a_dataset_from_before_there_were_prompts_is_read_as_one_without(data: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(data, old)
    manifest = json.loads((old / "manifest.json").read_text())
    del manifest["arguments"]["prompt_field"]
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            index = old / f"{shard['name']}.npy"
            np.save(index, np.load(index)[:, :4])
            shard["index"] = {"size": index.stat().st_size, "sha256": hashlib.sha256(index.read_bytes()).hexdigest()}
    (old / "manifest.json").write_text(json.dumps(manifest))
    before, now = open_dataset(old, "train", verify=True), open_dataset(data, "train")
    assert np.array_equal(before.read(0, before.num_tokens), now.read(0, now.num_tokens))
    assert np.array_equal(before.document_ids(0, before.num_tokens), now.document_ids(0, now.num_tokens))
    assert not before.is_prompt(0, before.num_tokens).any()
