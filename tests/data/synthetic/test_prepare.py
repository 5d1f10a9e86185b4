"""A dataset of a synthetic task: the text that was drawn, byte by byte, and the questions beside it."""

from pathlib import Path

import numpy as np
import pytest

from moekit.data import Sampler, open_dataset
from moekit.data.sampler import IGNORE
from moekit.data.synthetic import TASKS, prepare_synthetic, read_questions
from moekit.errors import ConfigError, DataError
from moekit.formats.tokenizer import load_tokenizer


@pytest.mark.parametrize("task", TASKS)
def test_what_is_trained_on_is_what_was_drawn_and_only_answers_are_learned(task: str, tmp_path: Path) -> None:
    prepare_synthetic(task, tmp_path / "data", examples=12, questions=6, seed=5)
    examples, questions = TASKS[task].draw(5, 12, 6)
    assert read_questions(tmp_path / "data" / "synthetic" / "questions.jsonl") == questions
    dataset, tokenizer = open_dataset(tmp_path / "data", "train"), load_tokenizer(tmp_path / "data")
    assert dataset.vocab_size == 257
    sampler = Sampler(dataset, 160, 1, seed=0, packing="documents")
    batch = sampler.windows(list(range(sampler.num_windows)))
    learned = batch.labels[batch.labels != IGNORE]
    assert tokenizer.decode(learned).split("<|endoftext|>") == [*(example.text for example in examples), ""]
    read = dataset.read(0, dataset.num_tokens)
    assert len(read) == sum(len(example.prompt + example.text) + 1 for example in examples)
    whole = "".join(example.prompt + example.text + "<|endoftext|>" for example in examples)
    assert tokenizer.decode(read) == whole


def test_16_entries_of_a_phone_book_fill_256_tokens(tmp_path: Path) -> None:
    prepare_synthetic("phone-book", tmp_path / "data", examples=64, questions=1)
    dataset = open_dataset(tmp_path / "data", "train")
    assert np.array_equal(np.unique(dataset.document_ids(0, 256)), np.arange(16))
    assert dataset.num_tokens == 4 * 256


def test_the_same_call_again_changes_nothing_and_another_one_is_an_error(tmp_path: Path) -> None:
    out = tmp_path / "data"
    first = prepare_synthetic("phone-book", out, examples=20, questions=5)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert prepare_synthetic("phone-book", out, examples=20, questions=5) == first
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    with pytest.raises(DataError, match="holds other examples"):
        prepare_synthetic("phone-book", out, examples=20, questions=5, seed=1)


def test_a_run_that_was_killed_after_its_text_goes_on(tmp_path: Path) -> None:
    whole = prepare_synthetic("phone-book", tmp_path / "data", examples=20, questions=5)
    half = tmp_path / "half" / "synthetic"
    half.mkdir(parents=True)
    (half / "examples.jsonl").write_bytes((tmp_path / "data" / "synthetic" / "examples.jsonl").read_bytes())
    assert prepare_synthetic("phone-book", half.parent, examples=20, questions=5)["splits"] == whole["splits"]


def test_an_unknown_task_and_a_folder_of_something_else_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean phone-book"):
        prepare_synthetic("phonebook", tmp_path / "data")
    (tmp_path / "letters.txt").write_text("mine")
    with pytest.raises(DataError, match=r"holds something else \(letters.txt\)"):
        prepare_synthetic("phone-book", tmp_path, examples=20, questions=5)
    assert [path.name for path in tmp_path.iterdir()] == ["letters.txt"]
