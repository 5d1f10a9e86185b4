"""The tokenizer: byte-level BPE as GGUF's list of tokens, types and merges, and back as a tokenizer.json.

GGUF only names a pre-tokenizer; each program has its own pattern for the name. So a tokenizer is written only where its
steps are, one by one, what llama.cpp does under one of the names below. Under any other a text becomes other tokens.
"""
# ruff: noqa: RUF001  the released patterns are full of letters that look like others

import json
from collections.abc import Iterable
from typing import Any, NamedTuple, cast
from unicodedata import category

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from moekit.errors import CheckpointError, UnsupportedError
from moekit.formats.gguf.file import Value
from moekit.formats.tokenizer import PRE_TOKENIZER, Tokenizer

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT = r"\p{N}"
_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ"
    "-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰"
    "-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_EAST_ASIAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_V1 = (r"[\r\n]", rf"\s?[{_LETTERS}]+", "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+", r"\s+$")
_V3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)


class _Pre(NamedTuple):
    """What llama.cpp does under the name of a pre-tokenizer."""

    name: str
    steps: tuple[str, ...]
    """Patterns; each splits what those before it have left, and keeps what it finds."""
    ignore_merges: bool = False
    """A word that is a token is taken whole, whatever the merges make of it."""


_KNOWN = (
    _Pre("dbrx", (PRE_TOKENIZER,)),
    _Pre("llama-bpe", (PRE_TOKENIZER,), ignore_merges=True),
    _Pre("gpt-2", (_GPT2,)),
    _Pre("qwen2", (PRE_TOKENIZER.replace(r"\p{N}{1,3}", _DIGIT),)),
    _Pre("deepseek-llm", (*_V1, _EAST_ASIAN, _DIGIT)),  # there `\p{N}+`, the same where no token has two digits
    _Pre("deepseek-coder", (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _EAST_ASIAN, _DIGIT)),
    _Pre("deepseek-v3", _V3),
)
_SPLIT = ("tokenizer.ggml.add_space_prefix", "tokenizer.ggml.remove_extra_whitespaces")
"""Keys of other kinds of tokenizers, which would change the text."""


def keys(tokenizer: Tokenizer | None, vocab_size: int) -> dict[str, Value]:
    """Returns a tokenizer's keys, with unused tokens up to the size of the embedding; None: there is no tokenizer.

    Nothing is added to a text unless tokenizer_config.json says add_bos_token or add_eos_token. Without a beginning
    token of its own the end-of-text token is named, as llama.cpp would otherwise take token 11 for one. Raises
    UnsupportedError, with the reason, for a tokenizer that llama.cpp would not repeat.
    """
    if tokenizer is None:
        return {"tokenizer.ggml.model": "none"}
    parts = json.loads(tokenizer.data)
    pre = _named(parts)
    if tokenizer.vocab_size > vocab_size:
        raise UnsupportedError(f"the tokenizer has {tokenizer.vocab_size} tokens but the embedding {vocab_size} rows")
    tokens, types = [f"[PAD{number}]" for number in range(vocab_size)], [UNUSED] * vocab_size
    for token, number in parts["model"]["vocab"].items():
        tokens[number], types[number] = token, NORMAL
    for added in parts["added_tokens"]:
        if added["lstrip"] or added["rstrip"] or added["single_word"]:
            raise UnsupportedError(
                f"token {added['content']!r} takes in spaces or whole words, for which GGUF has no key"
            )
        tokens[added["id"]], types[added["id"]] = added["content"], CONTROL if added["special"] else USER_DEFINED
    merges = parts["model"]["merges"]
    if len(set(tokens)) < vocab_size:
        raise UnsupportedError(
            "the tokenizer has a token that is spelt like another or like [PAD0], which GGUF forbids"
        )
    if pre.name == "deepseek-llm" and _has_two_digits(tokens):
        raise UnsupportedError("the tokenizer splits digits but has tokens of several, which llama.cpp would join")
    found: dict[str, Value] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre.name,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in merges],
        "tokenizer.ggml.eos_token_id": tokenizer.eos_id,
        "tokenizer.ggml.bos_token_id": tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id,
        "tokenizer.ggml.add_bos_token": tokenizer.config.get("add_bos_token") is True,
        "tokenizer.ggml.add_eos_token": tokenizer.config.get("add_eos_token") is True,
    }
    if tokenizer.pad_id != tokenizer.eos_id:
        found["tokenizer.ggml.padding_token_id"] = tokenizer.pad_id
    if isinstance(template := tokenizer.config.get("chat_template"), str):
        found["tokenizer.chat_template"] = template
    return found


def _named(parts: dict[str, Any]) -> _Pre:
    """Returns what stands for a tokenizer.json, or raises UnsupportedError with what stands against it."""
    model, normalizer = parts["model"], parts.get("normalizer") or {}
    if model["type"] != "BPE" or "ByteLevel" not in json.dumps(parts.get("decoder")):
        raise UnsupportedError(f"the tokenizer is {model['type']} but only byte-level BPE is written to GGUF")
    if normalizer and normalizer.get("normalizers") != []:
        raise UnsupportedError(f"the tokenizer normalises text ({normalizer['type']}), which llama.cpp would not")
    for name in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(name):
            raise UnsupportedError(f"the tokenizer has {name} {model[name]!r}, for which GGUF has no key")
    steps, ignore_merges = tuple(_steps(parts.get("pre_tokenizer"))), bool(model.get("ignore_merges"))
    for pre in _KNOWN:
        if (pre.steps, pre.ignore_merges) == (steps, ignore_merges):
            return pre
    shown = " then ".join(steps) + (", whole words first" if ignore_merges else "")
    names = ", ".join(pre.name for pre in _KNOWN)
    raise UnsupportedError(f"no pre-tokenizer of GGUF that is known here ({names}) splits text by {shown:.300}")


def _steps(node: Any) -> Iterable[str]:
    """Yields the patterns of a pre-tokenizer; what is none is told by its JSON."""
    kind = node and node["type"]
    if kind == "Sequence":
        for each in node["pretokenizers"]:
            yield from _steps(each)
    elif kind == "Split" and node["behavior"] == "Isolated" and not node["invert"] and "Regex" in node["pattern"]:
        yield node["pattern"]["Regex"].replace("\r", r"\r").replace("\n", r"\n")
    elif kind == "Digits" and node["individual_digits"]:
        yield _DIGIT
    elif kind == "ByteLevel" and not node["add_prefix_space"]:
        yield from [_GPT2] if node.get("use_regex", True) else []
    else:
        yield json.dumps(node)


def _has_two_digits(tokens: list[str]) -> bool:
    text = decoders.ByteLevel()
    kinds = ([category(letter) for letter in text.decode([token])] for token in tokens if token[:4] != "[PAD")
    return any(sum(kind in ("Nd", "Nl", "No") for kind in each) > 1 for each in kinds)


def read(found: dict[str, Value], where: str) -> Tokenizer | None:
    """Returns the tokenizer that a file's keys describe, None if it has none.

    Raises UnsupportedError for another kind than byte-level BPE and for a pre-tokenizer that is not known here,
    CheckpointError for keys that contradict each other.
    """
    model, name = found.get("tokenizer.ggml.model", "none"), found.get("tokenizer.ggml.pre")
    if model == "none":
        return None
    pre = next((pre for pre in _KNOWN if pre.name == name), None)
    if model != "gpt2" or pre is None or any(found.get(key) for key in _SPLIT):
        known = ", ".join(pre.name for pre in _KNOWN)
        raise UnsupportedError(f"{where} has tokenizer {model!r} with {name!r} but only gpt2 is read, with {known}")
    tokens, types, merges = (_texts(found, key, where) for key in ("tokens", "token_type", "merges"))
    if len(tokens) != len(types):
        raise CheckpointError(f"{where} has {len(tokens)} tokens but {len(types)} types of tokens")
    backend = _backend(pre, tokens, types, merges, where)
    config: dict[str, Any] = {
        key: True for key in ("add_bos_token", "add_eos_token") if found.get(f"tokenizer.ggml.{key}")
    }
    ids = {"eos": "eos", "pad": "padding"} | ({"bos": "bos"} if _begins(found) else {})
    for ours, theirs in ids.items():
        number = found.get(f"tokenizer.ggml.{theirs}_token_id")
        if number is None and ours == "pad":
            continue
        if not isinstance(number, int) or not 0 <= number < len(tokens) or types[number] == UNUSED:
            raise CheckpointError(f"{where} says that token {number!r} is {theirs}, which it does not have")
        config[f"{ours}_token"] = tokens[number]
    if isinstance(template := found.get("tokenizer.chat_template"), str):
        config["chat_template"] = template
    return Tokenizer(backend.to_str(pretty=True).encode(), config, where)


def _begins(found: dict[str, Value]) -> bool:
    """Returns whether there is a beginning token: the end-of-text token only where it is put before texts."""
    bos, eos = (found.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos"))
    return bos is not None and (bos != eos or bool(found.get("tokenizer.ggml.add_bos_token")))


def _texts(found: dict[str, Value], key: str, where: str) -> list[Any]:
    content = found.get(f"tokenizer.ggml.{key}")
    kind = int if key == "token_type" else str
    if not isinstance(content, list) or not all(type(item) is kind for item in content):
        raise CheckpointError(f"{where} has no tokenizer.ggml.{key} that is a list of {kind.__name__}")
    return cast(list[Any], content)


def _backend(pre: _Pre, tokens: list[str], types: list[int], merges: list[str], where: str) -> tokenizers.Tokenizer:
    added = {number for number, kind in enumerate(types) if kind in (CONTROL, USER_DEFINED)}
    last = max((number for number, kind in enumerate(types) if kind == NORMAL), default=-1)
    vocab = {token: number for number, token in enumerate(tokens[: last + 1]) if types[number] != UNUSED}
    pairs = [(first, second) for first, _, second in (merge.partition(" ") for merge in merges)]
    try:
        backend = tokenizers.Tokenizer(models.BPE(vocab, pairs, ignore_merges=pre.ignore_merges))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{where} has merges that do not fit its tokens: {str(error).splitlines()[0]}") from None
    splits: list[Any] = [pre_tokenizers.Split(Regex(step), "isolated") for step in pre.steps]
    if pre.steps[-1] == _DIGIT:
        splits[-1] = pre_tokenizers.Digits(individual_digits=True)
    bytes_only = [*splits, pre_tokenizers.ByteLevel(False, use_regex=False)]
    backend.pre_tokenizer = (
        pre_tokenizers.ByteLevel(False) if pre.name == "gpt-2" else pre_tokenizers.Sequence(bytes_only)
    )
    backend.decoder = decoders.ByteLevel()
    for number in sorted(added):
        special = types[number] == CONTROL
        backend.add_tokens([AddedToken(tokens[number], special=special, normalized=not special)])
    for number, token in enumerate(tokens):
        if types[number] != UNUSED and backend.token_to_id(token) != number:
            raise CheckpointError(f"{where}: token {number}, {token!r}, would become {backend.token_to_id(token)}")
    return backend
