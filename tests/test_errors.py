"""A message is one line that a terminal can show, whatever it quotes of a file."""

import pytest

from moekit.errors import CheckpointError, nearest


@pytest.mark.parametrize(
    ("quoted", "shown"),
    [("a\nb", "a b"), ("\x1b[31mred", r"\x1b[31mred"), ("a\u2028b\0", r"a b\x00"), ("é 域", "é 域")],
)
def test_it_is_one_printable_line(quoted: str, shown: str) -> None:
    message = str(CheckpointError(f"config.json: {quoted} is not a setting"))
    assert message == f"config.json: {shown} is not a setting"


def test_the_nearest_of_very_many_names_is_looked_for_among_the_first() -> None:
    names = [f"model.layers.{i}.weight" for i in range(500)]
    assert nearest("model.layers.77.weigth", names) == " (did you mean model.layers.77.weight?)"
    assert nearest("zz", (str(i) for i in range(10**9))) == ""
