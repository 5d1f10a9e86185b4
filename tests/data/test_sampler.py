"""Sampling: a pure function of (seed, step) that shows every window once per epoch."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moekit.data import Batch, Sampler, TokenDataset, open_dataset, prepare, validation_windows
from moekit.data.sampler import IGNORE, Packing
from moekit.errors import DataError
from moekit.formats.tokenizer import load_tokenizer
from moekit.ops.loss import IGNORED

LENGTH = 7


def test_the_data_need_no_torch_and_agree_with_the_loss_on_what_is_ignored() -> None:
    code = "import sys, moekit.data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert IGNORE == IGNORED


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sampler")
    for name, words in (("prose", 40), ("verse", 9)):
        rows = [{"text": f"{name} {i} " + "one two three " * (i % words)} for i in range(40)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(sorted(folder.glob("*.jsonl")), folder / "data", valid_fraction=0.3, vocab_size=280, shard_tokens=500)
    return folder / "data"


@pytest.fixture(scope="module")
def dataset(path: Path) -> TokenDataset:
    return open_dataset(path, "train")


def equal(a: Batch, b: Batch) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def window_numbers(dataset: TokenDataset, batches: list[Batch]) -> list[int]:
    """Which window each sequence is: windows are looked up by content and document ids, which are unique together."""
    count = (dataset.num_tokens - 1) // LENGTH
    table: dict[bytes, list[int]] = {}
    for number in range(count):
        key = dataset.read(number * LENGTH, LENGTH).tobytes() + dataset.document_ids(number * LENGTH, LENGTH).tobytes()
        table.setdefault(key, []).append(number)
    found = []
    for batch in batches:
        for ids, documents in zip(batch.input_ids, batch.document_ids, strict=True):
            choices = table[ids.tobytes() + documents.tobytes()]
            found.append(choices[0])
            choices.append(choices.pop(0))  # equal windows of one document take turns
    return found


def test_an_epoch_shows_every_window_once_and_the_next_in_another_order(dataset: TokenDataset) -> None:
    sampler = Sampler(dataset, LENGTH, 1, seed=3)
    first = window_numbers(dataset, [sampler.batch(step) for step in range(sampler.num_windows)])
    second = window_numbers(
        dataset, [sampler.batch(step) for step in range(sampler.num_windows, 2 * sampler.num_windows)]
    )
    assert sorted(first) == sorted(second) == list(range(sampler.num_windows))
    assert first != second
    assert first != sorted(first)


def test_labels_are_the_next_tokens_and_ids_are_those_of_the_stream(dataset: TokenDataset) -> None:
    sampler = Sampler(dataset, LENGTH, 5, seed=0)
    for number in range(0, sampler.num_windows, 11):
        batch = sampler.windows([number])
        start = number * LENGTH
        assert np.array_equal(batch.input_ids[0], dataset.read(start, LENGTH))
        assert np.array_equal(batch.labels[0], dataset.read(start + 1, LENGTH))
        assert np.array_equal(batch.document_ids[0], dataset.document_ids(start, LENGTH))
        assert [field.dtype for field in batch] == [np.int64] * 3
    batch = sampler.batch(2)
    assert [field.shape for field in batch] == [(5, LENGTH)] * 3


def test_a_batch_depends_on_seed_and_step_alone(dataset: TokenDataset, path: Path) -> None:
    sampler = Sampler(dataset, LENGTH, 4, seed=11)
    steps = [0, 3, sampler.num_windows // 4, sampler.num_windows, 5 * sampler.num_windows + 1]
    forward = [sampler.batch(step) for step in steps]
    again = {step: sampler.batch(step) for step in reversed(steps)}
    fresh = [Sampler(open_dataset(path, "train"), LENGTH, 4, seed=11).batch(step) for step in steps]
    assert all(equal(a, again[step]) for a, step in zip(forward, steps, strict=True))
    assert all(equal(a, b) for a, b in zip(forward, fresh, strict=True))
    other = Sampler(dataset, LENGTH, 4, seed=12)
    assert not any(equal(a, other.batch(step)) for a, step in zip(forward, steps, strict=True))

    program = (
        "import sys; from moekit.data import Sampler, open_dataset; import numpy as np\n"
        "sampler = Sampler(open_dataset(sys.argv[1], 'train'), 7, 4, seed=11)\n"
        "print([sampler.batch(int(step)).input_ids.tolist() for step in sys.argv[2:]])"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, str(path), *map(str, steps)], capture_output=True, text=True, check=True
    )
    assert json.loads(run.stdout) == [batch.input_ids.tolist() for batch in forward]


def test_one_batch_is_the_concatenation_of_smaller_ones_across_epochs(dataset: TokenDataset) -> None:
    one = Sampler(dataset, LENGTH, 1, seed=5)
    size = 2 * one.num_windows + 3
    large = Sampler(dataset, LENGTH, size, seed=5).batch(0)
    singles = [one.batch(step) for step in range(size)]
    assert np.array_equal(large.input_ids, np.concatenate([batch.input_ids for batch in singles]))


def test_the_order_of_an_epoch_is_pinned(dataset: TokenDataset) -> None:
    # If this changes, a resumed run sees other data than the run that it resumes.
    sampler = Sampler(dataset, (dataset.num_tokens - 1) // 6, 6, seed=1)
    assert equal(sampler.batch(2), sampler.windows([4, 2, 0, 1, 5, 3]))


def test_too_few_tokens_are_an_error_with_the_numbers(dataset: TokenDataset) -> None:
    fits = dataset.num_tokens - 1
    assert Sampler(dataset, fits, 1, 0).num_windows == 1
    with pytest.raises(DataError, match=rf"split train has {fits + 1} tokens.*sequence_length \+ 1 = {fits + 2}"):
        Sampler(dataset, fits + 1, 1, 0)


@pytest.mark.parametrize("batch_size", [1, 3, 1000])
@pytest.mark.parametrize("limit", [1, 20, 10**9])
def test_validation_predicts_each_token_but_the_first_once_in_order(path: Path, batch_size: int, limit: int) -> None:
    dataset = open_dataset(path, "valid")
    for domain in dataset.domains:
        start, stop = dataset.domain_range(domain)
        stream = dataset.read(start, stop - start)
        batches = list(validation_windows(dataset, domain, LENGTH, limit, batch_size))
        labels = np.concatenate([batch.labels.ravel() for batch in batches])
        inputs = np.concatenate([batch.input_ids.ravel() for batch in batches])
        documents = np.concatenate([batch.document_ids.ravel() for batch in batches])
        real = labels != IGNORE
        count = min(limit, len(stream) - 1)
        assert np.array_equal(labels[real], stream[1 : count + 1])
        assert np.array_equal(inputs[real], stream[:count])
        assert np.array_equal(documents[real], dataset.document_ids(start, count))
        assert real[:count].all()
        assert (inputs[~real] == dataset.eos_id).all()
        assert (documents[~real] == -1).all()
        assert len(labels) - count < LENGTH
        assert all(batch.input_ids.shape == (batch_size, LENGTH) for batch in batches[:-1])


def test_validation_of_a_domain_without_text_yields_nothing_and_of_an_unknown_one_raises(
    path: Path, tmp_path: Path
) -> None:
    for name in ("prose", "verse"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "some words"}\n' * 9)
    files = sorted(tmp_path.glob("*.jsonl"))
    prepare(files, tmp_path / "d", valid_paths=[path.parent / "prose.jsonl"], vocab_size=257)
    dataset = open_dataset(tmp_path / "d", "valid")
    assert dataset.domains == ["prose", "verse"]
    assert list(validation_windows(dataset, "verse", LENGTH, 99, 2)) == []
    assert len(list(validation_windows(dataset, "prose", LENGTH, 99, 2))) > 0
    with pytest.raises(DataError, match="domain 'poem'"):
        list(validation_windows(dataset, "poem", LENGTH, 99, 2))


@pytest.fixture(scope="module")
def prompted(tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    """Two domains, one token a byte; prompts of 0 to 6 bytes before texts of 1 to 5."""
    folder = tmp_path_factory.mktemp("prompted")
    for split in ("train", "valid"):
        rows = [{"prompt": "pqrstu"[: i % 7], "text": "ABCDE"[: 1 + i % 5], "domain": "xy"[i % 2]} for i in range(60)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    valid = [folder / "valid.jsonl"]
    prepare([folder / "train.jsonl"], folder / "data", valid_paths=valid, vocab_size=257, prompt_field="prompt")
    return open_dataset(folder / "data", "train")


def letters(dataset: TokenDataset, ids: np.ndarray) -> str:
    """The text of tokens, `.` at the end of a document and `_` where nothing is predicted."""
    vocabulary = load_tokenizer(dataset.directory)
    return "".join("_" if i == IGNORE else "." if i == dataset.eos_id else vocabulary.decode([i]) for i in ids)


def test_labels_are_left_out_exactly_at_prompts_and_across_window_borders(prompted: TokenDataset) -> None:
    sampler = Sampler(prompted, LENGTH, 1, seed=0)
    batch = sampler.windows(list(range(sampler.num_windows)))
    inputs, labels = letters(prompted, batch.input_ids.ravel()), letters(prompted, batch.labels.ravel())
    followed = letters(prompted, prompted.read(1, len(labels)))
    assert labels == re.sub("[pqrstu]", "_", followed)
    assert inputs[1:] == followed[:-1]
    assert 0.3 < labels.count("_") / len(labels) < 0.6


def test_windows_of_whole_documents_cut_none_and_show_each_once(prompted: TokenDataset) -> None:
    sampler = Sampler(prompted, 20, 1, seed=0, packing="documents")
    batch = sampler.windows(list(range(sampler.num_windows)))
    stream = letters(prompted, prompted.read(0, prompted.num_tokens))
    rows = []
    for inputs, labels, documents in zip(*batch, strict=True):
        count = int((documents >= 0).sum())
        row = letters(prompted, inputs[:count]) + "."
        assert letters(prompted, labels[:count]) == re.sub("[pqrstu]", "_", row[1:])
        assert (labels[count:] == IGNORE).all()
        assert (inputs[count:] == prompted.eos_id).all()
        rows.append(row)
    assert "".join(rows) == stream
    following = [row.index(".") + 1 for row in rows[1:]]
    assert all(len(row) + more > 21 for row, more in zip(rows, following, strict=False)), "there was room for another"


def test_documents_that_no_window_holds_are_an_error_that_says_how_long_they_are(prompted: TokenDataset) -> None:
    lengths = [len(one) for one in re.findall("[^.]*[.]", letters(prompted, prompted.read(0, prompted.num_tokens)))]
    longest = lengths.index(max(lengths))
    more = sum(length > 9 for length in lengths)
    said = f"{more} of the {len(lengths)} .* longer than a window's 9 .*; document {longest} has {lengths[longest]}"
    with pytest.raises(DataError, match=f"{said}: raise data.sequence_length to {lengths[longest] - 1}"):
        Sampler(prompted, 8, 1, seed=0, packing="documents")
    Sampler(prompted, lengths[longest] - 1, 1, seed=0, packing="documents")


@pytest.mark.parametrize("packing", ["stream", "documents"])
def test_validation_predicts_each_answer_token_of_a_domain_once(prompted: TokenDataset, packing: Packing) -> None:
    for domain in "xy":
        start, stop = prompted.domain_range(domain)
        answers = re.sub("[pqrstu]", "", letters(prompted, prompted.read(start, stop - start)))
        batches = list(validation_windows(prompted, domain, 20, 10**6, 3, packing))
        found = "".join(letters(prompted, row[row != IGNORE]) for batch in batches for row in batch.labels)
        missed = sum(not prompted.is_prompt(first, 1)[0] for first in _firsts(prompted, batches, packing, start))
        assert len(found) == len(answers) - missed
        assert packing == "documents" or found == answers[missed:]
        limited = list(validation_windows(prompted, domain, 20, 30, 3, packing))
        assert 30 <= sum((batch.document_ids >= 0).sum() + (packing == "documents") for batch in limited) <= 50


def _firsts(dataset: TokenDataset, batches: list[Batch], packing: Packing, start: int) -> list[int]:
    """The positions that no window predicts: the first of the domain, or of each window of whole documents."""
    counts = [int((row >= 0).sum()) + 1 for batch in batches for row in batch.document_ids]
    return [start] if packing == "stream" else [start + sum(counts[:window]) for window in range(len(counts))]
