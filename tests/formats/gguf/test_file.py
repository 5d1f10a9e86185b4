"""The container, read with every count held against the file: hostile or damaged, it is one error and no waiting."""

import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moekit.errors import CheckpointError, MoekitError
from moekit.formats.checkpoint import load
from moekit.formats.gguf import architecture
from moekit.formats.gguf.blocks import F32, Q8_0
from moekit.formats.gguf.export import save_gguf
from moekit.formats.gguf.file import GGUF, header
from moekit.formats.gguf.restore import import_gguf
from moekit.formats.tokenizer import Tokenizer
from moekit.nn.model import Model


def text(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


def start(tensors: int = 0, pairs: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, pairs)


def pair(key: bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def array(kind: int, count: int, content: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + content


def info(name: bytes, shape: tuple[int, ...], kind: int = 0, begin: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, begin)


HUGE = 2**63
HOSTILE = {
    "nothing": (b"", "cannot be read as GGUF"),
    "another format": (b"PK\x03\x04" + bytes(60), "does not begin with GGUF"),
    "the old version": (start(version=1), "version 1 but 2 and 3 are read"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version 50331648 but 2 and 3 are read"),
    "cut in the counts": (start()[:20], "claims 20 bytes at byte 4 but ends 16 bytes later"),
    "43 bytes, a huge array": (start(0, 1) + pair(b"k", 9, array(4, HUGE))[:19], "claims .* at byte"),
    "many pairs": (start(0, HUGE) + bytes(64), f"claims {HUGE} key-value pairs"),
    "many tensors": (start(HUGE, 0) + bytes(64), f"claims {HUGE} tensors"),
    "a long key": (start(0, 1) + struct.pack("<Q", HUGE) + bytes(64), "name of .* bytes but at most 65535"),
    "a long text": (start(0, 1) + text(b"k") + struct.pack("<IQ", 8, HUGE) + bytes(64), f"claims {HUGE} bytes"),
    "many numbers": (start(0, 1) + pair(b"k", 9, array(10, HUGE, bytes(64))), f"claims {HUGE} values in 'k'"),
    "many texts": (start(0, 1) + pair(b"k", 9, array(8, HUGE, bytes(64))), f"claims {HUGE} texts in 'k'"),
    "arrays in arrays": (start(0, 1) + pair(b"k", 9, array(9, 1, bytes(64))), "'k' is an array of type 9"),
    "an unknown type": (start(0, 1) + pair(b"k", 13, bytes(64)), "'k' has a value of type 13"),
    "half true": (start(0, 1) + pair(b"k", 7, b"\2" + bytes(64)), "'k' is a boolean but neither 0 nor 1"),
    "no text": (start(0, 1) + pair(b"k", 8, text(b"\xff\xfe")), "text that is not UTF-8"),
    "a key twice": (start(0, 2) + pair(b"k", 0, b"\1") * 2 + bytes(64), "has the key 'k' twice"),
    "alignment": (start(0, 1) + pair(b"general.alignment", 4, struct.pack("<I", 3)), "alignment is 3 but must be"),
    "no axes": (start(1) + info(b"t", ()) + bytes(64), "tensor 't' has 0 axes but must have 1 to 4"),
    "many axes": (start(1) + text(b"t") + struct.pack("<I", 2**31) + bytes(64), "tensor 't' has 2147483648 axes"),
    "an empty axis": (start(1) + info(b"t", (0, 5)) + bytes(64), r"tensor 't' has shape \(5, 0\), which F32 cannot"),
    "half a block": (start(1) + info(b"t", (31,), 8) + bytes(64), r"tensor 't' has shape \(31,\), which Q8_0 cannot"),
    "a huge tensor": (start(1) + info(b"t", (HUGE, HUGE)) + bytes(64), "tensor 't' ends at .* but the file has"),
    "an unknown tensor type": (start(1) + info(b"t", (4,), 14) + bytes(64), r"type 14 but only these .* Q8_0 \(8\)"),
    "an offset beyond": (start(1) + info(b"t", (4,), 0, HUGE) + bytes(64), "tensor 't' begins at .*, not behind"),
    "overlapping": (
        start(2) + info(b"t", (16,)) + info(b"u", (16,)) + bytes(256),
        "tensor 'u' begins at 0, not",
    ),
    "a tensor twice": (start(2) + info(b"t", (8,)) + info(b"t", (8,), 0, 32) + bytes(99), "has the tensor 't' twice"),
    "more than it lists": (start(1) + info(b"t", (8,)) + bytes(99), "bytes of tensors but lists 32"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_one_error(tmp_path: Path, name: str) -> None:
    content, reason = HOSTILE[name]
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=reason) as caught:
        GGUF(tmp_path / "x.gguf")
    assert "\n" not in str(caught.value)


def test_every_kind_of_value_comes_back(tmp_path: Path) -> None:
    keys = {"a": True, "b": 7, "c": 0.1, "d": "é", "e": ["x", "", "ö"], "f": [1, -2], "g": [], "h": False}
    content, size = header(keys, [("t", (2, 3), F32), ("u", (3, 64), Q8_0)])
    data = torch.randint(256, (size,), dtype=torch.uint8)
    (tmp_path / "x.gguf").write_bytes(content + data.numpy().tobytes())
    file = GGUF(tmp_path / "x.gguf")
    assert file.keys == {**keys, "c": struct.unpack("<f", struct.pack("<f", 0.1))[0]}
    assert torch.equal(file.tensor("t"), data[:24].view(2, 12))
    assert torch.equal(file.tensor("u"), data[32 : 32 + 3 * 68].view(3, 68))


@pytest.fixture
def whole(make: Callable[..., Model], tokenizer: Tokenizer, tmp_path: Path) -> bytes:
    save_gguf(make("deepseek2 groups"), tmp_path / "model.gguf", tokenizer)
    return (tmp_path / "model.gguf").read_bytes()


def test_a_file_that_was_cut_short_is_never_read(whole: bytes, tmp_path: Path) -> None:
    begin = len(whole) - GGUF(tmp_path / "model.gguf")._data
    for length in [*range(0, len(whole) - begin, 97), *range(len(whole) - begin, len(whole) - 1, 9973), len(whole) - 1]:
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            GGUF(tmp_path / "cut.gguf")


INPUTS = 500


def test_a_damaged_header_is_an_error_or_the_same_model(whole: bytes, tmp_path: Path) -> None:
    """Bits, bytes, lengths and runs of the header are changed; what only training or the tokenizer reads may differ."""
    import_gguf(tmp_path / "model.gguf", tmp_path / "model")
    model, draw, sound = load(tmp_path / "model"), random.Random(0), 0
    computed = {key: value for key, value in architecture.keys(model.config).items() if key != architecture.OWN}
    data = GGUF(tmp_path / "model.gguf")._data
    table = whole.index(b"token_embd.weight") - 8
    for number in range(INPUTS):
        content = bytearray(whole)
        at = draw.choice([draw.randrange(data - 8), draw.randrange(table, data - 8), draw.randrange(24)])
        kind = draw.randrange(5)
        if kind == 0:
            content[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            content[at] = draw.randrange(256)
        elif kind == 2:
            content[at : at + 8] = struct.pack("<Q", draw.choice([0, 1, 2**31, 2**32 - 1, 2**62, 2**64 - 1]))
        elif kind == 3:
            del content[at : at + draw.randrange(1, 40)]
        else:
            content[at:at] = draw.randbytes(draw.randrange(1, 40))
        (tmp_path / "other.gguf").write_bytes(content)
        try:
            import_gguf(tmp_path / "other.gguf", tmp_path / f"model {number}")
        except MoekitError as error:
            sound += "\n" not in str(error)
            continue
        again = load(tmp_path / f"model {number}")
        assert {key: architecture.keys(again.config)[key] for key in computed} == computed
        assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
        sound += 1
    assert sound == INPUTS
