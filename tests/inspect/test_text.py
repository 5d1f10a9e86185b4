"""Windows: every token of the text once, in order, by domain, with one end-of-text a document."""

import json
from pathlib import Path

import numpy as np
import pytest

from moekit.data import open_dataset
from moekit.errors import CheckpointError
from moekit.formats.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from moekit.inspect import text as module
from moekit.inspect.text import Window, dataset_windows, rows, text_windows

from .conftest import DOMAINS


@pytest.fixture
def tokenizer(text: Path) -> Tokenizer:
    return load_tokenizer(text / "data")


def joined(windows: list[Window]) -> dict[str, list[int]]:
    """Returns the tokens of each domain in order, after checks of the numbers."""
    found: dict[str, list[int]] = {}
    numbers: dict[str, int] = {}
    for window in windows:
        assert window.number == numbers.get(window.domain, 0)
        numbers[window.domain] = window.number + 1
        found.setdefault(window.domain, []).extend(window.tokens.tolist())
    return found


@pytest.mark.parametrize("piece", [1, 5000, 1 << 18])
def test_windows_hold_every_document_and_its_end_once(
    text: Path, tokenizer: Tokenizer, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PIECE", piece)
    files = [text / f"{domain}.jsonl" for domain in DOMAINS]
    windows = list(text_windows(files, tokenizer, 100, 10**9))
    expected = {}
    for file in files:
        texts = [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]
        expected[file.stem] = [number for one in texts for number in [*tokenizer.encode(one), tokenizer.eos_id]]
    assert joined(windows) == expected
    short = [window for window in windows if len(window.tokens) != 100]
    assert len(short) <= 2
    assert all(0 < len(window.tokens) < 100 for window in short)


def test_each_domain_has_at_most_the_limit_even_from_one_file(tmp_path: Path, tokenizer: Tokenizer) -> None:
    lines = [{"text": f"number {n} " * 9, "domain": "abc"[n % 3]} for n in range(60)]
    file = tmp_path / "mixed.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    full = joined(list(text_windows([file], tokenizer, 16, 10**9)))
    cut = joined(list(text_windows([file], tokenizer, 16, 100)))
    assert cut == {domain: tokens[:100] for domain, tokens in full.items()}


def test_a_file_of_no_more_use_is_left(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 5)
    monkeypatch.setattr(module, "PIECE", 20)
    file = tmp_path / "a.jsonl"
    good = "".join(json.dumps({"text": "one two three four"}) + "\n" for _ in range(10))
    file.write_text(good + "broken\n")
    (windows,) = text_windows([file], tokenizer, 64, 8)
    assert len(windows.tokens) == 8


def test_a_dataset_gives_its_domains_in_windows(text: Path) -> None:
    dataset = open_dataset(text / "data", "train")
    seen: list[tuple[int, int]] = []
    windows = list(dataset_windows(dataset, 50, 400, lambda phase, done, total: seen.append((done, total))))
    expected = {}
    for domain in dataset.domains:
        start, stop = dataset.domain_range(domain)
        expected[domain] = dataset.read(start, min(400, stop - start)).tolist()
    assert joined(windows) == expected
    assert seen[-1][0] == seen[-1][1]


def test_rows_are_padded_on_the_right_and_full_ones_have_no_mask() -> None:
    windows = [Window("a", n, np.arange(1, length + 1)) for n, length in enumerate((3, 3, 1, 2))]
    full, padded = rows(windows, 2, 10)
    assert full.real is None
    assert padded.input_ids.tolist() == [[1, 0], [1, 2]]
    assert padded.real is not None
    assert padded.real.tolist() == [[True, False], [True, True]]
    with pytest.raises(CheckpointError, match=r"the id 3 but the model's vocab_size is 3"):
        list(rows(windows, 2, 3))


def test_a_plain_text_file_is_read_to_its_end_with_progress(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("It was the best of times. " * 100)
    tokenizer = train_tokenizer(["It was the best of times."], 300)
    told: list[tuple[str, int, int]] = []
    windows = list(text_windows([tmp_path / "book.txt"], tokenizer, 16, 64, progress=lambda *seen: told.append(seen)))
    assert sum(len(window.tokens) for window in windows) == 64
    assert told[-1] == ("inspect", 2600, 2600)
