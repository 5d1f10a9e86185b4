"""Every task reads its published files, asks with the shots that it states, and scores the same in any batch."""

import re
from pathlib import Path
from typing import Any

import pytest

from moekit.errors import ConfigError, DataError
from moekit.formats.tokenizer import Tokenizer
from moekit.nn.model import Model

pytest.importorskip("lm_eval")

from moekit.evaluate import answers, sandbox
from moekit.evaluate.benchmarks import load_tasks, names, run_tasks
from moekit.evaluate.harness import MoekitLM

SHOTS = {"gsm8k": 8, "mbpp": 3, "nq": 5, "mmlu": 5, "cluewsc": 5, "cmmlu": 5, "bbh": 3}
"""The results of DeepSeekMoE (arXiv 2401.06066) state them; 0 for the others."""
ITEMS = {
    "gsm8k": 5, "nq": 4, "mbpp": 4, "mmlu": 6, "cmmlu": 6, "cluewsc": 4, "chid": 4, "humaneval": 3, "bbh": 3
}  # fmt: skip
ONE_SHOT = {
    "gsm8k": r"Answer: \d \+ \d = \d+\n#### \d+\n\n",
    "mbpp": r"Write f[234]\.[^[]*\[BEGIN\]\ndef f\d\(\):\n    return \d\n\[DONE\]\n\n",
    "nq": r"Question: who wrote \d\?\nAnswer: \d\n\n",
    "mmlu": r"What is fine_art \d\?\nA. one\nB. two, three\nC. a \"4\"\nD. 5\nAnswer: [ABCD]\n\n",
    "cmmlu": r"题目：What is fine_art \d\?\nA. one\nB. two, three\nC. a \"4\"\nD. 5\n答案是：[ABCD]\n\n",  # noqa: RUF001
    "cluewsc": "毛豆\\d+生气,他走了。\n上面的句子中的“他”指的是\n毛豆\n\n",
}


@pytest.fixture(scope="module")
def found(model: Model, tokenizer: Tokenizer, task_data: Path) -> dict[str, dict[str, Any]]:
    """All tasks, one item at a time."""
    tasks = load_tasks(names(), [task_data], allow_code_execution=True)
    return run_tasks(MoekitLM(model, tokenizer, 1), tasks)


@pytest.mark.parametrize("name", names())
def test_every_task_has_the_paper_s_shots_and_all_its_items(name: str, found: dict[str, dict[str, Any]]) -> None:
    task = found[name]
    assert task["shots"] == SHOTS.get(name, 0)
    assert task["n"] == ITEMS.get(name, 6)
    example = task["example"]["prompt"]
    if name in ONE_SHOT:
        assert len(re.findall(ONE_SHOT[name], example)) == task["shots"], example
    else:
        assert task["prompt"].keys() >= {"doc_to_text", "doc_to_target"}
        assert "\n\n" not in example or name == "bbh"
    for metric, value in task["metrics"].items():
        assert 0 <= value["value"] <= 1, metric
        assert value["stderr"] is not None


def test_what_is_scored_is_what_the_paper_scores(found: dict[str, dict[str, Any]]) -> None:
    metrics = {name: [*task["metrics"]] for name, task in found.items()}
    assert {name for name in metrics if metrics[name][0] == "acc"} == {
        "arc_challenge", "arc_easy", "boolq", "chid", "cmmlu", "hellaswag", "mmlu", "piqa", "social_iqa", "winogrande"
    }  # fmt: skip
    assert {name for name in metrics if metrics[name][0] == "exact_match"} == {"bbh", "cluewsc", "gsm8k", "nq"}
    assert {name for name in metrics if metrics[name] == ["pass@1"]} == {"humaneval", "mbpp"}
    assert found["winogrande"]["example"] == {"prompt": "The age was age", "continuation": " and old."}
    assert found["chid"]["example"] == {"prompt": "", "continuation": "有时候我给你画蛇添足。"}
    assert found["hellaswag"]["example"]["continuation"] == " of a"
    assert found["mmlu"]["by_subject"].keys() == {"fine_art", "law"}
    assert found["bbh"]["example"]["prompt"].startswith("Add.\n\nQ: 1 + 1\n")
    assert found["bbh"]["example"]["prompt"].endswith("Q: 0 + 0\nA: Let's think step by step.")


@pytest.mark.parametrize("size", [3, 8])
def test_scores_do_not_depend_on_the_batch_size(
    size: int, found: dict[str, dict[str, Any]], model: Model, tokenizer: Tokenizer, task_data: Path
) -> None:
    tasks = load_tasks(names(), [task_data], allow_code_execution=True)
    again = run_tasks(MoekitLM(model, tokenizer, size), tasks)
    assert again == {name: {**task, "batch_size": size} for name, task in found.items()}


def test_the_examples_of_a_question_are_of_its_subject(model: Model, tokenizer: Tokenizer, task_data: Path) -> None:
    seen: list[str] = []

    class Listening(MoekitLM):
        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            seen.extend(request.args[0] for request in requests)
            return super().loglikelihood(requests, disable_tqdm)

    run_tasks(Listening(model, tokenizer), load_tasks(["mmlu"], [task_data]))
    assert len(seen) == 24
    for prompt in seen:
        assert ("about law.\n\nWhat is law 0" in prompt) == ("fine_art" not in prompt)


def test_a_limit_takes_the_first_items(model: Model, tokenizer: Tokenizer, task_data: Path) -> None:
    found = run_tasks(MoekitLM(model, tokenizer), load_tasks(["piqa"], [task_data]), 2)["piqa"]
    assert (found["n"], found["limit"]) == (2, 2)
    assert found["files"].keys() == {"piqa_valid.jsonl", "piqa_valid-labels.lst"}


def test_a_model_that_knows_the_answers_gets_them_all(model: Model, tokenizer: Tokenizer, task_data: Path) -> None:
    class Knowing(MoekitLM):
        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            return [self.know(request.doc) for request in requests]

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            return [(float(request.idx == request.doc.get("label", request.doc.get("answer"))), True)
                    for request in requests]  # fmt: skip

        def know(self, item: dict[str, Any]) -> str:
            for key in ("canonical_solution", "code", "noun"):
                if key in item:
                    return str(item[key])
            if "target" in item:
                return f" So the answer is {item['target']}."
            return f" {item['answer'][1] if isinstance(item['answer'], list) else item['answer']}\n"

    tasks = load_tasks(names(), [task_data], allow_code_execution=True)
    found = run_tasks(Knowing(model, tokenizer), tasks)
    assert {name: {key: one["value"] for key, one in task["metrics"].items()} for name, task in found.items()} == {
        name: dict.fromkeys(task["metrics"], 1.0) for name, task in found.items()
    }


@pytest.mark.parametrize(
    ("tasks", "folders", "error", "message"),
    [
        (["piqua"], True, ConfigError, r"no task 'piqua' \(did you mean piqa\?\); tasks: arc_challenge, "),
        (["piqa"], False, ConfigError, "--task-data is missing: the folder that holds piqa_valid.jsonl"),
        (["piqa", "mbpp"], True, ConfigError, "mbpp runs what the model writes; --allow-code-execution allows it"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_does(
    tasks: list[str], folders: bool, error: type[Exception], message: str, task_data: Path
) -> None:
    with pytest.raises(error, match=message):
        load_tasks(tasks, [task_data] if folders else [])


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("piqa", "piqa_valid-labels.lst", "0\n1\n", "has 6 items but piqa_valid-labels.lst has 2 labels"),
        ("hellaswag", "hellaswag_val_full.txt.bz2", "no bzip2", "hellaswag_val_full.txt.bz2 cannot be read: "),
        ("arc_easy", "arc_easy.jsonl", "{]", "is not one JSON object a line"),
        ("mmlu", "mmlu.zip", "no zip", "mmlu.zip cannot be read"),
        ("nq", None, "", "NQ-open.dev.jsonl is not in "),
    ],
)
def test_a_file_of_another_form_is_named(
    name: str, file: str | None, content: str, message: str, task_data: Path, tmp_path: Path
) -> None:
    if file is not None:
        (tmp_path / file).write_text(content)
    with pytest.raises(DataError, match=message):
        load_tasks([name], [tmp_path, task_data] if file else [tmp_path])


@pytest.mark.parametrize(
    ("answer", "said", "exact", "flexible"),
    [
        ("2 + 2 = 4\n#### 4", "so 4\n#### 4\n", 1, 1),
        ("#### 1,234", "#### 1234.", 1, 1),
        ("#### 5", "#### $5.00", 1, 1),
        ("#### 5", "It is 5", 0, 1),
        ("#### 5", "#### 5\nQuestion 7", 1, 0),
        ("#### -5", "#### 5", 0, 0),
        ("#### 5", "", 0, 0),
    ],
)
def test_numbers_are_compared_as_numbers(answer: str, said: str, exact: float, flexible: float) -> None:
    assert answers.gsm8k({"answer": answer}, [said]) == {"exact_match": exact, "flexible": flexible}


@pytest.mark.parametrize(("said", "right"), [("The Beatles!", 1), (" beatles\nQuestion", 1), ("Beatles band", 0)])
def test_answers_are_compared_without_articles_and_marks(said: str, right: float) -> None:
    assert answers.nq({"answer": ["x", "the Beatles"]}, [said]) == {"exact_match": right}


@pytest.mark.parametrize(
    ("said", "right"),
    [
        (" So the answer is (B).", 1),
        ("the answer is (A). No, the answer is (B)", 1),
        ("(B)", 0),
        ("the answer is B.", 0),
    ],
)
def test_the_answer_of_a_chain_of_thought_is_its_last(said: str, right: float) -> None:
    assert answers.bbh({"target": "(B)"}, [said]) == {"exact_match": right}


@pytest.mark.parametrize(
    ("written", "right"),
    [
        ("    return 2\n", 1),
        ("    return 3\n", 0),
        ("    exit = __import__('sys').exit(0)\n", 0),
        ("    return (\n", 0),
    ],
)
def test_a_program_passes_its_tests_or_does_not(written: str, right: float) -> None:
    sandbox.isolation()
    item = {"prompt": "def two():\n", "entry_point": "two", "test": "def check(f):\n    assert f() == 2\n"}
    assert answers.humaneval(item, [written]) == {"pass@1": right}
    item = {"test_setup_code": "", "test_list": ["assert two() == 2", "assert two() < 3"]}
    assert answers.mbpp(item, [f"def two():\n{written}"]) == {"pass@1": right}
