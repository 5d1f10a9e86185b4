"""llama.cpp's own tokenizer gives our ids, under every name that we write; what it would not repeat is refused."""
# ruff: noqa: RUF001  letters that look like others are what is tested

import gzip
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

import moekit
from moekit.errors import CheckpointError, UnsupportedError
from moekit.formats.gguf.export import save_gguf
from moekit.formats.gguf.file import GGUF
from moekit.formats.gguf.vocabulary import _DIGIT, _KNOWN, keys, read
from moekit.formats.tokenizer import END_OF_TEXT, Tokenizer, train_tokenizer
from moekit.nn.model import Model

PACKAGE = Path(moekit.__file__).parent
ODD = [
    "Ça coûte 1234567 €, soit ½ de 3.14×10⁵… don't DON'T we'LL it'ſ",
    "  \t\n\n  \r\n a  b\u00a0c\u2003d\u3000e\u0085f\u200bg \x1c\x1d\x0b\x0c",
    "مرحبا بالعالم ٣٤٥ हिन्दी १२३ ไทย 한국어 日本語テキスト 漢字かな交じり文",
    "😀👍🏽🇺🇸👨‍👩‍👧‍👦 ❤️ ½¼ ⅷ Ⅻ ①② e\u0301 n\u0303 \ufeff\u200d\u202e 𝔘𝔫𝔦 𒀀 𐍈",
    "<|endoftext|> </s> <s> [PAD3000] <|im_end|>",
    "x" * 600, " " * 300 + "y", "\n" * 50, "9" * 100, "_-=+" * 40, "def f(x):\n\treturn  x**2  # ok\n",
]  # fmt: skip


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """The text that the package carries, Chinese included, its code, odd strings, and random ones of odd characters."""
    prose = []
    for file in sorted((PACKAGE / "quickstart" / "text").glob("*.valid.jsonl.gz")):
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            prose += [json.loads(line)["text"][:2000] for line, _ in zip(lines, range(8), strict=False)]
    code = [path.read_text(encoding="utf-8")[:4000] for path in sorted((PACKAGE / "nn").glob("*.py"))]
    draw = random.Random(0)
    letters = [*map(chr, range(32, 127)), *"\t\n\r\v\f\x85\xa0\u2028\u3000éß\u0301一あ가٠½Ⅷ😀\u200dＡ"]
    return prose + code + ODD + ["".join(draw.choices(letters, k=draw.randrange(1, 50))) for _ in range(600)]


@pytest.fixture(scope="module")
def trained(texts: list[str]) -> Callable[..., Tokenizer]:
    """Returns what trains a tokenizer with the pre-tokenizer of a name."""

    def train(name: str, vocab_size: int = 1500) -> Tokenizer:
        pre = next(pre for pre in _KNOWN if pre.name == name)
        steps: list[Any] = [pre_tokenizers.Split(Regex(step), "isolated") for step in pre.steps]
        if pre.steps[-1] == _DIGIT:
            steps[-1] = pre_tokenizers.Digits(individual_digits=True)
        backend = Backend(models.BPE(ignore_merges=pre.ignore_merges))
        backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(False, use_regex=False)])
        if name == "gpt-2":
            backend.pre_tokenizer = pre_tokenizers.ByteLevel(False)
        backend.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        options: dict[str, Any] = {"special_tokens": [END_OF_TEXT], "initial_alphabet": alphabet}
        backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False, **options))
        return Tokenizer(backend.to_str(pretty=True).encode())

    return train


@pytest.fixture(scope="module")
def llama_ids() -> Iterator[Callable[[Path, str], list[int]]]:
    """Returns what encodes text by a file's own tokenizer in llama.cpp, adding what the file says is to be added."""
    llama_cpp = pytest.importorskip("llama_cpp")
    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, None)
    opened: dict[Path, Any] = {}

    def ids(path: Path, text: str) -> list[int]:
        if path not in opened:
            opened[path] = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
        return list(opened[path].tokenize(text.encode(), add_bos=True, special=False))

    yield ids
    for model in opened.values():
        model.close()
    llama_cpp.llama_log_set(llama_cpp.llama_log_callback(0), None)


@pytest.mark.parametrize("name", [pre.name for pre in _KNOWN])
def test_llama_cpp_gives_our_ids_for_every_text(
    name: str, trained: Callable[..., Tokenizer], texts: list[str], make: Callable[..., Model],
    llama_ids: Callable[[Path, str], list[int]], tmp_path: Path,
) -> None:  # fmt: skip
    tokenizer = trained(name)
    save_gguf(make("llama", vocab_size=1510), tmp_path / "model.gguf", tokenizer)
    file = GGUF(tmp_path / "model.gguf")
    assert file.keys["tokenizer.ggml.pre"] == name
    for text in texts:
        assert llama_ids(tmp_path / "model.gguf", text) == tokenizer.encode(text), text
    again = read(file.keys, "it")
    assert again is not None
    assert again.data == tokenizer.data


def test_the_name_matters(
    trained: Callable[..., Tokenizer], texts: list[str], make: Callable[..., Model],
    llama_ids: Callable[[Path, str], list[int]], tmp_path: Path,
) -> None:  # fmt: skip
    """Under another name the same tokenizer gives other ids: the test above can fail."""
    tokenizer = trained("dbrx")
    save_gguf(make("llama", vocab_size=1510), tmp_path / "model.gguf", tokenizer)
    content = (tmp_path / "model.gguf").read_bytes()
    (tmp_path / "other.gguf").write_bytes(content.replace(b"\4\0\0\0\0\0\0\0dbrx", b"\4\0\0\0\0\0\0\0olmo", 1))
    different = [text for text in texts if llama_ids(tmp_path / "other.gguf", text) != tokenizer.encode(text)]
    assert len(different) > 10


def test_a_tokenizer_of_ours_comes_back_byte_for_byte(texts: list[str]) -> None:
    tokenizer = train_tokenizer(texts, 400)
    again = read(keys(tokenizer, 410), "it")
    assert again is not None
    assert again.files() == tokenizer.files()


def test_beginning_end_padding_and_template_come_back() -> None:
    plain = Backend.from_str(train_tokenizer(["a b c"], 257).data.decode())
    plain.add_special_tokens(["<begin>", "<pad>"])
    plain.add_tokens(["<think>"])
    config = {"bos_token": "<begin>", "pad_token": "<pad>", "add_bos_token": True, "chat_template": "{{ messages }}"}
    tokenizer = Tokenizer(plain.to_str(pretty=True).encode(), config)
    found = keys(tokenizer, 262)
    assert found["tokenizer.ggml.token_type"] == [3, *[1] * 256, 3, 3, 4, 5, 5]
    again = read(found, "it")
    assert again is not None
    assert (again.bos_id, again.eos_id, again.pad_id) == (257, 0, 258)
    assert {key: again.config[key] for key in config} == config
    assert again.encode("a<think><pad>b") == tokenizer.encode("a<think><pad>b")


def test_without_a_tokenizer_there_is_none(make: Callable[..., Model], tmp_path: Path) -> None:
    save_gguf(make("llama"), tmp_path / "model.gguf")
    assert read(GGUF(tmp_path / "model.gguf").keys, "it") is None


def changed(**of_model: Any) -> Callable[[dict[str, Any]], None]:
    return lambda parts: parts["model"].update(of_model)


def with_token(**flags: Any) -> Callable[[dict[str, Any]], None]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return lambda parts: parts["added_tokens"].append({"id": 257, "content": "<x>", **plain, **flags})


def split_by(**step: Any) -> Callable[[dict[str, Any]], None]:
    return lambda parts: parts["pre_tokenizer"]["pretokenizers"][0].update(step)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda parts: parts.update(normalizer={"type": "NFC"}), "normalises text (NFC), which llama.cpp would not"),
        (lambda parts: parts.update(decoder=None), "the tokenizer is BPE but only byte-level BPE is written"),
        (lambda parts: parts.update(model={"type": "WordLevel", "vocab": {END_OF_TEXT: 0}, "unk_token": END_OF_TEXT}),
         "the tokenizer is WordLevel but only byte-level BPE is written"),
        (changed(end_of_word_suffix="Ġ"), "has end_of_word_suffix 'Ġ', for which GGUF has no key"),
        (changed(dropout=0.5), "has dropout 0.5, for which GGUF has no key"),
        (split_by(pattern={"Regex": r"\p{L}+"}), r"no pre-tokenizer of GGUF that is known here (dbrx, "),
        (split_by(behavior="Removed"), "no pre-tokenizer of GGUF that is known here"),
        (lambda parts: parts.update(pre_tokenizer=None), "no pre-tokenizer of GGUF that is known here"),
        (with_token(lstrip=True), "token '<x>' takes in spaces or whole words"),
        (with_token(content="[PAD258]"), "has a token that is spelt like another or like [PAD0]"),
        (with_token(id=300), "the tokenizer has 301 tokens but the embedding 260 rows"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_llama_cpp_would_not_repeat_is_refused(
    change: Callable[[dict[str, Any]], None], reason: str
) -> None:
    parts = json.loads(train_tokenizer(["a b c"], 257).data)
    change(parts)
    tokenizer = Tokenizer(json.dumps(parts).encode())
    tokenizer.vocab_size = max(tokenizer.vocab_size, *(token["id"] + 1 for token in parts["added_tokens"]))
    with pytest.raises(UnsupportedError, match=re.escape(reason)):
        keys(tokenizer, 260)


def test_tokens_of_several_digits_stand_against_splitting_digits(trained: Callable[..., Tokenizer]) -> None:
    """llama.cpp's deepseek-llm keeps digits together, which makes a difference only where a token has two."""
    parts = json.loads(trained("deepseek-llm", 300).data)
    parts["model"]["vocab"]["12"] = len(parts["model"]["vocab"])
    parts["model"]["merges"].append(["1", "2"])
    with pytest.raises(UnsupportedError, match="splits digits but has tokens of several"):
        keys(Tokenizer(json.dumps(parts).encode()), 310)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("model", "llama", "tokenizer 'llama' with 'dbrx' but only gpt2 is read"),
        ("pre", "tekken", "tokenizer 'gpt2' with 'tekken' but only gpt2 is read, with dbrx"),
        ("add_space_prefix", True, "but only gpt2 is read"),
        ("tokens", ["a", "b"], "has 2 tokens but 260 types of tokens"),
        ("tokens", "abc", "has no tokenizer.ggml.tokens that is a list of str"),
        ("tokens", ["a"] * 260, "token 0, 'a', would become"),
        ("merges", ["a"], "has merges that do not fit its tokens"),
        ("merges", ["a never"], "has merges that do not fit its tokens"),
        ("token_type", [1.5] * 260, "has no tokenizer.ggml.token_type that is a list of int"),
        ("eos_token_id", 260, "says that token 260 is eos, which it does not have"),
        ("eos_token_id", 259, "says that token 259 is eos, which it does not have"),
        ("eos_token_id", None, "says that token None is eos, which it does not have"),
    ],
)
def test_keys_that_make_no_tokenizer_are_refused(key: str, value: Any, reason: str) -> None:
    found = {**keys(train_tokenizer(["a b c"], 257), 260), f"tokenizer.ggml.{key}": value}
    with pytest.raises((CheckpointError, UnsupportedError), match=re.escape(reason)):
        read(found, "it")
