"""The order of similar documents: a permutation in which like stand beside like, kept beside the shards."""

import hashlib
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from moekit.data import Sampler, open_dataset, prepare
from moekit.data.shards import read_manifest, shuffled_order
from moekit.data.similar import adjacent_similarity, embeddings, neighbours, normalised, similar_order, walk
from moekit.errors import ConfigError, DataError
from moekit.formats.tokenizer import load_tokenizer

TOPICS = {
    "sea": ("ship", "sail", "harbour", "wave", "tide", "captain", "anchor", "storm", "gull", "rope", "deck", "island"),
    "court": ("judge", "law", "appeal", "verdict", "clause", "witness", "trial", "statute", "jury", "oath", "bail"),
    "sum": ("prime", "root", "matrix", "proof", "integer", "vector", "lemma", "angle", "square", "factor", "theorem"),
}


def quiet(phase: str, done: int, total: int) -> None:
    """Takes progress in."""


def write_topics(file: Path) -> None:
    """Sixty documents of ten words, of three topics in turn; the domain says nothing of them."""
    draw = np.random.Philox(key=[5, 0]).random_raw
    rows = []
    for number in range(60):
        words = list(TOPICS.values())[number % 3]
        text = " ".join(words[int(place)] for place in draw(10) % np.uint64(len(words)))
        rows.append({"text": f"{text} {number}", "domain": ("a", "b")[number // 3 % 2]})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("topics")
    write_topics(folder / "topics.jsonl")
    prepare([folder / "topics.jsonl"], folder / "data", valid_fraction=0.0, vocab_size=600, similar=True)
    return folder / "data"


def topic(text: str) -> str:
    return next(name for name, words in TOPICS.items() if text.split()[0] in words)


def texts(data: Path, order: str) -> list[str]:
    dataset = open_dataset(data, "train", order=order)  # type: ignore[arg-type]
    read = load_tokenizer(data).decode(dataset.read(0, dataset.num_tokens).tolist())
    return read.split("<|endoftext|>")[:-1]


def test_every_order_has_every_document_once_and_similar_puts_topics_together(data: Path) -> None:
    found = {order: texts(data, order) for order in ("source", "shuffled", "similar")}
    assert len({tuple(sorted(documents)) for documents in found.values()}) == 1
    assert len(set(map(tuple, found.values()))) == 3
    changes = {
        order: sum(topic(a) != topic(b) for a, b in itertools.pairwise(documents)) for order, documents in found.items()
    }
    assert changes["similar"] <= 6  # two at best; a walk that is stuck begins anew
    assert changes["shuffled"] > 30
    assert changes["source"] == 59


def test_neighbours_are_three_times_as_similar_as_in_shuffled_order(data: Path) -> None:
    similar = read_manifest(data).similar
    assert similar is not None
    assert similar.similarity >= 3 * similar.similarity_shuffled > 0  # 4.9 times
    rows = embeddings(open_dataset(data, "train"), quiet)
    assert similar.similarity == pytest.approx(adjacent_similarity(rows, similar_order(rows, quiet)), abs=1e-4)
    assert similar.similarity_shuffled == pytest.approx(adjacent_similarity(rows, shuffled_order(60)), abs=1e-4)


def test_hashed_vectors_estimate_the_products_of_whole_ones(data: Path) -> None:
    """Whole: columns enough that hardly two terms share one. The worst error here: 0.14, of width 512."""
    dataset = open_dataset(data, "train")
    hashed, whole = (embeddings(dataset, quiet, width) for width in (512, 1 << 16))
    errors = np.abs(hashed @ hashed.T - whole @ whole.T)
    assert errors.max() < 0.25
    assert errors.mean() < 2 / np.sqrt(512)


def test_neighbours_equal_a_sort_of_all_products_and_none_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moekit.data.similar.BLOCK", 100)  # blocks of four rows, the last of three
    rows = normalised(np.random.default_rng(0).normal(size=(23, 7)).astype(np.float32))
    products = rows @ rows.T
    np.fill_diagonal(products, -np.inf)
    assert (neighbours(rows, 5, quiet) == np.argsort(-products, axis=1, kind="stable")[:, :5]).all()
    assert neighbours(rows[:3], 5, quiet).shape == (3, 2)


def test_a_walk_goes_to_the_nearest_unused_and_begins_anew_where_all_are_used() -> None:
    nearest = np.array([[1, 2], [0, 2], [1, 0], [4, 0], [3, 0]])
    assert walk(nearest, np.array([2, 3, 0, 1, 4])).tolist() == [2, 1, 0, 3, 4]


def test_groups_bound_the_work_and_none_and_one_document_are_fine() -> None:
    rows = normalised(np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32))
    order = similar_order(rows, quiet, group=16)
    assert sorted(order.tolist()) == list(range(50))
    assert adjacent_similarity(rows, similar_order(rows, quiet)) > adjacent_similarity(rows, order)
    assert similar_order(rows[:1], quiet).tolist() == [0]
    assert similar_order(rows[:0], quiet).tolist() == []
    assert adjacent_similarity(rows, np.array([3])) == 0


def test_the_order_is_added_to_finished_data_and_changes_nothing_else(tmp_path: Path) -> None:
    write_topics(tmp_path / "topics.jsonl")
    sources, out = [tmp_path / "topics.jsonl"], tmp_path / "data"
    before = prepare(sources, out, valid_fraction=0.1, vocab_size=600)
    plain = open_dataset(out, "train").fingerprint
    after = prepare(sources, out, valid_fraction=0.1, vocab_size=600, similar=True)
    assert {**after, "similar": None} == before
    assert prepare(sources, out, valid_fraction=0.1, vocab_size=600) == after  # it stays
    assert open_dataset(out, "train").fingerprint == plain
    assert open_dataset(out, "train", order="similar").fingerprint != plain
    with pytest.raises(DataError, match="has no similar order"):
        open_dataset(out, "valid", order="similar")


def test_embeddings_that_are_given_decide_and_wrong_ones_are_refused(tmp_path: Path) -> None:
    write_topics(tmp_path / "topics.jsonl")
    sources, out, file = [tmp_path / "topics.jsonl"], tmp_path / "data", tmp_path / "rows.npy"
    angles = np.random.Philox(key=[1, 0]).random_raw(60) / 2**64
    np.save(file, np.stack((np.cos(angles), np.sin(angles)), axis=1))
    made = prepare(sources, out, valid_fraction=0.0, vocab_size=600, similar=True, embeddings=file)
    assert made["similar"]["embeddings"] == hashlib.sha256(file.read_bytes()).hexdigest()
    order = np.load(out / "train" / "similar.npy")
    steps = np.abs(np.diff(angles[order]))
    assert np.median(steps) < 0.03  # along the arc of 1, of 60 documents
    again = prepare(sources, out, valid_fraction=0.0, vocab_size=600, similar=True)
    assert again["similar"]["embeddings"] is None
    for wrong in (np.zeros((59, 2)), np.zeros(60), np.zeros((60, 2), dtype=np.int64)):
        np.save(file, wrong)
        with pytest.raises(DataError, match=r"must be floating-point, \(60, width\)"):
            prepare(sources, out, valid_fraction=0.0, vocab_size=600, similar=True, embeddings=file)
    np.save(file, np.full((60, 2), np.nan))
    with pytest.raises(DataError, match="not finite"):
        prepare(sources, out, valid_fraction=0.0, vocab_size=600, similar=True, embeddings=file)
    with pytest.raises(DataError, match="no-such"):
        prepare(sources, out, valid_fraction=0.0, vocab_size=600, similar=True, embeddings=tmp_path / "no-such.npy")
    with pytest.raises(ConfigError, match="takes effect only with similar"):
        prepare(sources, out, valid_fraction=0.0, vocab_size=600, embeddings=file)


def test_windows_of_whole_documents_and_damage_are_those_of_any_order(data: Path, tmp_path: Path) -> None:
    dataset = open_dataset(data, "train", order="similar")
    batch = Sampler(dataset, 64, 2, 0, "documents").batch(0)
    first = batch.input_ids[0][batch.document_ids[0] == batch.document_ids[0][0]]
    start = int(dataset.whole_documents(0, dataset.num_tokens, 65)[Sampler(dataset, 64, 2, 0, "documents").order(0)[0]])
    assert (dataset.read(start, len(first)) == first).all()
    file = data / "train" / "similar.npy"
    whole = file.read_bytes()
    file.write_bytes(whole[:-8])
    with pytest.raises(DataError, match="has changed since it was written"):
        open_dataset(data, "train", order="similar")
    file.write_bytes(whole)
