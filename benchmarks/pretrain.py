"""A results page from finished training runs: loss curves, bits per byte per domain, load health, a sample per domain.

    python benchmarks/pretrain.py RUN [RUN ...] --out docs/results/NAME.md

The runs must have the same data; the first is the one whose load and samples are shown.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from moekit import receipts
from moekit.config import load_run_config
from moekit.data import open_dataset
from moekit.formats.checkpoint import load
from moekit.formats.tokenizer import load_tokenizer
from moekit.generate import SamplingSettings, complete
from moekit.train import metrics
from moekit.train.state import newest


def kind(records: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [record for record in records if record["kind"] == name]


def curves(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    loss, load = figure.subplots(1, 2)
    for (name, records), colour in zip(runs.items(), ("C0", "C1", "C2", "C4"), strict=False):
        train, evals = kind(records, "train"), kind(records, "eval")
        loss.plot([r["tokens"] / 1e6 for r in train], [r["loss"] for r in train], colour, alpha=0.35, lw=0.8)
        tokens, values = [r["tokens"] / 1e6 for r in evals], [r["loss"] for r in evals]
        loss.plot(tokens, values, f"{colour}o-", ms=4, lw=1.4, label=f"{name}, validation")
    loss.set(xlabel="tokens, millions", ylabel="loss, nats per token", title="Loss (thin: training)")
    loss.legend(frameon=False)
    train = kind(next(iter(runs.values())), "train")
    for layer in range(len(train[0]["load"].get("max_violation", []))):
        values = [r["load"]["max_violation"][layer] for r in train]
        load.plot([r["tokens"] / 1e6 for r in train], values, lw=1, label=f"layer {layer}")
    load.set(
        xlabel="tokens, millions", ylabel="maximum violation", title="Load: busiest expert / mean - 1", yscale="log"
    )
    load.legend(frameon=False, ncols=2)
    figure.savefig(path, dpi=110)


def samples(run: Path, data: str) -> list[str]:
    folder = newest(run)
    assert folder is not None
    model, tokenizer, valid = load(folder), load_tokenizer(folder), open_dataset(data, "valid")
    settings = SamplingSettings(temperature=0.7, top_p=0.9, repetition_penalty=1.1, seed=0)
    lines = []
    for domain in valid.domains:
        start, _ = valid.domain_range(domain)
        prompt = tokenizer.decode(valid.read(start, 32).tolist())
        (one,) = complete(model, tokenizer, [prompt], settings, max_new_tokens=64)
        lines += [f"**{domain}**", "", "```text", f"{one.prompt.strip()} ⟶ {one.text.strip()}", "```", ""]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--title", default="Pre-training in small")
    parser.add_argument("--note", default="", help="text under the title: how the runs were made")
    parser.add_argument("--names", nargs="+", help="one per run; else the folders' names")
    args = parser.parse_args()
    names = args.names or [run.name for run in args.runs]
    records = {name: metrics.read(run) for name, run in zip(names, args.runs, strict=True)}
    configs = {name: load_run_config(run / "config.yaml") for name, run in zip(names, args.runs, strict=True)}
    done = {name: json.loads((run / receipts.FILE).read_text()) for name, run in zip(names, args.runs, strict=True)}
    picture = args.out.with_suffix(".png")
    curves(records, picture)

    lines = [f"# {args.title}", "", *([args.note, ""] if args.note else []), f"![curves]({picture.name})", ""]
    lines += ["| | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names)]

    def row(label: str, values: list[str]) -> None:
        lines.append(f"| {label} | " + " | ".join(values) + " |")

    lasts = {name: kind(found, "eval")[-1] for name, found in records.items()}
    row("parameters, total", [f"{configs[name].model.num_parameters:,}" for name in names])
    row("parameters, active", [f"{configs[name].model.num_active_parameters:,}" for name in names])
    lengths = {name: configs[name].data.sequence_length for name in names}
    row(
        "training FLOPs per token, exact",
        [f"{configs[n].model.flops(lengths[n]) / lengths[n] / 1e6:.1f}M" for n in names],
    )
    row("tokens", [f"{lasts[name]['tokens']:,}" for name in names])
    row("training time, minutes", [f"{done[name]['seconds'] / 60:.1f}" for name in names])
    trains = {name: kind(found, "train") for name, found in records.items()}
    middle = {name: sorted(r["tokens_per_second"] for r in found)[len(found) // 2] for name, found in trains.items()}
    row("tokens per second, median of log windows", [f"{middle[name]:,.0f}" for name in names])
    shares = {name: sorted(r["matmul_share"] for r in found)[len(found) // 2] for name, found in trains.items()}
    row("share of the measured matmul speed, median", [f"{shares[name]:.0%}" for name in names])
    row("peak memory, GiB", [f"{trains[name][-1]['peak_memory_bytes'] / 2**30:.2f}" for name in names])
    row("**validation loss, nats per token**", [f"**{lasts[name]['loss']:.4f}**" for name in names])
    row("**bits per byte, mean of domains**", [f"**{lasts[name]['bits_per_byte']:.4f}**" for name in names])
    for domain in lasts[names[0]]["domains"]:
        row(f"bits per byte, {domain}", [f"{lasts[name]['domains'][domain]['bits_per_byte']:.4f}" for name in names])
    load = trains[names[0]][-1]["load"]
    alarms = len(kind(records[names[0]], "alarm"))
    lines += [
        "",
        f"## Load of {names[0]} at the end",
        "",
        "| | " + " | ".join(f"layer {i}" for i in range(len(load["dead"]))),
    ]
    lines[-1] += " |"
    lines.append("| --- |" + " --- |" * len(load["dead"]))
    for key in load:
        row(key.replace("_", " "), [f"{value:g}" for value in load[key]])
    lines += ["", f"Alarms about dead experts during the run: {alarms}.", "", "## A sample per domain", ""]
    lines += [
        "The first 32 tokens of the domain's validation text, then what the model adds (temperature 0.7, top-p 0.9,"
    ]
    lines += ["repetition penalty 1.1, seed 0).", "", *samples(args.runs[0], configs[names[0]].data.path)]
    lines += ["## How", ""]
    for name in names:
        versions, settings = done[name]["versions"], configs[name]
        lines.append(
            f"- {name}: seed {settings.seed}, {settings.steps} steps of {settings.data.batch_size} x "
            f"{settings.data.sequence_length} tokens, AdamW {settings.optimizer.lr:g}, {done[name]['device']}, "
            f"{versions['threads']} thread(s), moekit {versions['moekit']}, torch {versions['torch']}, "
            f"{versions['system']}"
        )
    args.out.write_text("\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
