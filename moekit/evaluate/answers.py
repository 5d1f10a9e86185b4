"""Whether what a model wrote is the answer: one function a task, given the item and the texts, to its metrics."""

import re
import string
from collections.abc import Sequence
from typing import Any

from moekit.evaluate import sandbox

Item = dict[str, Any]
Metrics = dict[str, float]


def gsm8k(item: Item, written: Sequence[str]) -> Metrics:
    """Returns whether the number after #### is the right one; `flexible` takes the last number of the text."""
    text, right = written[0], _number(item["answer"].rpartition("####")[2])
    marked = re.search(r"####\s*(\S+)", text)
    numbers = re.findall(r"-?\$?\d[\d,]*\.?\d*", text)
    return {
        "exact_match": float(marked is not None and _number(marked[1]) == right),
        "flexible": float(bool(numbers) and _number(numbers[-1]) == right),
    }


def nq(item: Item, written: Sequence[str]) -> Metrics:
    """Returns whether the first line is one of the answers, without case, punctuation and articles."""
    said = _plain(_first_line(written[0]))
    return {"exact_match": float(said in {_plain(answer) for answer in item["answer"]})}


def cluewsc(item: Item, written: Sequence[str]) -> Metrics:
    """Returns whether the first line is the noun."""
    return {"exact_match": float(_first_line(written[0]).strip("。 “”\"'") == item["noun"])}


def bbh(item: Item, written: Sequence[str]) -> Metrics:
    """Returns whether what follows "the answer is" is the target."""
    said = written[0].rpartition("the answer is")[2] if "the answer is" in written[0] else ""
    return {"exact_match": float(_first_line(said).strip().removesuffix(".") == item["target"].strip())}


def humaneval(item: Item, written: Sequence[str]) -> Metrics:
    """Returns whether the function passes its tests, in the sandbox."""
    return _pass(f"{item['prompt']}{written[0]}\n{item['test']}\ncheck({item['entry_point']})\n")


def mbpp(item: Item, written: Sequence[str]) -> Metrics:
    """Returns whether the program passes its tests, in the sandbox."""
    return _pass("\n".join([written[0], item["test_setup_code"], *item["test_list"]]) + "\n")


def _pass(program: str) -> Metrics:
    return {"pass@1": float(sandbox.run(program).passed)}


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0].strip()


def _number(text: str) -> str:
    """Returns a number without what does not change it: 1,234. is 1234 and $5.0 is 5."""
    plain = text.strip().strip("$").replace(",", "").rstrip(".")
    return re.sub(r"\.0+$", "", plain)


def _plain(text: str) -> str:
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())
