"""The tasks: what is asked, what is right, and examples of which everything follows from the seed.

phone-book      "kqzbe:" -> " 30418267". Closed book: what is asked has been trained on, and can only be remembered.
shortest-path   "bd ac ce; ae:" -> " ace". The edges of a graph, two vertices; any shortest path is right.
connectivity    "bd ac ce ...; ae:" -> " yes". Are there four paths that share no vertex but their ends?
"""

import hashlib
import itertools
import random
from collections.abc import Callable
from pathlib import Path
from string import ascii_lowercase
from typing import NamedTuple

from pydantic import TypeAdapter, ValidationError

from moekit.config import Strict
from moekit.data.synthetic import graphs
from moekit.data.synthetic.graphs import Graph
from moekit.errors import DataError, nearest
from moekit.files import explain

HELD_OUT = 1 / 8
"""The part of all graphs that is asked about and never trained on, whatever the seed: the hash of its edges decides."""
PATHS = 4
"""Vertex-disjoint paths that "yes" stands for."""


class Question(Strict):
    """A line of a file of examples or questions."""

    prompt: str
    text: str
    """An answer that is right."""
    domain: str
    """The task's name."""


Examples = tuple[list[Question], list[Question]]
"""To train on, and to ask."""


class Task(NamedTuple):
    """One kind of question."""

    draw: Callable[[int, int, int], Examples]
    """(seed, examples, questions) -> what to train on, and what to ask."""
    is_right: Callable[[Question, str], bool]
    """Whether an answer is right."""
    group: Callable[[Question], str]
    """What results are told apart by."""
    is_sound: Callable[[Question], bool]
    """Whether the question's own answer is right by the second solver."""


def phone_book(seed: int, examples: int, questions: int) -> Examples:
    """Returns `examples` entries of a phone book, no name twice, and the first `questions` of them again."""
    if questions > examples or examples > len(ascii_lowercase) ** 5:
        raise DataError(f"questions are {questions} of {examples} examples; ask at most what is there, at most 26^5")
    draw, book = random.Random(f"phone-book {seed}"), dict[str, str]()
    while len(book) < examples:
        name = "".join(ascii_lowercase[graphs.below(26, draw)] for _ in range(5))
        book.setdefault(name, f"{graphs.below(10**8, draw):08}")
    listed = [Question(prompt=f"{name}:", text=f" {number}", domain="phone-book") for name, number in book.items()]
    return listed, listed[:questions]


def draw_shortest_path(draw: random.Random, group: str) -> Question:
    """Returns a question whose shortest paths have `group` edges, about a graph of 8 to 12 vertices."""
    while True:
        vertices = graphs.random_vertices(draw)
        count = len(vertices) + graphs.below(len(vertices) // 2, draw)
        graph = Graph(vertices, frozenset(graphs.shuffled(graphs.pairs(vertices), draw)[:count]))
        for s in graphs.shuffled(vertices, draw):
            if paths := [path for path in graphs.shortest_paths(graph, s).values() if len(path) - 1 == int(group)]:
                path = paths[graphs.below(len(paths), draw)]
                prompt = graphs.as_prompt(graph, s, path[-1], draw)
                return Question(prompt=prompt, text=f" {path}", domain="shortest-path")


def draw_connectivity(draw: random.Random, group: str) -> Question:
    """Returns a question about a graph of 10 to 12 vertices whose answer is `group`.

    Neither the degrees of the two vertices, at least 4, nor the number of edges gives it away: a graph is made in which
    1 to 3 vertices separate them, and where the answer is yes another one of as many edges takes its place.
    """
    while True:
        vertices = graphs.random_vertices(draw, fewest=10)
        s, t, *others = graphs.shuffled(vertices, draw)
        rest = others[3:]  # the other three may be neighbours of anyone
        half = 2 + graphs.below(len(rest) - 3, draw)
        near, far = {s, *rest[:half]}, {t, *rest[half:]}
        possible = [one for one in graphs.pairs(vertices) if not ({*one} & near and {*one} & far)]
        graph = Graph(vertices, frozenset(one for one in possible if draw.random() < 0.8))
        if group == "yes":
            apart = [one for one in graphs.pairs(vertices) if one != graphs.edge(s, t)]
            graph = graph._replace(edges=frozenset(graphs.shuffled(apart, draw)[: len(graph.edges)]))
        joined = all(map(graph.neighbours, vertices))
        enough = all(len(graph.neighbours(end)) >= PATHS for end in (s, t))
        if joined and enough and (graphs.disjoint_paths(graph, s, t) >= PATHS) == (group == "yes"):
            prompt = graphs.as_prompt(graph, s, t, draw)
            return Question(prompt=prompt, text=f" {group}", domain="connectivity")


def of_graphs(
    name: str, one: Callable[[random.Random, str], Question], groups: tuple[str, ...]
) -> Callable[[int, int, int], Examples]:
    """Returns what draws examples and questions, as many of each group as of any other; no graph is in both."""

    def draw(seed: int, examples: int, questions: int) -> Examples:
        counts = {"train": examples, "asked": questions}
        wanted = {(side, group): -(-count // len(groups)) for side, count in counts.items() for group in groups}
        found: dict[str, list[Question]] = {side: [] for side in counts}
        for number, group in enumerate(itertools.cycle(groups)):
            if not any(wanted.values()):
                break
            question = one(random.Random(f"{name} {seed} {number}"), group)
            side = "asked" if is_held_out(graphs.from_prompt(question.prompt)[0]) else "train"
            if wanted[side, group]:
                wanted[side, group] -= 1
                found[side].append(question)
        return found["train"][:examples], found["asked"][:questions]

    return draw


def is_held_out(graph: Graph) -> bool:
    digest = hashlib.sha256(" ".join(sorted(graph.edges)).encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64 < HELD_OUT


def is_shortest(question: Question, answer: str) -> bool:
    """Returns whether the answer is a path between the two vertices, along edges, and as short as any."""
    graph, s, t = graphs.from_prompt(question.prompt)
    path, shortest = answer.strip(), graphs.shortest_paths(graph, s).get(t)
    along = all(graphs.edge(a, b) in graph.edges for a, b in itertools.pairwise(path))
    return shortest is not None and along and (path[:1], path[-1:], len(path)) == (s, t, len(shortest))


def is_same(question: Question, answer: str) -> bool:
    return answer.strip() == question.text.strip()


def path_is_sound(question: Question) -> bool:
    graph, s, t = graphs.from_prompt(question.prompt)
    return is_shortest(question, question.text) and graphs.distance(graph, s, t) == int(path_length(question))


def connectivity_is_sound(question: Question) -> bool:
    cut = graphs.smallest_cut(*graphs.from_prompt(question.prompt), most=PATHS - 1)
    return question.text == (" yes" if cut is None else " no")


def path_length(question: Question) -> str:
    return str(len(question.text.strip()) - 1)


TASKS = {
    "phone-book": Task(phone_book, is_same, lambda question: "all", lambda question: True),
    "shortest-path": Task(
        of_graphs("shortest-path", draw_shortest_path, ("1", "2", "3", "4", "5")),
        is_shortest,
        path_length,
        path_is_sound,
    ),
    "connectivity": Task(
        of_graphs("connectivity", draw_connectivity, ("yes", "no")),
        is_same,
        lambda question: question.text.strip(),
        connectivity_is_sound,
    ),
}


def read_questions(file: Path) -> list[Question]:
    """Returns the questions of a file that `prepare` has written; DataError for other text, or a wrong answer."""
    found, line = list[Question](), TypeAdapter(Question)
    for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            found.append(line.validate_json(text))
        except ValidationError as error:
            raise DataError(f"{file}:{number}: {explain(error)}") from None
        if (task := found[-1].domain) not in TASKS:
            known = ", ".join(TASKS)
            raise DataError(f"{file}:{number}: domain is {task!r}{nearest(task, TASKS)}; known tasks: {known}")
        try:
            right = TASKS[task].is_right(found[-1], found[-1].text)
        except DataError as error:
            raise DataError(f"{file}:{number}: {error}") from None
        if not right:
            raise DataError(f"{file}:{number}: text is {found[-1].text!r}, which does not answer the prompt")
    if not found:
        raise DataError(f"{file} holds no question")
    return found
