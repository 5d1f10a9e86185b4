"""Speed and memory of the presets' training steps: tokens per second, share of the measured matmul speed, peak memory.

    python benchmarks/presets.py --out benchmarks/results/presets.md

Every preset and precision runs in a process of its own (peak memory is a process's), in turn, `--repeats` times; the
medians over rounds are reported.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence

import binding
import measure
import torch

from moekit.config import AdamWConfig, preset, recipe
from moekit.nn.model import Model
from moekit.train import hardware, optimizer

PRESETS = ("tiny-deepseekmoe", "tiny-dense-x2", "mini-deepseekmoe", "mini-gshard", "mini-dense-x2")


def one(args: argparse.Namespace, name: str, precision: str) -> dict[str, float]:
    """Returns the median of `--steps` training steps on random tokens, after three more."""
    torch.manual_seed(0)
    config, data = preset(name), recipe(name)["data"]
    machine = hardware.choose(str(args.device), precision)
    model = Model(config).to(machine.device).train()
    optimizers = optimizer.build(model, AdamWConfig())
    batch, length = data["batch_size"], data["sequence_length"]
    tokens = torch.randint(0, config.vocab_size, (batch, length + 1), device=machine.device)

    def step() -> None:
        with torch.autocast(machine.device.type, torch.bfloat16, enabled=machine.autocast):
            out = model(tokens[:, :-1], targets=tokens[:, 1:])
        torch.stack([out.loss, *out.aux.values()]).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for each in optimizers:
            each.step()
            each.zero_grad()

    seconds = measure.in_turn({name: measure.Contestant({"step": step})}, args.steps, machine.device, warmup=3)[name]
    speed, matmul = batch * length / measure.median(seconds), hardware.matmul_flops(machine)
    return {
        "tokens_per_second": speed,
        "matmul_gflops": matmul / 1e9,
        "matmul_share": speed * config.flops(length) / length / matmul,
        "peak_gib": hardware.peak_memory(machine.device) / 2**30,
    }


def main(argv: Sequence[str]) -> None:
    parser = measure.parser(__file__, __doc__, repeats=3)
    parser.add_argument("--presets", nargs="+", default=list(PRESETS), metavar="NAME", help="each in turn")
    parser.add_argument("--steps", type=int, default=7, help="steps that count in a process (7)")
    parser.add_argument("--one", nargs=2, metavar=("PRESET", "PRECISION"), help="one measurement, as JSON")
    args = measure.parse(parser, argv)
    if args.one:
        sys.stdout.write(json.dumps(one(args, *args.one)))
        return
    guard = measure.Guard(args.device)
    cases = list(itertools.product(args.presets, ("float32", "bfloat16")))
    found: dict[tuple[str, str], list[dict[str, float]]] = {case: [] for case in cases}
    for _ in range(args.repeats):
        for case in cases:
            command = [sys.executable, __file__, *argv, "--one", *case]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, preexec_fn=binding.unbound)
            found[case].append(json.loads(done.stdout))
            measure.progress(f"{' '.join(case)} {found[case][-1]}")
    rows = []
    for case, results in found.items():
        median = {key: statistics.median(result[key] for result in results) for key in results[0]}
        rows.append([
            *case, f"{median['tokens_per_second']:,.0f}", f"{median['matmul_share']:.0%}",
            f"{median['matmul_gflops']:.0f}", f"{median['peak_gib']:.2f}",
        ])  # fmt: skip
    header = ["preset", "precision", "tokens/s", "share of matmul speed", "matmul GFLOP/s", "peak memory, GiB"]
    what = f"Batches as in the preset's recipe, AdamW, random tokens; {args.steps} steps each."
    measure.report(args, "Training step of the presets", what, guard, [measure.table(header, rows)], [])


if __name__ == "__main__":
    binding.bound(main)
