"""How the benchmarks measure: contestants in turn, the machine that they ran on, the file that holds both."""

import argparse
import ctypes
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import binding
import torch

from moekit import receipts
from moekit.ops.kernels import memory
from moekit.train import hardware
from moekit.train.process import keep_memory

FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16", "i8mm", "sve")

Seconds = dict[str, list[float]]
"""Stage -> seconds, one figure a round."""


class Contestant(NamedTuple):
    """One of those that take turns."""

    stages: dict[str, Callable[[], object]]
    """Timed one by one, in this order. One that returns a float has measured its own seconds."""
    prepare: Callable[[int], object] = lambda number: None
    """Called with the round's number before the stages, untimed; warm-up rounds have negative numbers."""


def in_turn(
    contestants: dict[str, Contestant], repeats: int, device: torch.device, warmup: int = 1
) -> dict[str, Seconds]:
    """Returns the seconds of every stage of every contestant, measured A B A B."""
    seconds: dict[str, Seconds] = {name: {stage: [] for stage in c.stages} for name, c in contestants.items()}
    for number in range(-warmup, repeats):
        for name, contestant in contestants.items():
            contestant.prepare(number)
            for stage, run in contestant.stages.items():
                hardware.synchronize(device)
                start = time.perf_counter()
                own = run()
                hardware.synchronize(device)
                if number >= 0:
                    seconds[name][stage].append(own if isinstance(own, float) else time.perf_counter() - start)
    return seconds


def totals(seconds: Seconds) -> list[float]:
    """Returns the seconds of all stages together, one figure a round."""
    return [sum(stages) for stages in zip(*seconds.values(), strict=True)]


def median(seconds: Seconds) -> float:
    """Returns the median over rounds of all stages together."""
    return statistics.median(totals(seconds))


def fastest(seconds: dict[str, Seconds], names: Iterable[str]) -> Seconds | None:
    """Returns the seconds of the fastest of those that are named, or None if nobody is."""
    return min((seconds[name] for name in names), key=median, default=None)


def speedup(seconds: Seconds, baseline: Seconds | None) -> str:
    """Returns how many times faster than the baseline: the median of the rounds' ratios, as text."""
    if baseline is None or len(totals(baseline)) != len(totals(seconds)):
        return ""
    ratios = [theirs / ours for theirs, ours in zip(totals(baseline), totals(seconds), strict=True)]
    return f"{statistics.median(ratios):.2f}"


def parser(script: str, description: str | None, repeats: int) -> argparse.ArgumentParser:
    """Returns a parser of what all benchmarks share; `script` is the caller's file."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.set_defaults(script=Path(script).name)
    made.add_argument("--out", type=Path, metavar="FILE.md", help="the result file; standard output without it")
    made.add_argument("--repeats", type=int, default=repeats, help=f"rounds that count, after one more ({repeats})")
    made.add_argument("--threads", type=int, help="of this process; default: as torch chooses")
    made.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (cpu)")
    made.add_argument("--return-memory", action="store_true", help="give freed memory back, as glibc does unasked")
    return made


def parse(made: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Returns the arguments, checked, and the words they were given in; sets the threads that they ask for.

    Freed memory is kept, as `moekit train` keeps it: ours and the others' alike, since it is the process that is asked.
    """
    args = made.parse_args(argv, argparse.Namespace(words=list(argv)))
    if not args.return_memory:
        keep_memory()
    args.device = hardware.choose_device(args.device)
    if args.repeats < 1:
        made.error(f"--repeats is {args.repeats} but must be at least 1")
    if args.threads:
        torch.set_num_threads(args.threads)
    return args


def progress(text: str) -> None:
    """Shows a finished part to whoever waits."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


class Guard:
    """What the machine gave: its matmul and memory speed before and after, and how much others used in between.

    On a shared host the memory's speed can change by half from one minute to the next, and decoding with it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before = self._speeds()
        self.others = hardware.Others()

    def _speeds(self) -> list[float]:
        matmul = [hardware.matmul_flops(hardware.Hardware(self.device, low)) / 1e9 for low in (False, True)]
        return [*matmul, read_speed(self.device) / 1e9]

    def text(self) -> str:
        """Returns the line of the result file; call it right after the last measurement."""
        cores = self.others.cores()
        load = "unknown here" if cores is None else f"{cores:.0%} of one core"
        fp32, bf16, memory = (
            f"{before:,.0f} before and {after:,.0f} after"
            for before, after in zip(self.before, self._speeds(), strict=True)
        )
        speeds = f"matmul GFLOP/s fp32 {fp32}, bf16 {bf16}; memory read GB/s {memory}"
        return f"Guard: {speeds}; load of other processes: {load}."


def read_speed(device: torch.device) -> float:
    """Returns the bytes a second at which a sum reads memory that no cache holds, the median of five."""
    numbers, seconds = torch.ones(2**27, device=device), []
    for _ in range(6):
        hardware.synchronize(device)
        start = time.perf_counter()
        numbers.sum()
        hardware.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return numbers.nbytes / statistics.median(seconds[1:])


def machine(device: torch.device, keeps: bool = True) -> str:
    """Returns the processor, what it can do, and how its threads are placed."""
    name, flags = platform.processor() or platform.machine(), []
    try:
        about = Path("/proc/cpuinfo").read_text()
    except OSError:
        about = ""
    if found := re.search(r"^model name\s*:\s*(.+)$", about, re.MULTILINE):
        name = found[1]
    if found := re.search(r"^(?:flags|Features)\s*:\s*(.+)$", about, re.MULTILINE):
        flags = [flag for flag in FLAGS if flag in found[1].split()]
    threads = torch.get_num_threads()
    placed = " ".join(f"{key}={os.environ[key]}" for key in binding.BOUND if key in os.environ) or "threads not bound"
    gpu = f", {torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}" if device.type == "cuda" else ""
    return (
        f"{name} ({os.cpu_count()} cores; {' '.join(flags) or 'flags unknown'}){gpu}, "
        f"{threads} thread{'s' * (threads > 1)}, {placed}, freed memory {'kept' if keeps else 'given back'}"
    )


def commit() -> str:
    """Returns the commit of the code that is measured, marked where the code differs from it."""

    def git(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *words], cwd=Path(__file__).parents[1], capture_output=True, text=True)

    try:
        head = git("rev-parse", "--short", "HEAD")
        changed = git("diff", "--quiet", "HEAD", "--", "moekit", "benchmarks", ":!benchmarks/results").returncode
    except OSError:
        return "unknown"
    return head.stdout.strip() + ("-changed" if changed else "") if head.returncode == 0 else "unknown"


def available_memory() -> int | None:
    """Returns the bytes that can be had without swapping, or None where unknown."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None:
        trim(0)  # what this process has freed and kept can be had too
    memory.heap.give_back()
    try:
        about = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    found = re.search(r"^MemAvailable:\s*(\d+) kB", about, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Returns a Markdown table."""
    lines = [list(header), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def report(
    args: argparse.Namespace,
    title: str,
    what: str,
    guard: Guard,
    tables: Iterable[str],
    not_measured: Sequence[str],
    packages: Iterable[str] = (),
) -> None:
    """Writes the result file: command, commit, versions, machine, guard, tables, and what was not measured."""
    about, versions = guard.text(), receipts.versions()
    command = shlex.join(["python", f"benchmarks/{args.script}", *args.words])
    system = [f"moekit {versions['moekit']}", f"torch {versions['torch']}", *packages, versions["system"]]
    parts = [
        f"# {title}",
        f"`{command}`, commit {commit()}, {', '.join(system)}. {machine(guard.device, not args.return_memory)}.",
        what + (f" Medians of {args.repeats} rounds in turn." if args.repeats > 1 else ""),
        about,
        *tables,
    ]
    if not_measured:
        parts.append("Not measured:\n\n" + "\n".join(f"- {line}" for line in dict.fromkeys(not_measured)))
    text = "\n\n".join(parts) + "\n"
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)
