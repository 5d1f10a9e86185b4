"""Tasks: pure functions of the seed, every answer sound by a second solver, nothing asked that was shown."""

import json
from pathlib import Path

import pytest

from moekit.data.synthetic import TASKS, Question, graphs, read_questions
from moekit.errors import DataError

GRAPHS = ("shortest-path", "connectivity")


@pytest.mark.parametrize("task", TASKS)
def test_examples_are_a_function_of_the_seed(task: str) -> None:
    draw = TASKS[task].draw
    assert draw(3, 30, 10) == draw(3, 30, 10)
    assert draw(3, 30, 10) != draw(4, 30, 10)
    train, asked = draw(3, 30, 10)
    assert (len(train), len(asked)) == (30, 10)
    assert {question.domain for question in train + asked} == {task}


@pytest.mark.parametrize("task", GRAPHS)
def test_every_answer_is_sound_by_the_second_solver(task: str) -> None:
    train, asked = TASKS[task].draw(0, 300, 100)
    assert all(map(TASKS[task].is_sound, train + asked))


def test_a_wrong_answer_is_not_sound() -> None:
    (path, *_), _ = TASKS["shortest-path"].draw(0, 10, 1)
    assert not TASKS["shortest-path"].is_sound(path.model_copy(update={"text": path.text + "a"}))
    (yes, *_), _ = TASKS["connectivity"].draw(0, 10, 1)
    assert not TASKS["connectivity"].is_sound(yes.model_copy(update={"text": " no"}))


@pytest.mark.parametrize("task", GRAPHS)
def test_no_graph_is_both_shown_and_asked_whatever_the_seeds(task: str) -> None:
    def edges(questions: list[Question]) -> set[frozenset[str]]:
        return {graphs.from_prompt(question.prompt)[0].edges for question in questions}

    train, asked = zip(*(TASKS[task].draw(seed, 60, 30) for seed in (0, 1)), strict=True)
    shown = edges(train[0]) | edges(train[1])
    assert not shown & (edges(asked[0]) | edges(asked[1]))
    assert len(shown) > 100


@pytest.mark.parametrize(("task", "groups"), [("shortest-path", "12345"), ("connectivity", ["yes", "no"])])
def test_groups_are_of_equal_size(task: str, groups: list[str]) -> None:
    for questions in TASKS[task].draw(1, 100, 50):
        found = [TASKS[task].group(question) for question in questions]
        assert {group: found.count(group) for group in found} == dict.fromkeys(groups, len(questions) // len(groups))


def test_graphs_have_8_to_12_vertices() -> None:
    sizes = {len(graphs.from_prompt(q.prompt)[0].vertices) for q in TASKS["shortest-path"].draw(0, 200, 1)[0]}
    assert max(sizes) == 12
    assert min(sizes) <= 8


def test_neither_degrees_nor_the_number_of_edges_tell_whether_four_paths_exist() -> None:
    questions = TASKS["connectivity"].draw(0, 400, 1)[0]
    edges: dict[str, list[int]] = {" yes": [], " no": []}
    for question in questions:
        graph, s, t = graphs.from_prompt(question.prompt)
        assert graphs.edge(s, t) not in graph.edges
        assert min(len(graph.neighbours(s)), len(graph.neighbours(t))) >= 4
        edges[question.text].append(len(graph.edges))
    yes, no = (sum(counts) / len(counts) for counts in edges.values())
    assert abs(yes - no) < 1.5


def test_no_name_is_in_the_phone_book_twice_and_what_is_asked_stands_in_it() -> None:
    train, asked = TASKS["phone-book"].draw(0, 2000, 100)
    assert len({entry.prompt for entry in train}) == 2000
    assert all(len(entry.prompt) == 6 and len(entry.text) == 9 and entry.text[1:].isdecimal() for entry in train)
    assert asked == train[:100]


def test_more_questions_than_entries_are_an_error() -> None:
    with pytest.raises(DataError, match="questions are 11 of 10 examples"):
        TASKS["phone-book"].draw(0, 10, 11)


SQUARE = Question(prompt="ab cb ad dc ce; ae:", text=" abce", domain="shortest-path")


@pytest.mark.parametrize("answer", [" abce", " adce", "adce"])
def test_every_shortest_path_is_right(answer: str) -> None:
    assert TASKS["shortest-path"].is_right(SQUARE, answer)


@pytest.mark.parametrize(
    "answer", ["", " ", " ae", " ace", " abcde", " abcbce", " abc", " bce", " abxe", " abce!", " ab ce"]
)
def test_a_longer_a_broken_or_another_path_is_wrong(answer: str) -> None:
    assert not TASKS["shortest-path"].is_right(SQUARE, answer)


def test_a_path_along_edges_that_is_longer_is_wrong() -> None:
    longer = Question(prompt="ab bc cd ad; ad:", text=" ad", domain="shortest-path")
    assert TASKS["shortest-path"].is_right(longer, " ad")
    assert not TASKS["shortest-path"].is_right(longer, " abcd")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "bad.jsonl:2: Invalid JSON"),
        ('{"prompt": "a"}', "bad.jsonl:2: text: Field required"),
        ('{"prompt": "a", "text": "b", "domain": "phonebook"}', "did you mean phone-book"),
        ('{"prompt": "ab; ab", "text": " ab", "domain": "shortest-path"}', "bad.jsonl:2: prompt is 'ab; ab'"),
        ('{"prompt": "ab cd; ac:", "text": " ac", "domain": "shortest-path"}', "text is ' ac', which does not answer"),
    ],
)
def test_a_file_of_something_else_is_an_error_that_names_the_line(line: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(json.dumps(SQUARE.model_dump()) + "\n" + line + "\n")
    with pytest.raises(DataError, match=message):
        read_questions(file)
