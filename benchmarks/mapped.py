"""A model that stays in its files: seconds to the first token, decoding speed and memory, beside the loaded one.

    python benchmarks/mapped.py --dtype int4 --work /big/disk --out benchmarks/results/mapped_int4.md
    python benchmarks/mapped.py --dtype bfloat16 --ways mapped --work /big/disk

Writes random weights of a model's shape below --work, tensor by tensor, unless they are there. Each way of loading runs
in a process of its own, first with nothing of the files in memory: it loads, reads a prompt of 16 tokens, and decodes.
Random routers choose all experts about equally often whatever the token before chose, which is the worst for a cache.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import binding
import measure
import torch

import moekit
from moekit import receipts
from moekit.formats.checkpoint import describe, seal
from moekit.formats.directory import atomic_directory
from moekit.formats.weights import Stored, held, split, weight_bytes, write
from moekit.generate.decode import tokens
from moekit.generate.sampling import SamplingSettings
from moekit.nn.quantized import quantize_
from moekit.ops.quantize import GROUP, Quantized, quantize

PROMPT = 16
POOL = 2**24
"""Random numbers of which all weights are made, each a turn of the others."""


def random_directory(name: str, dtype: str, path: Path) -> None:
    """Writes a model directory of random weights."""
    config = moekit.preset(name)
    codes = dtype if dtype == "int8" or dtype == "int4" else None
    number = torch.bfloat16 if codes else getattr(torch, dtype)
    with torch.device("meta"):
        model = moekit.Model(config).to(number)
    if codes:
        quantize_(model, codes)
    pool = torch.randn(POOL) * config.initializer_range
    coded, plain, turn = quantize(pool.unsqueeze(0), codes) if codes else None, pool.to(number), 0

    def cut(source: torch.Tensor, like: torch.Tensor, per_group: int) -> torch.Tensor:
        turned = source.flatten().roll(turn * per_group)
        return turned.repeat(-(-like.numel() // len(turned)))[: like.numel()].view(like.shape)

    def drawn(like: Stored) -> Stored:
        nonlocal turn
        turn += 1
        if isinstance(like, Quantized):
            assert coded is not None
            each = coded.codes.shape[-1] // coded.scales.shape[-1]
            return Quantized(cut(coded.codes, like.codes, each), cut(coded.scales, like.scales, 1), like.width)
        return torch.ones(like.shape, dtype=like.dtype) if like.dim() == 1 else cut(plain, like, GROUP)

    wanted = [piece for name, weight in held(model).items() for piece in split(name, weight)]
    hashed: dict[str, Any] = {}
    with atomic_directory(path, hashed=hashed) as folder:
        write(folder, wanted, (drawn(like) for _, like in wanted))
        describe(folder, config, number, codes, None)
        seal(folder, hashed, receipts.make("save", config, config={"weights": "random", "model": name}))


def run(folder: Path, way: str, count: int) -> dict[str, Any]:
    """Returns what one process measures: seconds, speed and memory."""
    start, before = time.perf_counter(), _swapped()
    model = moekit.load(folder, check_hashes=False, mapped=way == "mapped")
    loaded = time.perf_counter()
    prompt = torch.randint(model.config.vocab_size, (PROMPT,), generator=torch.Generator().manual_seed(0)).tolist()
    seconds: list[float] = []
    at = time.perf_counter()
    for _ in tokens(model, [prompt], SamplingSettings(), count):
        now = time.perf_counter()
        seconds.append(now - at)
        at = now
    half = seconds[1 + count // 2 :]
    return {
        "load": loaded - start,
        "first": seconds[0],
        "early": statistics.median(seconds[1 : 1 + count // 4]),
        "late": statistics.median(half),
        "mean": statistics.mean(half),
        "own": _status("VmHWM" if way == "loaded" else "RssAnon"),
        "swapped": _swapped() - before,
    }


def _status(field: str) -> int:
    """Returns a figure of this process's memory, in bytes; 0 where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)


def _swapped() -> int:
    """Returns the pages that the machine has written to swap so far; 0 where the system does not tell."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("pswpout ")), 0)


def forget(folder: Path) -> None:
    """Asks the system to drop the files from memory."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main(argv: Sequence[str]) -> None:
    made = measure.parser(__file__, __doc__, repeats=1)
    made.add_argument("--model", default="deepseekmoe-16b", help="a preset (deepseekmoe-16b)")
    made.add_argument("--dtype", choices=("float32", "bfloat16", "int8", "int4"), default="int4", help="(int4)")
    made.add_argument("--ways", nargs="+", choices=("mapped", "loaded"), default=("mapped", "loaded"), help="(both)")
    made.add_argument("--work", type=Path, default=Path("work"), help="where the model is written (work)")
    made.add_argument("--tokens", type=int, default=64, help="new tokens (64)")
    made.add_argument("--run", choices=("mapped", "loaded"), help=argparse.SUPPRESS)
    args = measure.parse(made, argv)
    if args.repeats != 1 or args.device.type != "cpu":
        made.error("each way is measured once, on the CPU: --repeats and --device do nothing here")
    folder = args.work / f"{args.model}-{args.dtype}"
    if args.run:
        sys.stdout.write(json.dumps(run(folder, args.run, args.tokens)))
        return
    guard = measure.Guard(args.device)
    if not folder.exists():
        measure.progress(f"writing {folder}")
        start = time.perf_counter()
        random_directory(args.model, args.dtype, folder)
        measure.progress(f"written in {time.perf_counter() - start:.0f} s")
    rows = []
    for way in args.ways:
        for state in ("cold", "warm"):
            if state == "cold":
                forget(folder)
            command = [sys.executable, __file__, *args.words, "--run", way]
            found = json.loads(
                subprocess.run(command, stdout=subprocess.PIPE, check=True, preexec_fn=binding.unbound).stdout
            )
            measure.progress(f"{way}, {state}: {found}")
            rows.append(
                (
                    f"{way}, files {'not in memory' if state == 'cold' else 'as the run before left them'}",
                    *(f"{found[name]:.1f}" for name in ("load", "first")),
                    *(f"{1 / found[name]:.1f}" for name in ("early", "late", "mean")),
                    f"{found['own'] / 2**30:.1f}",
                    str(found["swapped"]),
                )
            )
    header = ("", "load, s", "first token, s", "early", "late", "late, mean", "own memory, GiB", "pages swapped")
    size, memory = weight_bytes(folder) / 2**30, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    measure.report(
        args,
        f"{args.model} in {args.dtype}: mapped and loaded",
        f"{size:.1f} GiB of weights on a machine of {memory:.1f} GiB. Tokens/s: the median of the first quarter of "
        f"{args.tokens} tokens, the median and the mean of the second half. Own memory: mapped, what is not the "
        "files', at the end; loaded, the peak, with what was read of the files.",
        guard,
        [measure.table(header, rows)],
        ["trained routers, whose choices repeat more than random ones"],
    )


if __name__ == "__main__":
    binding.bound(main)
