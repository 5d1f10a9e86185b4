"""Undirected graphs of a dozen vertices, their text, and the solvers of both tasks, two for each.

The first of the two writes the answers. The second goes another way, so that a mistake would have to be made twice.
"""

import itertools
import random
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from moekit.errors import DataError

T = TypeVar("T")
NAMES = "abcdefghijkl"
"""Of vertices: one character, and one token, each."""
PROMPT = re.compile(f"((?:[{NAMES}]{{2}} )*[{NAMES}]{{2}}); ([{NAMES}])([{NAMES}]):")


class Graph(NamedTuple):
    """Vertices are characters; an edge is a string of its two, in order."""

    vertices: str
    edges: frozenset[str]

    def neighbours(self, vertex: str) -> list[str]:
        return [other for other in self.vertices if other != vertex and edge(vertex, other) in self.edges]

    def without(self, removed: Iterable[str]) -> "Graph":
        gone = set(removed)
        kept = "".join(vertex for vertex in self.vertices if vertex not in gone)
        return Graph(kept, frozenset(one for one in self.edges if not gone & {*one}))


def edge(a: str, b: str) -> str:
    return min(a, b) + max(a, b)


def shuffled(items: Iterable[T], draw: random.Random) -> list[T]:
    """Returns the items in random order; `random()` alone is promised to be the same in every Python."""
    return sorted(items, key=lambda item: draw.random())


def below(stop: int, draw: random.Random) -> int:
    return int(draw.random() * stop)


def random_vertices(draw: random.Random, fewest: int = 8) -> str:
    """Returns `fewest` to 12 of the names."""
    return "".join(sorted(shuffled(NAMES, draw)[: fewest + below(len(NAMES) - fewest + 1, draw)]))


def pairs(vertices: Iterable[str]) -> list[str]:
    """Returns every edge that could be."""
    return [edge(a, b) for a, b in itertools.combinations(vertices, 2)]


def as_prompt(graph: Graph, s: str, t: str, draw: random.Random) -> str:
    """Returns the edges in random order, each from a random end, and the two vertices that are asked about."""
    listed = (one if draw.random() < 0.5 else one[::-1] for one in shuffled(sorted(graph.edges), draw))
    return f"{' '.join(listed)}; {s}{t}:"


def from_prompt(prompt: str) -> tuple[Graph, str, str]:
    """Returns the graph and the two vertices. A vertex without an edge is not in the text, nor in the graph.

    Raises DataError for other text.
    """
    found = PROMPT.fullmatch(prompt)
    if found is None:
        raise DataError(f"prompt is {prompt[:40]!r}, which is not edges and two vertices, like 'ab bc; ac:'")
    listed, s, t = found.groups()
    edges = frozenset(edge(*one) for one in listed.split())
    return Graph("".join(sorted({*"".join(edges), s, t})), edges), s, t


def shortest_paths(graph: Graph, s: str) -> dict[str, str]:
    """Returns a shortest path from s to each vertex that can be reached, the first in the order of letters."""
    paths, found = [s], {s: s}
    for path in paths:  # grows while it is read: breadth first
        for vertex in graph.neighbours(path[-1]):
            if vertex not in found:
                found[vertex] = path + vertex
                paths.append(path + vertex)
    return found


def distance(graph: Graph, s: str, t: str) -> int | None:
    """Returns the length of a shortest path, or None: the first power of the matrix of neighbours that joins them."""
    place = {vertex: number for number, vertex in enumerate(graph.vertices)}
    joined = np.zeros((len(place), len(place)), dtype=np.int64)
    for a, b in map(tuple, graph.edges):
        joined[place[a], place[b]] = joined[place[b], place[a]] = 1
    reached = np.eye(len(place), dtype=np.int64)
    for length in range(len(place)):
        if reached[place[s], place[t]]:
            return length
        reached = np.minimum(reached @ joined, 1)
    return None


def disjoint_paths(graph: Graph, s: str, t: str) -> int:
    """Returns how many paths share no vertex but their ends: the largest flow if a vertex lets one unit through.

    Every vertex is two, joined by an arc of capacity 1; a search in what is left of the capacities adds a path a time.
    """
    left = {((v, "in"), (v, "out")): 1 for v in graph.vertices}
    for a, b in map(tuple, graph.edges):
        left |= {((a, "out"), (b, "in")): 1, ((b, "out"), (a, "in")): 1}
    nodes, flow = [(vertex, side) for vertex in graph.vertices for side in ("in", "out")], 0
    while True:
        came_from, order = {(s, "out"): (s, "out")}, [(s, "out")]
        for node in order:
            found = [other for other in nodes if left.get((node, other)) and other not in came_from]
            came_from |= dict.fromkeys(found, node)
            order += found
        if (t, "in") not in came_from:
            return flow
        node = (t, "in")
        while node != (s, "out"):
            before = came_from[node]
            left[before, node] -= 1
            left[node, before] = left.get((node, before), 0) + 1
            node = before
        flow += 1


def smallest_cut(graph: Graph, s: str, t: str, most: int) -> Sequence[str] | None:
    """Returns the fewest vertices without which s and t, not neighbours, are apart, trying every set up to `most`."""
    others = graph.without([s, t]).vertices
    for size in range(most + 1):
        for cut in itertools.combinations(others, size):
            if distance(graph.without(cut), s, t) is None:
                return cut
    return None
