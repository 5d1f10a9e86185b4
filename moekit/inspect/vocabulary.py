"""What kind of text each entry of a vocabulary is, decided once from how it is spelt."""

import unicodedata
from typing import NamedTuple

import numpy as np

from moekit.formats.tokenizer import Tokenizer

KINDS = (
    "special",
    "line end",
    "white space",
    "word start",
    "word part",
    "CJK",
    "digits",
    "punctuation",
    "code symbols",
    "part of a character",
    "mixed",
)
"""A word start has a space before it (or, where words have none, what is spelt like one); a word part has not."""
_CODE = frozenset("{}[]()<>=+*/\\|&^%$#@~_`")


class Vocabulary(NamedTuple):
    """What each id stands for. `kinds` are places in `KINDS`."""

    texts: list[str]
    kinds: np.ndarray


def vocabulary(tokenizer: Tokenizer, size: int) -> Vocabulary:
    """Returns the texts and kinds of the ids below `size`; those without a token count as special."""
    texts, silent = tokenizer.token_texts(), tokenizer.token_bytes() == 0
    named = ["special" if mute else kind(text) for text, mute in zip(texts, silent, strict=True)]
    named += ["special"] * (size - len(named))
    texts += [""] * (size - len(texts))
    return Vocabulary(texts[:size], np.array([KINDS.index(name) for name in named[:size]]))


def kind(text: str) -> str:
    """Returns the kind of a token's text, one of `KINDS`."""
    bare = text.strip()
    if "\ufffd" in text:
        return "part of a character"
    if not bare:
        return "line end" if "\n" in text or "\r" in text else "white space"
    if any(unicodedata.name(c, "").startswith(("CJK", "HIRAGANA", "KATAKANA", "HANGUL")) for c in bare):
        return "CJK"
    if all(c.isalpha() or unicodedata.category(c)[0] == "M" for c in bare):
        return "word start" if text[0].isspace() else "word part"
    if bare.isdigit():
        return "digits"
    if set(bare) <= _CODE:
        return "code symbols"
    return "mixed" if any(c.isalnum() for c in bare) else "punctuation"


def shown(text: str) -> str:
    """Returns a token's text so that it can be seen: line ends as ⏎, tabs as ⇥, a lone space as ␣."""
    seen = text.replace("\r\n", "⏎").replace("\n", "⏎").replace("\r", "⏎").replace("\t", "⇥")
    return "␣" * len(seen) if seen and not seen.strip(" ") else seen
