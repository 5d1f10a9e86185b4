"""A small vocabulary, documents of every awkward length, a model that speaks it, and a file for every task."""

import bz2
import csv
import gzip
import io
import json
import os
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from moekit.config import ModelConfig
from moekit.data.text import Document
from moekit.formats.tokenizer import Tokenizer, train_tokenizer
from moekit.nn.model import Model

os.environ["TOKENIZERS_PARALLELISM"] = "false"
ENGLISH = "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of folly. "
CHINESE = "床前明月光，疑是地上霜。举头望明月，低头思故乡。"  # noqa: RUF001
DOCUMENTS = [
    Document(ENGLISH * 5, "long", "long:1"),  # far longer than the model's context
    Document("x", "short", "short:1"),
    Document(ENGLISH, "short", "short:2"),
    Document("naïve 🙂", "short", "short:3"),
    *(Document(CHINESE[:cut], "zh", f"zh:{cut}") for cut in range(3, 24, 4)),
    Document(ENGLISH[:40], "long", "long:2"),
]

WORDS = ["age", "best", "times", "wisdom", "folly", "worst", "season", "light", "hope", "spring"]


@pytest.fixture(scope="session")
def documents() -> list[Document]:
    return DOCUMENTS


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer([ENGLISH, "The 3 apples cost 12 dollars.\n"], 300)


@pytest.fixture(scope="session")
def model(tokenizer: Tokenizer, tiny_config: Callable[..., ModelConfig]) -> Model:
    """Untrained, with large weights: its probabilities are far from equal."""
    torch.manual_seed(1)
    sizes: dict[str, Any] = {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": 48}
    return Model(tiny_config(**sizes)).eval()


@pytest.fixture(scope="session")
def task_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file for every task, in the form in which it is published, a few items each."""
    folder = tmp_path_factory.mktemp("tasks")
    for name in ("arc_easy", "arc_challenge", "social_i_qa"):
        _lines(folder / f"{name}.jsonl", (_question(n, 3 + n % 2) for n in range(6)))
    _lines(folder / "boolq.jsonl", ({**_question(n, 2), "choices": ["true", "false"]} for n in range(6)))
    blanks = ({**_question(n, 2), "question": f"The {WORDS[n]} was _ and old."} for n in range(6))
    _lines(folder / "winogrande.jsonl", blanks)
    _lines(folder / "piqa_valid.jsonl", ({"goal": WORDS[n], "sol1": "wait", "sol2": "go on"} for n in range(6)))
    (folder / "piqa_valid-labels.lst").write_text("0\n1\n1\n0\n1\n0\n")
    six = ("\n".join((f"Season: it was the {WORDS[n]}", str(n % 4), "of a", "of b", "of c", "of d")) for n in range(6))
    (folder / "hellaswag_val_full.txt.bz2").write_bytes(bz2.compress("\n".join(six).encode()))
    sums = [{"question": f"What is {n} + {n}?", "answer": f"{n} + {n} = {2 * n}\n#### {2 * n}"} for n in range(10)]
    _lines(folder / "gsm8k_test.jsonl", sums[:5])
    (folder / "gsm8k_train.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, sums)).encode()))
    _lines(folder / "NQ-open.dev.jsonl", ({"question": f"who wrote {n}", "answer": [f"{n}", "x"]} for n in range(9)))
    idioms = {"candidates": ["画蛇添足", "雪中送炭"], "content": "有时候我给你#idiom#。"}
    _lines(folder / "fewclue_chid_test_public.jsonl", ({"id": n, **idioms, "answer": n % 2} for n in range(4)))
    spans = {"span1_text": "毛豆", "span2_text": "他", "span1_index": 0, "span2_index": 6}
    for split, count in (("train_few_all", 12), ("test_public", 8)):
        items = ({"target": spans, "idx": n, "label": ("true", "false")[n % 2], "text": f"毛豆{n}生气,他走了。"}
                 for n in range(count))  # fmt: skip
        _lines(folder / f"fewclue_cluewsc_{split}.jsonl", items)
    problem = {
        "entry_point": "two",
        "prompt": 'def two():\n    """Returns 2."""\n',
        "canonical_solution": "    return 2\n",
    }
    problem["test"] = "def check(candidate):\n    assert candidate() == 2\n"
    text = "\n".join(json.dumps({"task_id": f"HumanEval/{n}", **problem}) for n in range(3))
    (folder / "HumanEval.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    _lines(folder / "mbpp.jsonl", map(_program, range(1, 15)))
    splits = (("dev", 5), ("val", 2), ("test", 3))
    for name, header, form in (("mmlu", False, "{0}/{1}_{0}.csv"), ("cmmlu", True, "{0}/{1}.csv")):
        tables = [(form.format(split, subject), _table(subject, count, header))
                  for split, count in splits for subject in ("fine_art", "law")]  # fmt: skip
        _zip(folder / f"{name}.zip", dict(tables))
    examples = "canary string\n-----\nAdd.\n\nQ: 1 + 1\nA: Let's think step by step.\nSo the answer is 2."
    items = {"examples": [{"input": f"{n} + 0", "target": f"{n}"} for n in range(3)]}
    _zip(folder / "bbh.zip", {"bbh/add.json": json.dumps(items), "cot-prompts/add.txt": examples})
    return folder


def _question(number: int, choices: int) -> dict[str, Any]:
    return {"id": number, "question": f"Which {WORDS[number]}?", "choices": WORDS[:choices], "label": number % 2}


def _program(number: int) -> dict[str, Any]:
    code = f"def f{number}():\n    return {number}"
    tests = [f"assert f{number}() == {number}", f"assert f{number}() < 99"]
    return {"text": f"Write f{number}.", "code": code, "task_id": number, "test_setup_code": "", "test_list": tests}


def _table(subject: str, count: int, numbered: bool) -> str:
    text = io.StringIO()
    write = csv.writer(text).writerow
    if numbered:
        write(["", "Question", "A", "B", "C", "D", "Answer"])
    for n in range(count):
        row = [f"What is {subject} {n}?", "one", "two, three", 'a "4"', "5", "ABCD"[n % 4]]
        write([n, *row] if numbered else row)
    return text.getvalue()


def _lines(file: Path, items: Iterable[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items), encoding="utf-8")


def _zip(file: Path, members: dict[str, str]) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
