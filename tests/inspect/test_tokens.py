"""The tokens of an expert: by count, by lift, in context."""

import numpy as np

from moekit.inspect.collect import collect
from moekit.inspect.text import Window
from moekit.inspect.tokens import FEWEST, tokens
from moekit.inspect.vocabulary import Vocabulary
from moekit.nn.model import Model

WORDS = Vocabulary([f" w{number}" for number in range(61)], np.zeros(61, dtype=np.int64))


def decode(ids: list[int]) -> str:
    return "".join(WORDS.texts[number] for number in ids)


def test_each_expert_shows_its_own_tokens_most_frequent_first(sorted_by_domain: Model) -> None:
    text = [5] * 40 + [6] * 25 + [7] * 3 + [40] * 30 + [41] * 10
    mixed = np.array(text)[np.random.default_rng(0).permutation(len(text))]
    windows = [Window("a", number, part) for number, part in enumerate(np.split(mixed, 2))]
    stats = collect(sorted_by_domain, windows, WORDS.kinds, 54)
    found = tokens(stats, WORDS, decode)
    assert [row[1:4] for row in found.tables["top"].rows] == [
        (0, " w5", 40),
        (0, " w6", 25),
        (0, " w7", 3),
        (1, " w40", 30),
        (1, " w41", 10),
    ]
    typical = {row[1:3]: row for row in found.tables["typical"].rows}
    assert set(typical) == {(0, " w5"), (0, " w6"), (1, " w40")}  # the others came fewer than 20 times
    base = 68 / 108
    lift = (40 + FEWEST * base) / ((40 + FEWEST) * base)
    assert abs(typical[0, " w5"][5] - lift) < 1e-3


def test_contexts_are_the_tokens_on_either_side(sorted_by_domain: Model) -> None:
    windows = [Window("a", 0, np.arange(25, 35)), Window("b", 0, np.array([50, 51]))]
    found = tokens(collect(sorted_by_domain, windows, WORDS.kinds, 12), WORDS, decode)
    contexts = [row for row in found.tables["contexts"].rows if row[1] == 1]
    assert len(contexts) == 2  # one a window
    text = decode(list(range(25, 35)))
    assert any("".join(map(str, row[3:])) == text and row[4] in text for row in contexts)
    assert any(row[3:] in (("", " w50", " w51"), (" w50", " w51", "")) for row in contexts)
