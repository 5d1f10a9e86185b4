"""Whether a run killed at random points and resumed ends with the same bits as a straight one.

    python benchmarks/resume.py --work /tmp/resume --out docs/results/resume.md

Trains a small model with a selection bias (so that the bias is part of what must survive) on the package's own text,
straight, and again with SIGKILL at three random moments, then compares every tensor and every logged number.
"""

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import measure
from safetensors.torch import load_file

from moekit import receipts
from moekit.train import metrics
from moekit.train.state import finished

TEXT = Path(metrics.__file__).parents[1] / "quickstart" / "text"
STEPS = 60
RUN = [
    "tiny-deepseekmoe", "--steps", str(STEPS), "--schedule.warmup_steps", "10", "--data.batch_size", "8",
    "--data.micro_batch_size", "4", "--save_every", "7", "--eval_every", "20", "--log_every", "5",
    "--eval_tokens", "4096",
    "--model.ffn.topk_method", "noaux_tc", "--model.ffn.bias_update_speed", "0.001", "--quiet",
]  # fmt: skip
TIMING = ("seconds", "tokens_per_second", "matmul_share", "peak_memory_bytes")


def moekit(*words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "moekit", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def written(run: Path) -> int:
    """Returns the lines of metrics.jsonl so far."""
    file = run / metrics.FILE
    return len(file.read_text().splitlines()) if file.exists() else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs; removed first")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of killing")
    args = parser.parse_args()
    shutil.rmtree(args.work, ignore_errors=True)
    data = args.work / "data"
    files = [str(file) for file in sorted(TEXT.glob("*.train.jsonl.gz"))]
    assert moekit("prepare", *files, "--out", str(data), "--vocab-size", "4096").wait() == 0
    straight, killed = args.work / "straight", args.work / "killed"
    assert moekit("train", *RUN, "--data", str(data), "--out", str(straight)).wait() == 0

    rng, kills = random.Random(args.seed), []
    for lines in sorted(rng.sample(range(2, 14), 3)):  # of the 15 lines of metrics.jsonl
        resume = ["--resume"] if (killed / "config.yaml").exists() else []
        process = moekit("train", *RUN, "--data", str(data), "--out", str(killed), *resume)
        while written(killed) < lines:
            assert process.poll() is None, "the run ended before it was to be killed"
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 1.5))  # into the next steps, or into a checkpoint
        process.send_signal(signal.SIGKILL)
        process.wait()
        saved = finished(killed)
        kills.append((saved[-1].name if saved else "no checkpoint yet", written(killed)))
    resume = ["--resume"]
    assert moekit("train", *RUN, "--data", str(data), "--out", str(killed), *resume).wait() == 0

    compared = {}
    for file in ("model.safetensors", "training.safetensors"):
        a, b = (load_file(finished(run)[-1] / file) for run in (straight, killed))
        assert a.keys() == b.keys()
        same = sum(bool((a[key] == b[key]).all()) for key in a)
        compared[file] = (same, len(a))
    records = [
        [{k: v for k, v in record.items() if k not in TIMING} for record in metrics.read(run)]
        for run in (straight, killed)
    ]
    equal_records = records[0] == records[1]
    states = [json.loads((finished(run)[-1] / "training.json").read_text()) for run in (straight, killed)]
    sampler = states[0]["sampler"] == states[1]["sampler"]
    held = equal_records and sampler and all(same == total for same, total in compared.values())

    versions = receipts.versions()
    lines = [
        "# Resume",
        "",
        f"`python benchmarks/resume.py --work /tmp/resume --out docs/results/resume.md`, commit {measure.commit()}, "
        f"moekit {versions['moekit']}, torch {versions['torch']}, {versions['system']}, {versions['threads']} threads.",
        "",
        f"`moekit train {' '.join(RUN)}`, {STEPS} steps, once straight and once with SIGKILL at three random moments.",
        "",
        "| kill | newest checkpoint then | lines of metrics.jsonl then |",
        "| --- | --- | --- |",
        *(f"| {i + 1} | {name} | {logged} |" for i, (name, logged) in enumerate(kills)),
        "",
        "| compared at the end | equal to the bit |",
        "| --- | --- |",
        f"| weights and selection bias (model.safetensors) | {compared['model.safetensors'][0]} of "
        f"{compared['model.safetensors'][1]} tensors |",
        f"| optimiser, random states, log window (training.safetensors) | {compared['training.safetensors'][0]} of "
        f"{compared['training.safetensors'][1]} tensors |",
        f"| sampler position | {'yes' if sampler else 'NO'} |",
        f"| every line of metrics.jsonl but its times | {'yes' if equal_records else 'NO'} ({len(records[0])} lines) |",
        "",
        "The killed run ends with the bits of the straight one." if held else "THE RUNS DIFFER.",
        "",
    ]
    args.out.write_text("\n".join(lines), encoding="utf-8")
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    main()
