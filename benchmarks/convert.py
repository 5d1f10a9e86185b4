"""A model at its real shapes through every conversion: seconds, peak memory, and whether all bits came back.

    python benchmarks/convert.py --work /big/disk --out benchmarks/results/convert.md

Writes random bfloat16 weights of the model's shape below --work, tensor by tensor, and converts them with the command
as a user would: to the released layout and back, to GGUF and back. A directory is removed when nothing after it needs
it; of the 16B two are there at a time, 66 GB. What comes back must have the files it started with, by their SHA-256.
Own memory is the process's peak of pages that are not the files' (RssAnon): the mapped files themselves need none, the
system drops their pages as it likes.
"""

import json
import math
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import binding
import mapped
import measure
import safetensors

from moekit import files
from moekit.errors import CheckpointError
from moekit.formats.directory import MANIFEST, Manifest


class Step(NamedTuple):
    title: str
    words: tuple[str, ...]
    """Of the command."""
    unneeded: tuple[str, ...] = ()
    """What nothing after this step needs."""


STEPS = (
    Step("moekit to `{layout}`", ("convert", "a", "b", "--to", "{layout}"), ("a",)),
    Step("`{layout}` to moekit", ("convert", "b", "c"), ("c",)),
    Step("`moekit verify` of `{layout}`", ("verify", "b")),
    Step("`{layout}` to GGUF, bfloat16", ("convert", "b", "d.gguf", "--to", "gguf"), ("b",)),
    Step("GGUF to moekit", ("convert", "d.gguf", "e"), ("d.gguf", "e")),
)


def peak(process: subprocess.Popen[bytes], found: dict[str, int]) -> None:
    """Keeps the peaks of a process's memory until it ends, in bytes."""
    path = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        lines = path.read_text().splitlines() if path.exists() else []
        for line in lines:
            name, _, value = line.partition(":")
            if name in ("RssAnon", "VmSwap"):
                found[name] = max(found.get(name, 0), int(value.split()[0]) * 1024)
        time.sleep(0.02)


def run(words: Sequence[str], work: Path) -> tuple[dict[str, Any], float, dict[str, int]]:
    """Returns what the command said, its seconds and its peaks of memory."""
    start = time.perf_counter()
    given = [str(work / word) if word in NAMES else word for word in words[1:]]
    command = [sys.executable, "-m", "moekit", words[0], *given, "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, preexec_fn=binding.unbound)
    found: dict[str, int] = {}
    watch = threading.Thread(target=peak, args=(process, found))
    watch.start()
    said, _ = process.communicate()
    watch.join()
    seconds = time.perf_counter() - start
    if process.returncode != 0:
        sys.stderr.write(said.decode())
        sys.exit(f"moekit {' '.join(words)} ended with status {process.returncode}")
    return json.loads(said), seconds, found


NAMES = ("a", "b", "c", "d.gguf", "e")
"""Of what is written below --work."""


def weights(folder: Path) -> dict[str, str]:
    """Returns the SHA-256 of each file of weights, as the manifest lists it."""
    listed = files.read_json(folder / MANIFEST, Manifest, CheckpointError).model_dump()["files"]
    return {name: entry["sha256"] for name, entry in listed.items() if name.endswith(".safetensors")}


def count(folder: Path) -> str:
    """Returns how much the files of weights hold, by their headers."""
    shapes = []
    for path in sorted(folder.glob("*.safetensors")):
        with safetensors.safe_open(path, "pt") as opened:
            shapes += [opened.get_slice(key).get_shape() for key in opened.keys()]  # noqa: SIM118
    return f"{len(shapes):,} tensors and {sum(map(math.prod, shapes)):,} parameters"


def main(argv: Sequence[str]) -> None:
    made = measure.parser(__file__, __doc__, repeats=1)
    made.add_argument("--model", default="deepseekmoe-16b", help="a preset (deepseekmoe-16b)")
    made.add_argument("--layout", default="deepseek", help="a model_type (deepseek)")
    made.add_argument("--work", type=Path, default=Path("work"), help="where the directories are written (work)")
    args = measure.parse(made, argv)
    if args.repeats != 1 or args.threads or args.return_memory or args.device.type != "cpu":
        made.error("each step is a command of its own: --repeats, --threads, --device, --return-memory do nothing here")
    guard = measure.Guard(args.device)
    for name in NAMES:
        remove(args.work / name)
    measure.progress("writing random weights")
    start = time.perf_counter()
    mapped.random_directory(args.model, "bfloat16", args.work / "a")
    measure.progress(f"written in {time.perf_counter() - start:.0f} s")
    first = weights(args.work / "a")
    rows, counted = [], ""
    for step in STEPS:
        words = [word.format(layout=args.layout) for word in step.words]
        mapped.forget(args.work / words[1])
        said, seconds, found = run(words, args.work)
        measure.progress(f"{' '.join(words)}: {seconds:.0f} s, {found}")
        target = args.work / (words[2] if words[0] == "convert" else words[1])
        size = target.stat().st_size if target.is_file() else sum(file.stat().st_size for file in target.iterdir())
        back = "" if words[2:3] not in (["c"], ["e"]) else "yes" if weights(target) == first else "NO"
        held = sum(one["held"] for one in said["checks"]), len(said["checks"])
        if words[1:3] == ["a", "b"]:
            counted = f"The `{args.layout}` directory has {count(target)}."
        memory = [f"{found[name] / 1e9:.2f}" for name in ("RssAnon", "VmSwap")]
        title = step.title.format(layout=args.layout)
        rows.append((title, f"{seconds:,.0f}", f"{size / 1e9:.1f}", *memory, f"{held[0]} of {held[1]}", back))
        for name in step.unneeded:
            remove(args.work / name)
    header = ("", "seconds", "GB on disk", "peak own memory, GB", "swapped, GB", "checks held", "equal to the bit")
    measure.report(
        args,
        f"{args.model} through every conversion",
        f"{counted} Random weights, bfloat16. Each step is a process of its own, that began with nothing of the files "
        "in memory. Equal to the bit: the files of weights have the SHA-256 of those that the first step began with.",
        guard,
        [measure.table(header, rows)],
        [],
    )


def remove(path: Path) -> None:
    """Removes a file or a directory, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    binding.bound(main)
