"""Tokenizers: any text survives, equal input gives equal bytes, and Hugging Face reads what we write."""

import gzip
import json
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from moekit.errors import CheckpointError, ConfigError, DataError
from moekit.formats.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

TEXT = files("moekit") / "quickstart" / "text"
ODD = [
    "",
    " ",
    "\r\n \t\n\n  ",
    "\x00\x01\x7f\x85",
    "👩‍👩‍👧‍👦 🇩🇪 e\u0301 \u200b\u2028\ufeff",
    "\uffff\U0010ffff\ue000",
    "日本語とEnglish、12345678。",
    "if (x<10){return y_1 += 0x1F;}",
    "<|endoftext|> </s> <0x0A> ▁",
]


def sample(domain: str, split: str = "train") -> list[str]:
    with (TEXT / f"{domain}.{split}.jsonl.gz").open("rb") as raw:
        return [json.loads(line)["text"] for line in gzip.open(raw)]


def train() -> Tokenizer:
    return train_tokenizer(
        [text for name in ("math_en", "poetry_zh", "spec_en") for text in sample(name, "valid")], 800
    )


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train()


@pytest.mark.parametrize("text", ODD)
def test_odd_text_comes_back_and_its_bytes_add_up(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


@settings(deadline=None, max_examples=200)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back_and_its_bytes_add_up(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


def test_a_batch_equals_one_by_one(tokenizer: Tokenizer) -> None:
    texts = ODD + sample("gov_en", "valid")
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_special_tokens_in_text_are_text(tokenizer: Tokenizer) -> None:
    text = "a<|endoftext|>b"
    assert tokenizer.eos_id not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_digits_are_split_in_groups_of_at_most_three() -> None:
    tokenizer = train_tokenizer(["1234567 1234567 1234567 years"] * 50, 300)
    assert [tokenizer.decode([i]) for i in tokenizer.encode("1234567")] == ["123", "456", "7"]


def test_training_is_the_same_in_another_process_with_other_threads(tokenizer: Tokenizer) -> None:
    program = "from tests.formats.test_tokenizer import train; print(train().fingerprint)"
    environment = {"RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "7", "PYTHONPATH": ":".join(sys.path)}
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, cwd=root)
    assert run.stdout.strip() == tokenizer.fingerprint, run.stderr


def test_a_lone_surrogate_is_a_data_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="half a surrogate pair at character 2"):
        tokenizer.encode("ab\udc00")


def test_a_vocabulary_smaller_than_the_bytes_is_refused() -> None:
    with pytest.raises(ConfigError, match="vocab_size is 256"):
        train_tokenizer(["a"], 256)


def test_text_without_merges_gives_the_bytes_and_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert train_tokenizer([], 300).vocab_size == 257
    assert "257 tokens, 300 were asked for" in caplog.text


def test_saving_and_loading_keeps_every_byte(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "a")
    load_tokenizer(tmp_path / "a").save(tmp_path / "b")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    again = load_tokenizer(tmp_path / "b" / "tokenizer.json")
    assert (again.fingerprint, again.eos_id, again.vocab_size) == (tokenizer.fingerprint, tokenizer.eos_id, 800)


def test_transformers_gives_the_same_ids(tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token_id == tokenizer.eos_id
    for text in [text for text in ODD if "<|endoftext|>" not in text] + sample("spec_en", "valid")[:2]:
        assert theirs(text)["input_ids"] == tokenizer.encode(text)
        assert theirs.decode(tokenizer.encode(text)) == text


def sentencepiece_like(eos: str) -> tokenizers.Tokenizer:
    """A byte-fallback BPE with metaspaces, as the Llama and DeepSeek-LLM families have."""
    backend = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    specials = ["<unk>", "<s>", eos]
    byte_tokens = [f"<0x{number:02X}>" for number in range(256)]
    corpus = ["the cat sat on the mat and the dog sat too"] * 20
    backend.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=60, special_tokens=specials, show_progress=False)
    )
    described = json.loads(backend.to_str())
    vocab = described["model"]["vocab"]
    vocab.update({token: len(vocab) + number for number, token in enumerate(byte_tokens)})
    return tokenizers.Tokenizer.from_str(json.dumps(described))


def test_bytes_of_a_byte_fallback_vocabulary_add_up(tmp_path: Path) -> None:
    sentencepiece_like("</s>").save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    text = "the cat é 猫 sat"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.token_bytes()[tokenizer.encode(text)].sum() == len(text.encode())
    assert tokenizer.bos_id == 1
    assert tokenizer.eos_id == 2
    assert not tokenizer.token_bytes()[:3].any()


def test_a_length_limit_inside_the_file_does_not_cut_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_str(tokenizer.data.decode())
    backend.enable_truncation(4)
    backend.enable_padding(length=16)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode("a longer text, certainly") == tokenizer.encode("a longer text, certainly")


def test_ids_beyond_a_gap_count(tokenizer: Tokenizer) -> None:
    described = json.loads(tokenizer.data)
    extra = {**described["added_tokens"][0], "id": 900, "content": "<tool>", "special": False}
    described["added_tokens"].append(extra)
    described["model"]["vocab"]["<tool>"] = 900
    sparse = Tokenizer(json.dumps(described).encode())
    assert sparse.vocab_size == 901
    lengths = sparse.token_bytes()
    assert lengths.dtype == np.int64
    assert lengths[900] == len("<tool>")
    assert lengths[850] == 0


@pytest.mark.parametrize("value", ["<stop>", {"content": "<stop>", "__type": "AddedToken"}])
def test_end_of_text_comes_from_the_config(tmp_path: Path, value: object) -> None:
    sentencepiece_like("<stop>").save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match=r'no known end-of-text token .*"eos_token"'):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": value, "model_max_length": 7}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_id == tokenizer.pad_id == 2
    tokenizer.save(tmp_path / "copy")
    assert json.loads((tmp_path / "copy" / "tokenizer_config.json").read_text())["model_max_length"] == 7


def test_bad_files_are_checkpoint_errors_that_name_them(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json does not exist"):
        load_tokenizer(tmp_path)
    for content in (b"{}", b"[", b"\xff\xfe", b""):
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"tokenizer\.json is not"):
            load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(tokenizer.data)
    configs = {
        "{": "Invalid JSON",
        "[]": r"Input should be an object, found \[\]",
        '{"eos_token": "<no>"}': "eos_token is '<no>'",
        '{"eos_token": 3}': "3",
    }
    for config, message in configs.items():
        (tmp_path / "tokenizer_config.json").write_text(config)
        with pytest.raises(CheckpointError, match=message):
            load_tokenizer(tmp_path)


def test_words_without_end_do_not_stall_the_training() -> None:
    # as one word each, these take longer than anybody waits
    tokenizer = train_tokenizer(["a" * 3_000_000, "ACGGT" * 400_000, "plain words stay as they are"], vocab_size=280)
    assert tokenizer.decode(tokenizer.encode("aaaa ACGGT plain")) == "aaaa ACGGT plain"
