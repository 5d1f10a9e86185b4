"""The files of the benchmarks, in the form in which they are published, read into lm-evaluation-harness's data sets.

A task file names one of these functions and its files; `task_data` is the folders that hold them.
"""

import bz2
import csv
import gzip
import io
import json
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from moekit.errors import ConfigError, DataError

Item = dict[str, Any]
IDIOM = "#idiom#"


def find(task_data: Sequence[str], name: str) -> Path:
    """Returns the file of that name in the first folder that has it."""
    for folder in task_data:
        if (file := Path(folder) / name).is_file():
            return file
    if not task_data:
        raise ConfigError(f"--task-data is missing: the folder that holds {name}")
    raise DataError(f"{name} is not in {', '.join(map(str, task_data))}; --task-data names the folders of task files")


def splits(**items: Iterable[Item]) -> dict[str, Dataset]:
    """Returns data sets by split; those without an item are left out."""
    lists = {split: list(found) for split, found in items.items()}
    return {split: Dataset.from_list(found) for split, found in lists.items() if found}


def records(task_data: Sequence[str], files: dict[str, str], held_out: int = 0, **_: Any) -> dict[str, Dataset]:
    """Returns JSON lines by split; the first `held_out` items of the test split are its examples instead ("train")."""
    read = {split: _lines(find(task_data, name)) for split, name in files.items()}
    if held_out:
        read = {**read, "train": read["test"][:held_out], "test": read["test"][held_out:]}
    return splits(**read)


def hellaswag(task_data: Sequence[str], files: dict[str, str], **_: Any) -> dict[str, Dataset]:
    """Returns items of six lines each: the context, the right ending's number, four endings."""
    file = find(task_data, files["test"])
    lines = _read(file).splitlines()
    if len(lines) % 6 or not all(label in tuple("0123") for label in lines[1::6]):
        raise DataError(f"{file} is not made of six lines an item: context, label, four endings")
    groups = (lines[start : start + 6] for start in range(0, len(lines), 6))
    return splits(test=({"context": one[0], "label": int(one[1]), "endings": one[2:]} for one in groups))


def piqa(task_data: Sequence[str], files: dict[str, str], **_: Any) -> dict[str, Dataset]:
    """Returns the items, with their labels from the file beside them."""
    items, labels = _lines(find(task_data, files["test"])), _read(find(task_data, files["labels"])).split()
    if len(items) != len(labels):
        raise DataError(f"{files['test']} has {len(items)} items but {files['labels']} has {len(labels)} labels")
    return splits(test=({**item, "label": int(label)} for item, label in zip(items, labels, strict=True)))


def winogrande(task_data: Sequence[str], files: dict[str, str], **_: Any) -> dict[str, Dataset]:
    """Returns items of which the sentence is cut at its blank: each choice makes a context, the rest is scored."""

    def cut(item: Item) -> Item:
        before, _blank, after = item["question"].partition("_")
        return {"contexts": [before + choice for choice in item["choices"]], "rest": after, "label": item["label"]}

    return splits(test=map(cut, _lines(find(task_data, files["test"]))))


def chid(task_data: Sequence[str], files: dict[str, str], **_: Any) -> dict[str, Dataset]:
    """Returns items of whole texts, one for each idiom in the blank."""

    def fill(item: Item) -> Item:
        texts = [item["content"].replace(IDIOM, idiom) for idiom in item["candidates"]]
        return {"texts": texts, "label": int(item["answer"])}

    return splits(test=map(fill, _lines(find(task_data, files["test"]))))


def cluewsc(task_data: Sequence[str], files: dict[str, str], **_: Any) -> dict[str, Dataset]:
    """Returns the items whose pronoun does mean the noun that is given: what it means can be asked for."""

    def told(split: str) -> list[Item]:
        items = (item for item in _lines(find(task_data, files[split])) if item["label"] == "true")
        spans = ({"text": item["text"], **item["target"]} for item in items)
        return [{"text": one["text"], "pronoun": one["span2_text"], "noun": one["span1_text"]} for one in spans]

    return splits(**{split: told(split) for split in files})


def subjects(task_data: Sequence[str], files: dict[str, str], header: bool, **_: Any) -> dict[str, Dataset]:
    """Returns the questions of a zip of SPLIT/SUBJECT.csv (or SUBJECT_SPLIT.csv): question, A to D, the answer.

    With `header` the first line is one, and the first column a number.
    """
    read: dict[str, list[Item]] = {"dev": [], "test": []}
    for name, text in _members(find(task_data, files["archive"]), ".csv"):
        split, subject = Path(name).parent.name, Path(name).stem
        if split not in read:
            continue
        for number, row in enumerate(csv.reader(io.StringIO(text))):
            question, *choices, answer = row[header:]
            if number == 0 and header:
                continue
            if len(choices) != 4 or answer not in tuple("ABCD"):
                raise DataError(f"{files['archive']}: {name}:{number + 1}: not a question, four choices and a letter")
            item = {"question": question, "choices": choices, "answer": "ABCD".index(answer)}
            read[split].append({"subject": subject.removesuffix(f"_{split}"), **item})
    return splits(**read)


def bbh(task_data: Sequence[str], files: dict[str, str], **_: Any) -> dict[str, Dataset]:
    """Returns the items of a zip of bbh/TASK.json, each with the worked examples of cot-prompts/TASK.txt."""
    archive = find(task_data, files["archive"])
    prompts = {Path(name).stem: text.partition("-----\n")[2].strip() for name, text in _members(archive, ".txt")}
    items = [
        {"subject": Path(name).stem, "prompt": prompts[Path(name).stem], "input": one["input"], "target": one["target"]}
        for name, text in _members(archive, ".json")
        for one in json.loads(text)["examples"]
    ]
    return splits(test=items)


def mbpp(task_data: Sequence[str], files: dict[str, str], **_: Any) -> dict[str, Dataset]:
    """Returns problems 2, 3 and 4 as examples and 11 to 510 as the test, as the data set's authors use them."""
    items = {item["task_id"]: item for item in _lines(find(task_data, files["test"]))}
    chosen = {"train": range(2, 5), "test": range(11, 511)}
    return splits(**{split: [items[n] for n in numbers if n in items] for split, numbers in chosen.items()})


def _read(file: Path) -> str:
    openers: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open}
    try:
        with openers.get(file.suffix, lambda path: path.open("rb"))(file) as stream:
            return str(stream.read().decode("utf-8"))
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read: {error}") from None


def _lines(file: Path) -> list[Item]:
    try:
        return [json.loads(line) for line in _read(file).split("\n") if line.strip()]
    except ValueError as error:
        raise DataError(f"{file} is not one JSON object a line: {error}") from None


def _members(archive: Path, suffix: str) -> list[tuple[str, str]]:
    """Returns name and text of the files of a zip that end so, sorted by name."""
    try:
        with zipfile.ZipFile(archive) as opened:
            names = sorted(name for name in opened.namelist() if name.endswith(suffix))
            return [(name, opened.read(name).decode("utf-8-sig")) for name in names]
    except (zipfile.BadZipFile, UnicodeDecodeError) as error:
        raise DataError(f"{archive} cannot be read: {error}") from None
