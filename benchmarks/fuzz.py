"""Whether any damaged or hostile model directory crashes a reader or gives another model unnoticed.

    python benchmarks/fuzz.py --inputs 40000 --out docs/results/fuzz.md

Each input is a small valid directory with one to three seeded changes. It is read with the manifest as it was (any
difference must be refused), with a manifest that fits the changed files, without one, and by `moekit verify`.
Outcomes: `refused` by an error of one line; `same` model; `another` model, sound in itself, which only the hashes tell
apart (other weights, other settings of equal shapes); `wrong`: changed although the hashes are checked, or weights
of another shape or type, or not finite; `crash`: any other exception.
"""

import argparse
import json
import os
import pickle
import random
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moekit import files, receipts
from moekit.config import ModelConfig
from moekit.errors import MoekitError
from moekit.formats import weights
from moekit.formats.checkpoint import load, save
from moekit.formats.directory import MANIFEST
from moekit.formats.tokenizer import load_tokenizer, train_tokenizer
from moekit.formats.verify import verify
from moekit.nn.model import Model
from moekit.nn.quantized import quantize_

Content = dict[str, Any]
"""Name -> bytes, or a path that a link is to lead to."""
MODES = ("manifest kept", "manifest made to fit", "no manifest", "verify")
ODD: list[Any] = [
    None, True, -1, 0, 1, 3, 2**31, 2**63, 10**12, 10**30, 1e308, float("nan"), float("inf"), 0.5, "", "x", "../x",
    "/etc/passwd", "\u0000", "model.safetensors", [], [1], {}, {"a": 1},
]  # fmt: skip


class Source(NamedTuple):
    """A valid directory: its files and what loading it gives."""

    content: Content
    config: ModelConfig
    state: dict[str, Tensor]


class Outcome(NamedTuple):
    mode: str
    changes: tuple[str, ...]
    result: str
    detail: str
    seconds: float


def sources(folder: Path) -> list[Source]:
    """Returns directories of all kinds: files or shards, numbers or codes, bias, hash table, MLA, others' layouts."""
    tokenizer = train_tokenizer(["it was the best of times, it was the worst of times\n"], 280)
    mha = {"kind": "mha", "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 6}
    mla = {"kind": "mla", "num_attention_heads": 2, "kv_lora_rank": 5, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2}
    moe = {"kind": "moe", "n_routed_experts": 3, "n_shared_experts": 1, "num_experts_per_tok": 2}
    bias = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
    made = []
    dense = {"first_k_dense_replace": 1, "intermediate_size": 14}
    for number, (attention, ffn, dtype, shard_bytes, layout) in enumerate((
        (mha, dense, "float32", 5_000_000, "moekit"),
        (mha, bias, "bfloat16", 9_000, "moekit"),
        ({**mla, "v_head_dim": 3}, {}, "int4", 5_000_000, "moekit"),
        (mha, {"topk_method": "hash"}, "int8", 15_000, "moekit"),
        (mha, dense, "float32", 15_000, "deepseek"),
        ({**mla, "v_head_dim": 3}, {**bias, "norm_topk_prob": True}, "bfloat16", 5_000_000, "deepseek_v3"),
    )):  # fmt: skip
        sizes = {"vocab_size": 280, "hidden_size": 12, "num_hidden_layers": 2, "max_position_embeddings": 32}
        parts = {"attention": attention, "ffn": {**moe, "moe_intermediate_size": 8, **ffn}}
        config = ModelConfig.model_validate({**sizes, **parts, "initializer_range": 0.2})
        torch.manual_seed(number)
        model = Model(config)
        if dtype.startswith("int"):
            quantize_(model, dtype)
        else:
            model.to(getattr(torch, dtype))
        usual, weights.SHARD_BYTES = weights.SHARD_BYTES, shard_bytes
        save(model, folder / str(number), tokenizer, layout=layout)
        weights.SHARD_BYTES = usual
        content = {file.name: file.read_bytes() for file in (folder / str(number)).iterdir()}
        again = load(folder / str(number))
        made.append(Source(content, again.config, {k: v.clone() for k, v in again.state_dict().items()}))
    return made


# Changes: each takes a content that it may change, and returns what it did.


def _pick(draw: random.Random, content: Content, suffix: str = "") -> str:
    names = sorted(name for name, held in content.items() if name.endswith(suffix) and isinstance(held, bytes))
    return draw.choice(names or sorted(name for name, held in content.items() if isinstance(held, bytes)))


def bytes_changed(draw: random.Random, content: Content) -> str:
    name = _pick(draw, content)
    old = content[name]
    a, b = sorted((draw.randrange(len(old) + 1), draw.randrange(len(old) + 1)))
    how = draw.choice(("flip", "cut", "insert", "delete", "zero", "repeat", "append"))
    if how == "flip":
        new = bytearray(old or b"\0")
        for _ in range(draw.choice((1, 1, 1, 2, 8))):
            new[draw.randrange(len(new))] ^= 1 << draw.randrange(8)
        content[name] = bytes(new)
        return "bits flipped"
    more = draw.randbytes(draw.choice((1, 2, 8, 100)))
    content[name] = {
        "cut": old[:a],
        "insert": old[:a] + more + old[a:],
        "delete": old[:a] + old[b:],
        "zero": old[:a] + bytes(b - a) + old[b:],
        "repeat": old[:b] + old[a:b] + old[b:],
        "append": old + more,
    }[how]
    return f"bytes: {how}"


def begin_changed(draw: random.Random, content: Content) -> str:
    """Flips bits where they hurt most: lengths and headers."""
    name = _pick(draw, content, ".safetensors")
    new = bytearray(content[name])
    for _ in range(draw.choice((1, 1, 2))):
        if new:
            new[draw.randrange(min(len(new), draw.choice((8, 64, 4000))))] ^= 1 << draw.randrange(8)
    content[name] = bytes(new)
    return "bits of a header flipped"


def numbers_changed(draw: random.Random, content: Content) -> str:
    """Overwrites some of the numbers: bits of NaN or infinity in either width, zeros, noise."""
    name = _pick(draw, content, ".safetensors")
    new = bytearray(content[name])
    begin = min(len(new), 8 + int.from_bytes(new[:8], "little"))
    size = 4 * draw.choice((1, 1, 4, 50))
    place = begin + 4 * draw.randrange(max(1, (len(new) - begin) // 4))
    pattern = draw.choice((b"\xff", b"\0\0\x80\x7f", b"\x80\x7f", b"\x80\xff", b"\0", draw.randbytes(4)))
    new[place : place + size] = (pattern * size)[: len(new[place : place + size])]
    content[name] = bytes(new)
    return "numbers overwritten"


def file_changed(draw: random.Random, content: Content) -> str:
    name, other = _pick(draw, content), _pick(draw, content)
    how = draw.choice(("removed", "empty", "swapped", "copied", "pickle", "noise", "link out", "link in", "renamed"))
    if how == "swapped":
        content[name], content[other] = content[other], content[name]
    elif how in ("removed", "renamed"):
        content.update({f"{name}.bin": content.pop(name)} if how == "renamed" else {})
        content.pop(name, None)
    elif how == "link out":
        content[name] = Path(draw.choice(("/dev/zero", "/etc/hostname", "/nowhere", "..", name)))
    else:
        content[name] = {
            "empty": b"",
            "copied": content[other],
            "pickle": pickle.dumps({"a": [1.0] * 9}, protocol=draw.randrange(6)),
            "noise": draw.randbytes(draw.choice((3, 100, 5000))),
            "link in": Path(other) if other != name else b"",
        }[how]
    return f"file: {how}"


def _places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    found = [path] if path else []
    for key, value in items:
        found += _places(value, (*path, key))
    return found


def _edited(draw: random.Random, tree: Any) -> tuple[bytes, str]:
    """Returns JSON with one place of it changed, and how."""
    places = _places(tree)
    if not places:
        return json.dumps(draw.choice(ODD)).encode(), "replaced"
    *parents, last = draw.choice(places)
    part = tree
    for key in parents:
        part = part[key]
    how = draw.choice(("value", "value", "value", "other value", "removed", "renamed", "twice", "deep"))
    if how == "value":
        part[last] = draw.choice(ODD)
    elif how == "other value":
        part[last] = _value(tree, draw.choice(places))
    elif how == "removed" or not isinstance(part, dict):
        del part[last]
    elif how == "renamed":
        part[draw.choice(("x", "", f"{last}s", str(last).upper(), "a\nb", "\x1b[31m"))] = part.pop(last)
    elif how == "deep":
        for _ in range(draw.choice((5, 190, 3000))):
            part[last] = {"a": part[last]} if draw.random() < 0.5 else [part[last]]
        try:
            return json.dumps(tree).encode(), how
        except RecursionError:
            return b"[" * 100_000, how
    text = json.dumps(tree)
    if how == "twice" and isinstance(part, dict):
        entry = f"{json.dumps(last)}: {json.dumps(part[last])}"
        text = text.replace(entry, f"{entry}, {json.dumps(last)}: {json.dumps(draw.choice((part[last], *ODD)))}", 1)
    return text.encode(), how


def _value(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def json_changed(draw: random.Random, content: Content) -> str:
    name = draw.choice(("config.json", _pick(draw, content, ".json")))
    try:
        content[name], how = _edited(draw, json.loads(content[name]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return bytes_changed(draw, content)
    return f"JSON: {how}"


def header_changed(draw: random.Random, content: Content) -> str:
    """Rewrites a safetensors header under its right length: offsets, types and shapes swapped, names changed."""
    name = _pick(draw, content, ".safetensors")
    old = content[name]
    try:
        length = int.from_bytes(old[:8], "little")
        header = json.loads(old[8 : 8 + length])
        one, other = (header[draw.choice([key for key in header if key != "__metadata__"])] for _ in range(2))
        how = draw.choice(("offsets", "dtypes", "shapes", "dtype", "turned", "renamed", "moved", "huge", "any", "any"))
        if how in ("offsets", "dtypes", "shapes"):
            field = {"offsets": "data_offsets", "dtypes": "dtype", "shapes": "shape"}[how]
            one[field], other[field] = other[field], one[field]
        elif how == "dtype":
            alike = {"F32": "I32", "BF16": "F16", "U8": "I8", "I8": "U8", "I64": "F64"}[one["dtype"]]
            one["dtype"] = draw.choice(
                (alike,) * 9 + ("F16", "BF16", "F32", "I32", "I16", "U8", "I8", "F8_E4M3", "F4", "I64", "C64")
            )
        elif how == "turned":
            one["shape"].reverse()
        elif how == "renamed":
            key, other_key = (draw.choice(list(header)) for _ in range(2))
            header[key], header[other_key] = header[other_key], header[key]
        elif how == "moved":
            one["data_offsets"] = [end + draw.choice((-1, 1, 2, 8, 2**40, -(2**40))) for end in one["data_offsets"]]
        elif how == "huge":
            one["shape"] = draw.choice(([2**62, 4], [0, 2**62], [10**30], [-1], [1] * 5000, [2**32, 2**32, 2**32]))
        text, how = (json.dumps(header).encode(), how) if how != "any" else _edited(draw, header)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return bytes_changed(draw, content)
    claimed = draw.choice((len(text),) * 9 + (draw.choice((0, 1, len(text) - 1, 2**31, 2**63, 2**64 - 1, 99_000_000)),))
    content[name] = claimed.to_bytes(8, "little") + text + old[8 + length :]
    return f"header: {how}"


CHANGES: tuple[Callable[[random.Random, Content], str], ...] = (
    bytes_changed, begin_changed, numbers_changed, file_changed, json_changed, json_changed, header_changed,
    header_changed,
)  # fmt: skip


def put(folder: Path, content: Content, before: Content) -> None:
    """Makes the folder hold `content`, given that it holds `before`."""
    for name in before.keys() | content.keys():
        if content.get(name) == before.get(name):
            continue
        (folder / name).unlink(missing_ok=True)
        if isinstance(content.get(name), Path):
            (folder / name).symlink_to(content[name])
        elif name in content:
            (folder / name).write_bytes(content[name])


def fitted(content: Content) -> Content:
    """Returns the content with a manifest that fits it, links aside."""
    with tempfile.TemporaryDirectory() as name:
        held = {name: value for name, value in content.items() if isinstance(value, bytes) and name != MANIFEST}
        put(Path(name), held, {})
        listed = files.hashes(Path(name), held)
    return {**content, MANIFEST: json.dumps({"format": 1, "files": listed}).encode()}


def _differ(one: Content, other: Content) -> bool:
    """Returns whether two contents say different things; a manifest may be spelt in another way.

    Without manifest and receipt another library's layout says the same: that library writes neither.
    """
    if not {MANIFEST, receipts.FILE} & one.keys() and "deepseek" in json.loads(other["config.json"])["model_type"]:
        one = one | {name: other[name] for name in (MANIFEST, receipts.FILE)}
    try:
        manifests = [json.loads(content[MANIFEST]) for content in (one, other)]
    except (KeyError, TypeError, ValueError, RecursionError):
        return True
    return {**one, MANIFEST: manifests[0]} != {**other, MANIFEST: manifests[1]}


def judge(folder: Path, mode: str, source: Source, changed: bool) -> tuple[str, str]:
    """Returns the outcome of reading the folder, with the message."""
    try:
        if mode == "verify":
            document = verify(folder)
            json.dumps(document, allow_nan=False)
            if not document["held"]:
                return "refused", next(one["name"] for one in document["checks"] if not one["held"])
            return ("wrong", "every check held") if changed else ("same", "")
        model = load(folder, check_hashes=mode != "no manifest")
        if (folder / "tokenizer.json").is_file():
            load_tokenizer(folder).encode("the best of times")
        state = model.state_dict()
        alike = state.keys() == source.state.keys() and model.config == source.config
        if alike and all(torch.equal(one, source.state[key]) for key, one in state.items()):
            return "same", ""
        if mode == "manifest kept":
            return "wrong", "changed, although the hashes are checked"
        if not all(bool(one.isfinite().all()) for one in state.values()):
            return "wrong", "not finite"
        if model.config == source.config and any(
            (one.shape, one.dtype) != (source.state[key].shape, source.state[key].dtype) for key, one in state.items()
        ):
            return "wrong", "weights of another shape or type"
        with torch.no_grad():
            model(torch.zeros(1, 3, dtype=torch.int64))
        return "another", ""
    except MoekitError as error:
        return ("refused", str(error)) if "\n" not in str(error) else ("crash", f"two lines: {error!r}")
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return "crash", f"{type(error).__name__}: {error}"


def fuzz(inputs: int, seed: int, folder: Path) -> list[Outcome]:
    """Returns what became of so many inputs."""
    made = sources(folder / "sources")
    outcomes = []
    for number in range(inputs):
        draw = random.Random(seed * 10**9 + number)
        mode = draw.choices(MODES, (3, 3, 3, 1))[0]
        source = draw.choice(made)
        content = dict(source.content)
        changes = tuple(draw.choice(CHANGES)(draw, content) for _ in range(draw.choice((1, 1, 1, 2, 3))))
        content = fitted(content) if mode == "manifest made to fit" else content
        place = folder / "input"
        place.mkdir(exist_ok=True)
        put(place, content, {})
        begin = time.perf_counter()
        result, detail = judge(place, mode, source, _differ(content, source.content))
        outcomes.append(Outcome(mode, changes, result, detail, time.perf_counter() - begin))
        shutil.rmtree(place)
    return outcomes


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=40_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="results file; without it the counts go to standard output")
    parser.add_argument("--commit", default="unknown")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as name:
        folder = Path(name)
        (folder / "sources").mkdir()
        fuzz(200, args.seed + 1, folder)  # what is imported and built on first use is not an input's memory
        shutil.rmtree(folder / "sources")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        outcomes = fuzz(args.inputs, args.seed, folder)
        more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    kinds = ("refused", "same", "another", "wrong", "crash")
    counts = Counter((one.mode, one.result) for one in outcomes)
    tried = Counter(change for one in outcomes for change in one.changes)
    slowest = max(outcomes, key=lambda one: one.seconds)
    rows = [f"| {m} | {' | '.join(f'{counts[m, k]:,}' for k in kinds)} |" for m in MODES]
    total = [f"{sum(counts[mode, kind] for mode in MODES):,}" for kind in kinds]
    ran = receipts.versions()
    lines = [
        "# Damaged and hostile directories", "",
        f"`python benchmarks/fuzz.py --inputs {args.inputs} --seed {args.seed}`, commit {args.commit}, moekit "
        f"{ran['moekit']}, torch {ran['torch']}, safetensors {ran['safetensors']}, {ran['system']}.", "",
        "Small valid directories of six kinds with one to three changes each, read in four ways; what the outcomes "
        "mean stands at the top of the script.", "",
        f"| {args.inputs:,} inputs | {' | '.join(kinds)} |", "| --- |" + " --- |" * len(kinds), *rows,
        f"| all | {' | '.join(total)} |", "",
        f"The slowest input took {slowest.seconds:.2f} s ({', '.join(slowest.changes)}); all of them together raised "
        f"the process's peak memory by {more / 1024:.0f} MiB.", "",
        "Changes: " + ", ".join(f"{change} {count:,}" for change, count in sorted(tried.items())) + ".", "",
    ]  # fmt: skip
    bad = [one for one in outcomes if one.result in ("wrong", "crash")]
    lines += [f"- {one.result}, {one.mode}, {', '.join(one.changes)}: {one.detail[:300]}" for one in bad[:40]]
    if args.out:
        args.out.write_text("\n".join(lines), encoding="utf-8")
    else:
        sys.stdout.write("\n".join(lines))


if __name__ == "__main__":
    main()
