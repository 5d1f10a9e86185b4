"""Files of labelled sentences: every format, odd files, and one line for each mistake."""

import gzip
from pathlib import Path
from typing import Any

import pytest

from moekit.config import SentencesObjective
from moekit.data.sentences import Example, examples, files, layout
from moekit.errors import ConfigError, DataError

GLUE: dict[str, dict[str, bytes]] = {
    "sst2": {"train.tsv": b'sentence\tlabel\na "quoted film \t1\nb\t0\n', "dev.tsv": b"sentence\tlabel\nc\t0\n"},
    "cola": {"train.tsv": b"gj\t1\t\tThey sail.\nks\t0\t*\tSail they.\n", "dev.tsv": b"gj\t1\t\tc\n"},
    "rte": {
        "train.tsv": b"index\tsentence1\tsentence2\tlabel\n0\ta\tb\tnot_entailment\n1\tc\td\tentailment\n",
        "dev.tsv": b"index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n",
    },
    "mrpc": {
        "train.tsv": b'\xef\xbb\xbfQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t7\t8\tSaid "a\tb"\r\n',
        "dev.tsv": b"Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n0\t7\t8\ta\tb\n",
    },
    "stsb": {
        "train.tsv": b"index\tgenre\tsentence1\tsentence2\tscore\n0\tmain\ta\tb\t2.5\n",
        "dev.tsv": b"index\tgenre\tsentence1\tsentence2\tscore\n0\tmain\ta\tb\t5.0\n",
    },
}
FIRST = {
    "sst2": Example('a "quoted film ', None, 1),
    "cola": Example("They sail.", None, 1),
    "rte": Example("a", "b", 1),
    "mrpc": Example('Said "a', 'b"', 1),
    "stsb": Example("a", "b", 2.5),
}


def folder(path: Path, content: dict[str, bytes]) -> Path:
    path.mkdir(exist_ok=True)
    for name, data in content.items():
        (path / name).write_bytes(data)
    return path


def read(path: Path, split: str = "train", **settings: Any) -> list[Example]:
    place, how = layout(SentencesObjective(**settings), path)
    return [example for file in files(place, getattr(how, split)) for example in examples(file, how)]


@pytest.mark.parametrize("task", GLUE)
def test_glues_own_files_are_read(tmp_path: Path, task: str) -> None:
    path = folder(tmp_path, GLUE[task])
    assert read(path, task=task)[0] == FIRST[task]
    assert len(read(path, "valid", task=task)) == 1


def test_files_as_their_authors_publish_them_are_read_too(tmp_path: Path) -> None:
    rows = b"gj\t1\t\tThey sail.\n"
    names = ("in_domain_train.tsv", "in_domain_dev.tsv", "out_of_domain_dev.tsv")
    cola = folder(tmp_path / "cola", dict.fromkeys(names, rows))
    assert read(cola, task="cola") == [FIRST["cola"]]
    assert len(read(cola, "valid", task="cola")) == 2
    csv = {f"stsb-en-{split}.csv": b'"Men, and ""boys""",b,2.5\r\nc,d,0\r\n' for split in ("train", "dev")}
    stsb = folder(tmp_path / "stsb", csv)
    assert read(stsb, task="stsb") == [Example('Men, and "boys"', "b", 2.5), Example("c", "d", 0)]
    alone = tmp_path / "alone.csv"
    alone.write_bytes(b"a,b,1\n")
    assert read(alone, task="stsb") == [Example("a", "b", 1)]


def test_any_other_file_is_described_by_settings(tmp_path: Path) -> None:
    (tmp_path / "train.tsv.gz").write_bytes(gzip.compress("text\tlabel\tmore\nnaïve\tyes\t\n\nb\tno\t1\n".encode()))
    assert read(tmp_path, labels=["no", "yes"]) == [Example("naïve", None, 1), Example("b", None, 0)]
    (tmp_path / "plain.csv").write_text("1.5;x,a\n")
    settings: dict[str, Any] = {
        "text": "2",
        "label": "1",
        "header": False,
        "separator": "comma",
        "labels": ["1.5;x", "b"],
    }
    assert read(tmp_path / "plain.csv", **settings) == [Example("a", None, 0)]
    assert layout(SentencesObjective(labels=()), tmp_path)[1].metrics == ("pearson", "spearman")


BAD: dict[str, tuple[bytes, str]] = {
    "no column": (b"text\tlabl\na\t1\n", r"train.tsv has no column 'label' \(did you mean labl\?\), objective.label"),
    "wrong label": (b"text\tlabel\na\t1\nb\t2\n", "train.tsv:3: the label is '2' but must be one of 0, 1"),
    "few columns": (b"text\tlabel\na\n", "train.tsv:2: 1 columns but 2 are needed"),
    "empty": (b"", "train.tsv has no column 'text', objective.text; its first line names none"),
    "header alone": (b"text\tlabel\n", "train.tsv has no example"),
    "not text": (b"text\tlabel\n\xff\t1\n", "train.tsv:1: .*utf-8"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_is_none_is_one_line(tmp_path: Path, name: str) -> None:
    content, message = BAD[name]
    with pytest.raises(DataError, match=message):
        read(folder(tmp_path, {"train.tsv": content}), labels=["0", "1"])


def test_other_mistakes_are_one_line(tmp_path: Path) -> None:
    path = folder(
        tmp_path, {"train.tsv": b"text\tlabel\na\tx\n", "cut.tsv.gz": gzip.compress(b"text\tlabel\n" * 9)[:-9]}
    )
    data = {
        "the label is 'x' but must be a number": {"labels": []},
        "dev.tsv does not exist; objective.train and .valid name files": {"labels": ["x", "y"], "split": "valid"},
        "cut.tsv.gz:": {"labels": ["x", "y"], "train": ["cut.tsv"]},
    }
    for message, told in data.items():
        with pytest.raises(DataError, match=message):
            read(path, **told)
    config = {
        "objective.labels is missing": {},
        "objective.metrics has f1 but there are 3 labels": {"labels": ["x", "y", "z"], "metrics": ["f1"]},
        "objective.metrics has accuracy, which is of labels": {"labels": [], "metrics": ["accuracy"]},
        "objective.metrics has pearson, which is of numbers": {"labels": ["x", "y"], "metrics": ["pearson"]},
        "objective.labels is .*; give two or more that differ": {"labels": ["x", "x"]},
        "objective.text is 'text' but without header": {"labels": ["x", "y"], "header": False},
    }
    for message, told in config.items():
        with pytest.raises(ConfigError, match=message):
            read(path, **told)
    with pytest.raises(DataError, match=r"nowhere does not exist; data.path is a folder"):
        read(tmp_path / "nowhere", labels=["x", "y"])
    with pytest.raises(ConfigError, match=r"objective.train is given but data.path is a file"):
        read(path / "train.tsv", labels=["x", "y"], train=["other.tsv"])
