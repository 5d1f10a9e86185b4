"""Speed and memory of a training step: tokens per second, share of the measured matmul speed, peak memory.

    python benchmarks/presets.py --out benchmarks/results/presets.md

Every preset and precision runs in a process of its own (peak memory is a process's), in turn, `--rounds` times; the
medians over rounds are reported. Threads are bound to cores in the measuring processes only: bound here, this process
would hand its one core down to them.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from moekit import receipts
from moekit.config import AdamWConfig, preset, recipe
from moekit.nn.model import Model
from moekit.train import hardware, optimizer

BOUND = {"OMP_PROC_BIND": "close", "OMP_PLACES": "cores"}
PRESETS = ("tiny-deepseekmoe", "tiny-dense-x2", "mini-deepseekmoe", "mini-gshard", "mini-dense-x2")


def measure(name: str, precision: str, device: str, steps: int) -> dict[str, float]:
    """Returns medians over `steps` training steps on random tokens, after three that are not counted."""
    torch.manual_seed(0)
    config, data = preset(name), recipe(name)["data"]
    machine = hardware.choose(device, precision)
    model = Model(config).to(machine.device).train()
    optimizers = optimizer.build(model, AdamWConfig())
    batch, length = data["batch_size"], data["sequence_length"]
    tokens = torch.randint(0, config.vocab_size, (batch, length + 1), device=machine.device)
    seconds = []
    for _ in range(steps + 3):
        hardware.synchronize(machine.device)
        start = time.perf_counter()
        with torch.autocast(machine.device.type, torch.bfloat16, enabled=machine.autocast):
            out = model(tokens[:, :-1], targets=tokens[:, 1:])
        torch.stack([out.loss, *out.aux.values()]).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for one in optimizers:
            one.step()
            one.zero_grad()
        hardware.synchronize(machine.device)
        seconds.append(time.perf_counter() - start)
    speed = batch * length / statistics.median(seconds[3:])
    matmul = hardware.matmul_flops(machine)
    return {
        "tokens_per_second": speed,
        "matmul_gflops": matmul / 1e9,
        "matmul_share": speed * config.flops(length) / length / matmul,
        "peak_gib": hardware.peak_memory(machine.device) / 2**30,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--one", nargs=2, metavar=("PRESET", "PRECISION"), help="one measurement, as JSON")
    args = parser.parse_args()
    if args.one:
        sys.stdout.write(json.dumps(measure(*args.one, args.device, args.steps)))
        return
    cases = [(name, precision) for name in PRESETS for precision in ("float32", "bfloat16")]
    found: dict[tuple[str, str], list[dict[str, float]]] = {case: [] for case in cases}
    for _ in range(args.rounds):
        for case in cases:
            command = [sys.executable, __file__, "--one", *case, "--device", args.device, "--steps", str(args.steps)]
            done = subprocess.run(command, check=True, capture_output=True, env={**os.environ, **BOUND})
            found[case].append(json.loads(done.stdout))
    versions = receipts.versions()
    lines = [
        "# Training step of the presets",
        "",
        f"`python benchmarks/presets.py`, commit {args.commit}, moekit "
        f"{versions['moekit']}, torch {versions['torch']}, {versions['system']}, {versions['threads']} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}. Batch 16 x 256, AdamW, random tokens; medians of {args.rounds} "
        f"rounds in turn, {args.steps} steps each.",
        "",
        "| preset | precision | tokens/s | share of matmul speed | matmul GFLOP/s | peak memory, GiB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for (name, precision), results in found.items():
        median = {key: statistics.median(result[key] for result in results) for key in results[0]}
        lines.append(
            f"| {name} | {precision} | {median['tokens_per_second']:,.0f} | {median['matmul_share']:.0%} | "
            f"{median['matmul_gflops']:.0f} | {median['peak_gib']:.2f} |"
        )
    text = "\n".join([*lines, ""])
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
