"""The kind of a token, by its spelling, and the text that an id stands for."""

from pathlib import Path

import pytest

from moekit.formats.tokenizer import load_tokenizer
from moekit.inspect.vocabulary import KINDS, kind, shown, vocabulary


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" the", "word start"),
        ("ing", "word part"),
        (" né", "word start"),
        ("诗", "CJK"),
        ("。", "punctuation"),
        ("かな", "CJK"),
        ("2024", "digits"),
        (" 7", "digits"),
        ("...", "punctuation"),
        (" {", "code symbols"),
        ("){", "code symbols"),
        ("x1", "mixed"),
        ("  ", "white space"),
        ("\n", "line end"),
        (" \r\n", "line end"),
        ("a\ufffd", "part of a character"),
    ],
)
def test_a_token_has_the_kind_of_its_spelling(text: str, expected: str) -> None:
    assert kind(text) == expected
    assert expected in KINDS


def test_every_id_has_a_text_and_a_kind(text: Path) -> None:
    tokenizer = load_tokenizer(text / "data")
    found = vocabulary(tokenizer, 310)
    assert len(found.texts) == len(found.kinds) == 310
    assert KINDS[found.kinds[tokenizer.eos_id]] == "special"
    assert KINDS[found.kinds[305]] == "special"
    assert found.texts[305] == ""
    ids = tokenizer.encode(" there 12")
    assert "".join(found.texts[number] for number in ids) == " there 12"


def test_white_space_is_shown() -> None:
    assert [shown(text) for text in (" ", "  ", "\n", "\r\n", "\tx", " a", "")] == ["␣", "␣␣", "⏎", "⏎", "⇥x", " a", ""]
