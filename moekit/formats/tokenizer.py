"""Text to token ids and back: a thin layer over `tokenizers` that reads and writes Hugging Face's tokenizer.json."""

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from moekit.errors import CheckpointError, ConfigError, DataError
from moekit.files import read_bytes, read_json, write
from moekit.formats.guard import check_folder

logger = logging.getLogger(__name__)

END_OF_TEXT, MIN_VOCAB_SIZE = "<|endoftext|>", 257  # every byte and end-of-text
GAPS = 10_000  # ids without a token that are borne with; a table of ids must not fill the memory
# Tried in this order where tokenizer_config.json names no token.
EOS_NAMES = (END_OF_TEXT, "</s>", "<｜end▁of▁sentence｜>", "<|end_of_text|>", "<eos>")  # noqa: RUF001
BOS_NAMES = ("<s>", "<｜begin▁of▁sentence｜>", "<|begin_of_text|>", "<bos>")  # noqa: RUF001
PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>", "<｜▁pad▁｜>")  # noqa: RUF001

# Contractions; a word with one leading mark or space; one to three digits; punctuation; line ends; other white space.
# The pattern is Llama 3's to the letter: runtimes that rebuild pre-tokenizers by name (GGUF) know it.
PRE_TOKENIZER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer:
    """A vocabulary. `data` is the content of a tokenizer.json, `config` that of the tokenizer_config.json beside it.

    Text that happens to spell a special token is text: `encode("<|endoftext|>")` never gives `eos_id`.
    """

    def __init__(self, data: bytes, config: dict[str, Any] | None = None, name: str = "tokenizer.json"):
        try:
            self._plain = tokenizers.Tokenizer.from_str(data.decode())
        except Exception as error:  # the library raises bare Exception
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"{name} is not a tokenizer.json that `tokenizers` can read: {reason}") from None
        self._plain.no_truncation()  # a file may carry a length limit, which would cut documents without a word
        self._plain.no_padding()
        self._plain.encode_special_tokens = True
        self.data, self.config = data, dict(config or {})
        ids = self._plain.get_vocab(with_added_tokens=True).values()
        self.vocab_size = max(ids, default=-1) + 1
        if not 0 < self.vocab_size <= 2 * len(ids) + GAPS:
            raise CheckpointError(
                f"{name} has {len(ids)} tokens with ids up to {self.vocab_size - 1}, which no model has"
            )
        self.bos_id = self._special("bos_token", BOS_NAMES, name)
        pad_id = self._special("pad_token", PAD_NAMES, name)
        eos_id = self._special("eos_token", EOS_NAMES, name)
        if eos_id is None:
            raise CheckpointError(
                f"{name} has no known end-of-text token ({', '.join(EOS_NAMES)}); "
                'put a tokenizer_config.json with "eos_token" beside it'
            )
        self.eos_id = eos_id
        self.pad_id = eos_id if pad_id is None else pad_id

    def _special(self, key: str, names: Sequence[str], where: str) -> int | None:
        """Returns the id of the token that the config calls `key`, else of the first special one of `names`."""
        token = self.config.get(key)
        if isinstance(token, dict):  # an AddedToken as transformers wrote it before version 5
            token = token.get("content")
        if token is None:
            special = {t.content: i for i, t in self._plain.get_added_tokens_decoder().items() if t.special}
            return next((special[name] for name in names if name in special), None)
        if not isinstance(token, str) or (number := self._plain.token_to_id(token)) is None:
            raise CheckpointError(f"tokenizer_config.json says {key} is {token!r}, which {where} does not contain")
        return number

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`; nothing is added."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns `encode` of each text; the texts are shared out over the processor's cores."""
        batch = self._plain.encode_batch_fast([_encodable(text) for text in texts], add_special_tokens=False)
        return [encoding.ids for encoding in batch]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`, special tokens included; bytes that are not UTF-8 become U+FFFD."""
        return str(self._plain.decode(list(ids), skip_special_tokens=False))

    @property
    def fingerprint(self) -> str:
        """The sha256 of tokenizer.json: equal fingerprints give equal ids."""
        return hashlib.sha256(self.data).hexdigest()

    def token_bytes(self) -> np.ndarray:
        """Returns, for every id, how many UTF-8 bytes of text it stands for (int64); special tokens count 0.

        Exact for byte-level BPE: over `encode(text)` the counts add up to the bytes of `text`. SentencePiece-like
        vocabularies: `▁` is one space and `<0xAB>` one byte, so the sum is one larger where a leading space was put in.
        Any other vocabulary: the bytes of the token as it is spelt, less a `##` prefix; spaces that it drops are lost.
        """
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        parts = json.loads(self.data)
        byte_level = '"ByteLevel"' in json.dumps([parts.get("pre_tokenizer"), parts.get("decoder")])
        byte_fallback = parts["model"].get("byte_fallback", False)
        for token, number in self._plain.get_vocab(with_added_tokens=False).items():
            if byte_level:
                lengths[number] = len(token)  # one character of the byte-level alphabet is one byte
            elif byte_fallback and re.fullmatch("<0x[0-9A-F]{2}>", token):
                lengths[number] = 1
            else:
                lengths[number] = len(token.removeprefix("##").replace("▁", " ").encode())
        for number, added in self._plain.get_added_tokens_decoder().items():
            lengths[number] = 0 if added.special else len(added.content.encode())
        lengths[self.eos_id] = 0
        return lengths

    def token_texts(self) -> list[str]:
        """Returns, for every id, the text that it stands for, with its leading space; an id without a token gives "".

        Special tokens as they are spelt; bytes that are no whole character become U+FFFD.
        """
        texts = [""] * self.vocab_size
        vocabulary = self._plain.get_vocab(with_added_tokens=True)
        decoded = self._plain.decode_batch([[number] for number in vocabulary.values()], skip_special_tokens=False)
        for (token, number), text in zip(vocabulary.items(), decoded, strict=True):
            # SentencePiece's decoders take the space from the first word of a text
            texts[number] = token.replace("▁", " ") if "▁" in token else text
        return texts

    def files(self) -> dict[str, bytes]:
        """Returns the two files that hold this tokenizer, by name."""
        tokens = {"bos_token": self.bos_id, "eos_token": self.eos_id}
        defaults = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,  # would change spaces before punctuation when decoding
            **{key: None if number is None else self._plain.id_to_token(number) for key, number in tokens.items()},
        }
        config = {**defaults, **{key: value for key, value in self.config.items() if value is not None}}
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        return {"tokenizer.json": self.data, "tokenizer_config.json": text.encode()}

    def save(self, directory: str | Path) -> None:
        """Writes tokenizer.json, byte for byte as it was read or trained, and tokenizer_config.json."""
        for name, content in self.files().items():
            write(Path(directory) / name, content)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Returns the tokenizer of a directory or of a tokenizer.json file.

    Raises CheckpointError when there is none, when it cannot be read, or when its end-of-text token is unknown.
    """
    path = Path(path)
    if path.is_dir():
        check_folder(path, ("tokenizer.json", "tokenizer_config.json"))  # prepared data may lie on another disk
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"{file} does not exist; give a tokenizer.json or a directory that holds one")
    beside = file.parent / "tokenizer_config.json"
    config = read_json(beside, dict[str, Any], CheckpointError) if beside.is_file() else None
    return Tokenizer(read_bytes(file, CheckpointError), config, str(file))


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Returns a byte-level BPE vocabulary of at most `vocab_size` entries; equal texts give equal bytes.

    Holds all 256 bytes, so any text survives encode and decode, and one special token, `<|endoftext|>`. Smaller than
    asked for (a warning says so) when the texts offer fewer merges. Raises ConfigError when `vocab_size` is under 257.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ConfigError(f"vocab_size is {vocab_size} but 256 bytes and {END_OF_TEXT} need at least {MIN_VOCAB_SIZE}")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PRE_TOKENIZER), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(map(_broken, map(_encodable, texts)), trainer)
    if (found := backend.get_vocab_size()) < vocab_size:
        logger.warning("the text gave a vocabulary of %d tokens, %d were asked for", found, vocab_size)
    return Tokenizer(backend.to_str(pretty=True).encode())


LONGEST_WORD = 256
"""Letters in a row from which merges are learned; learning from one word of millions takes hours (DNA, base64)."""


def _broken(text: str) -> str:
    """Returns the text with a line end inside every run of letters and digits that is longer than `LONGEST_WORD`."""
    return re.sub(rf"(\w{{{LONGEST_WORD}}})(?=\w)", r"\1\n", text)


def _encodable(text: str) -> str:
    """Returns `text`; raises DataError when it holds half a surrogate pair, which no UTF-8 file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"text holds half a surrogate pair at character {error.start}") from None
    return text
