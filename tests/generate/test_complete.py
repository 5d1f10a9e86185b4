"""Text in, text out: stop strings, the end of the text, and streams that never take anything back."""

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moekit.errors import ConfigError
from moekit.formats.tokenizer import Tokenizer
from moekit.generate import Completion, SamplingSettings, complete, tokens
from moekit.generate.complete import _Text
from moekit.nn.model import Model

Build = Callable[..., Model]
DRAWN = SamplingSettings(temperature=1.0, seed=5)
PROMPTS = ["It was", "床前", ""]


def fed(tokenizer: Tokenizer, ids: Sequence[int], stop: Sequence[str]) -> tuple[list[str], _Text]:
    """Returns what was streamed, token by token, and the text at its end."""
    text = _Text(tokenizer, stop)
    return [*(text.add(token) for token in ids), text.close()], text


def expected(tokenizer: Tokenizer, ids: Sequence[int], stop: Sequence[str]) -> tuple[str, str]:
    """Returns text and finish, looking at every prefix of the tokens."""
    for n in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:n])
        places = [text.index(s) for s in stop if s in text]
        if places:
            return text[: min(places)], "stop"
    return tokenizer.decode(ids), "length"


ALPHABET = "ab\n.é中明🙂"


@settings(max_examples=400, deadline=None)
@given(
    st.text(ALPHABET, min_size=1, max_size=12),
    st.lists(st.text(ALPHABET, min_size=1, max_size=4), max_size=3),
    st.integers(0, 3),
)
def test_a_stream_is_the_final_text_in_whole_characters_and_no_stop_string_leaks(
    tokenizer: Tokenizer, text: str, stop: list[str], cut: int
) -> None:
    ids = tokenizer.encode(text)
    ids = ids[: len(ids) - cut] or ids  # a character may be cut in the middle
    streamed, found = fed(tokenizer, ids, stop)
    assert (found.text, found.finish) == expected(tokenizer, ids, stop)
    assert "".join(streamed) == found.text
    assert not any("\ufffd" in piece for piece in streamed[:-1])
    assert not any(s in found.text for s in stop)


@pytest.mark.parametrize(
    ("text", "stop", "kept"),
    [
        ("one two three", ["two"], "one "),
        ("aab", ["ab"], "a"),
        ("ababac", ["abac"], "ab"),
        ("xyz", ["yz", "xy"], ""),
        ("abcX", ["abcd", "bcX"], "a"),
        ("。中文", ["。中"], ""),
        ("好。🙂", ["。🙂"], "好"),
        ("a\n\nb", ["\n\n"], "a"),
        ("never", ["nevers"], "never"),
        ("It was the best of times", ["best of"], "It was the "),
    ],
)
def test_stop_strings_over_any_split_of_the_text(tokenizer: Tokenizer, text: str, stop: list[str], kept: str) -> None:
    streamed, found = fed(tokenizer, tokenizer.encode(text), stop)
    assert found.text == kept
    assert "".join(streamed) == kept


def test_what_could_become_a_stop_string_is_held_back_only_as_long_as_it_could(tokenizer: Tokenizer) -> None:
    ids = [i for character in "a<b<|x" for i in tokenizer.encode(character)]
    streamed, _ = fed(tokenizer, ids, ["<|end"])
    assert streamed == ["a", "", "<b", "", "", "<|x", ""]


def test_a_character_comes_out_when_its_last_byte_is_there(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🙂")
    assert len(ids) == 4
    assert fed(tokenizer, ids, [])[0] == ["", "", "", "🙂", ""]


def test_nothing_is_taken_after_the_end(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("ab"), tokenizer.eos_id, *tokenizer.encode("cd")]
    streamed, found = fed(tokenizer, ids, [])
    assert (found.text, found.finish, "".join(streamed)) == ("ab", "end", "ab")
    assert found.ids == tokenizer.encode("ab")


@pytest.mark.parametrize("kind", ["moe", "mla", "hash", "dense"])
def test_a_stream_of_a_real_model_is_its_completion(build: Build, tokenizer: Tokenizer, kind: str) -> None:
    streamed = [""] * len(PROMPTS)

    def stream(number: int, text: str) -> None:
        assert text
        streamed[number] += text

    found = complete(build(kind), tokenizer, PROMPTS, DRAWN, max_new_tokens=20, stream=stream)
    assert [completion.text for completion in found] == streamed
    assert [completion.prompt for completion in found] == PROMPTS
    assert {completion.finish for completion in found} <= {"length", "end"}
    assert complete(build(kind), tokenizer, PROMPTS, DRAWN, max_new_tokens=20) == found


def test_a_real_model_stops_at_the_string_and_each_sequence_for_itself(build: Build, tokenizer: Tokenizer) -> None:
    model = build()
    free = complete(model, tokenizer, PROMPTS, DRAWN, max_new_tokens=30)
    stop = next(free[0].text[n : n + 2] for n in range(4, 20) if "\ufffd" not in free[0].text[n : n + 2])
    found = complete(model, tokenizer, PROMPTS, DRAWN, max_new_tokens=30, stop=[stop])
    assert found[0].finish == "stop"
    assert found[0].text == free[0].text[: free[0].text.index(stop)]
    assert found[0].tokens < free[0].tokens
    for one, other in zip(found[1:], free[1:], strict=True):
        assert one == other or one.finish == "stop"


def new_tokens(model: Model, prompt: Sequence[int], new: int) -> list[int]:
    return [int(column[0]) for column in tokens(model, [prompt], SamplingSettings(), new)]


def test_the_end_of_text_token_ends_one_sequence(build: Build, tokenizer: Tokenizer) -> None:
    model = build()
    ids, others = (new_tokens(model, tokenizer.encode(prompt), 12) for prompt in ("It was", "the"))
    ending = next(token for token in ids[3:] if token not in others)
    # the same vocabulary, in which another token ends a text: one that the model is about to say
    piece = tokenizer._plain.id_to_token(ending)
    other = Tokenizer(tokenizer.data, {"eos_token": piece})
    assert other.eos_id == ending
    found = complete(model, other, ["It was", "the"], max_new_tokens=12)
    first = ids.index(ending)
    assert found[0] == Completion("It was", tokenizer.decode(ids[:first]), first, "end")
    assert found[1] == Completion("the", tokenizer.decode(others), 12, "length")


def test_an_empty_prompt_starts_a_new_document(build: Build, tokenizer: Tokenizer) -> None:
    ids = new_tokens(build(), [tokenizer.eos_id], 6)
    assert tokenizer.eos_id not in ids
    assert complete(build(), tokenizer, [""], max_new_tokens=6) == [Completion("", tokenizer.decode(ids), 6, "length")]


def test_mistakes_are_one_clear_line(build: Build, tokenizer: Tokenizer) -> None:
    model = build(max_position_embeddings=8)
    with pytest.raises(ConfigError, match="a stop string is empty"):
        complete(model, tokenizer, ["a"], stop=["x", ""])
    with pytest.raises(ConfigError, match="ask for at most"):
        complete(model, tokenizer, ["It was the best of times"], max_new_tokens=8)
    with pytest.raises(ConfigError, match="is this its tokenizer"):
        complete(build(vocab_size=20), tokenizer, ["床"], max_new_tokens=2)


def test_ids_that_the_tokenizer_does_not_have_are_never_chosen(build: Build, tokenizer: Tokenizer) -> None:
    model = build(vocab_size=4 * tokenizer.vocab_size)
    for one in complete(model, tokenizer, PROMPTS, DRAWN, max_new_tokens=20):
        assert one.finish == "end" or one.text  # three of four draws would give no text at all
    ids = [token for step in tokens(model, [[1, 2]], DRAWN, 30, tokenizer.vocab_size) for token in step.tolist()]
    assert max(ids) < tokenizer.vocab_size


def test_one_text_in_the_place_of_a_list_is_refused(build: Callable[..., Model], tokenizer: Tokenizer) -> None:
    for wrong, message in (
        ({"prompts": "It was"}, "prompts is one text; give a list of texts"),
        ({"prompts": ["It was"], "stop": "the end"}, "stop is one text"),
        ({"prompts": []}, "prompts is empty"),
    ):
        with pytest.raises(ConfigError, match=message):
            complete(build(), tokenizer, **wrong)
