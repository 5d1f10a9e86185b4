"""Graphs: both solvers of a task agree, and known cases are known."""

import itertools
import random

import pytest

from moekit.data.synthetic import graphs
from moekit.data.synthetic.graphs import Graph


def random_graph(draw: random.Random, density: float) -> Graph:
    vertices = graphs.random_vertices(draw)
    return Graph(vertices, frozenset(one for one in graphs.pairs(vertices) if draw.random() < density))


@pytest.mark.parametrize("density", [0.1, 0.25, 0.5])
def test_breadth_first_and_matrix_powers_find_the_same_distances(density: float) -> None:
    for number in range(60):
        graph = random_graph(random.Random(number), density)
        for s in graph.vertices:
            paths = graphs.shortest_paths(graph, s)
            for t in graph.vertices:
                length = graphs.distance(graph, s, t)
                assert length == (len(paths[t]) - 1 if t in paths else None)


def test_a_shortest_path_goes_along_edges_and_is_the_first_of_all_in_the_order_of_letters() -> None:
    for number in range(60):
        graph = random_graph(random.Random(number), 0.3)
        for path in graphs.shortest_paths(graph, graph.vertices[0]).values():
            between = ["".join(inner) for inner in itertools.permutations(graph.vertices, max(0, len(path) - 2))]
            same = [path[0] + inner + path[-1] for inner in between] if len(path) in (2, 3, 4) else [path]
            real = [one for one in same if all(graphs.edge(*step) in graph.edges for step in itertools.pairwise(one))]
            assert path == min(real)


@pytest.mark.parametrize("density", [0.3, 0.5, 0.7])
def test_the_largest_flow_is_as_many_as_the_smallest_cut(density: float) -> None:
    compared = 0
    for number in range(25):
        draw = random.Random(number)
        graph = random_graph(draw, density)
        for one in graphs.shuffled(graphs.pairs(graph.vertices), draw)[:4]:
            if one not in graph.edges:
                cut = graphs.smallest_cut(graph, one[0], one[1], most=4)
                assert min(graphs.disjoint_paths(graph, one[0], one[1]), 5) == (5 if cut is None else len(cut))
                compared += 1
    assert compared > 20


def test_known_graphs_have_their_known_connectivity() -> None:
    ring = Graph("abcdef", frozenset(["ab", "bc", "cd", "de", "ef", "af"]))
    complete = Graph("abcdef", frozenset(graphs.pairs("abcdef")))
    assert graphs.disjoint_paths(ring, "a", "d") == 2
    assert graphs.smallest_cut(ring, "a", "d", most=3) == ("b", "e")
    assert graphs.disjoint_paths(complete, "a", "b") == 5
    assert graphs.disjoint_paths(Graph("abc", frozenset(["ab"])), "a", "c") == 0
    assert graphs.distance(ring, "a", "d") == 3


def test_a_prompt_is_read_back_as_the_graph_that_was_written() -> None:
    for number in range(200):
        draw = random.Random(number)
        graph = random_graph(draw, 0.4)
        s, t = graphs.shuffled(graph.vertices, draw)[:2]
        found, start, end = graphs.from_prompt(graphs.as_prompt(graph, s, t, draw))
        assert (found.edges, start, end) == (graph.edges, s, t)
        assert {*found.vertices} == {*"".join(graph.edges), s, t}


def test_edges_stand_in_random_order_and_from_random_ends() -> None:
    graph = Graph("abcdefgh", frozenset(graphs.pairs("abcdefgh")))
    texts = [graphs.as_prompt(graph, "a", "b", random.Random(number)) for number in range(20)]
    assert len(set(texts)) == 20
    backward = sum(one[0] > one[1] for text in texts for one in text.split(";")[0].split())
    assert 0.4 < backward / (20 * len(graph.edges)) < 0.6
