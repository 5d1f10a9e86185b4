"""Are the experts of one model harder to replace than another's: the paper's probes of two models on the same text.

    python benchmarks/probes.py DEEPSEEKMOE GSHARD --data DATA --out docs/results/probes.md

Two models, or two for each of several seeds: A B A B ... Each is a model directory or a run, whose newest checkpoint is
taken. The text is DATA's validation split, tokenised by the tokenizer of both. Beside the page stand the same numbers
by seed and domain (.json) and the curves (.png).
"""

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import moekit
from moekit import files, receipts
from moekit.data import Batch, TokenDataset, open_dataset, validation_windows
from moekit.errors import ConfigError
from moekit.formats.tokenizer import load_tokenizer
from moekit.inspect.losses import MEAN
from moekit.inspect.probes import REST, probes
from moekit.inspect.result import Analysis
from moekit.train.hardware import choose_device
from moekit.train.state import model_folder

Row = dict[str, Any]
AXES = {"disable_top": "fraction", "without_shared": "routed", "fewer_active": "routed"}


def windows(dataset: TokenDataset, length: int, tokens: int, batch: int) -> Iterator[tuple[str, Batch]]:
    for domain in dataset.domains:
        yield from ((domain, one) for one in validation_windows(dataset, domain, length, tokens, batch))


def rows(analysis: Analysis, table: str = MEAN) -> list[Row]:
    columns, found = analysis.tables[table]
    return [dict(zip(columns, row, strict=True)) for row in found]


def pooled(seeds: Sequence[Analysis]) -> list[Row]:
    """Returns the rows of the means over seeds; `spread` is the standard deviation of the ratio over them."""
    found = []
    for alike in zip(*(rows(one) for one in seeds), strict=True):
        row = dict(alike[0])
        if row["loss"] is not None:
            row |= {name: statistics.mean(one[name] for one in alike) for name in ("loss", "ratio", "difference")}
            row["spread"] = statistics.stdev(one["ratio"] for one in alike) if len(alike) > 1 else None
        found.append(row)
    return found


def table(seeds: Sequence[Analysis]) -> list[str]:
    """Returns a table in Markdown."""
    found = pooled(seeds)
    told = list(found[0])[: list(found[0]).index("loss")]
    several = len(seeds) > 1
    header = [*told, "loss", "ratio", "difference", "ratio, sd over seeds" if several else "standard error"]
    lines = [f"| {' | '.join(header)} |", "|" + " --- |" * len(header)]
    for row in found:
        cells = [f"{row[name]:.4g}" if isinstance(row[name], float) else str(row[name]) for name in told]
        if row["loss"] is None:
            lines.append(f"| {' | '.join([*cells, row['note'], '', '', ''])} |")
            continue
        last = row["spread"] if several else row["standard_error"]
        shown = [
            f"{row['loss']:.4f}",
            f"{row['ratio']:.4f}",
            f"{row['difference']:+.4f}",
            "" if last is None else f"{last:.4f}",
        ]
        lines.append(f"| {' | '.join([*cells, *shown])} |")
    return lines


def draw(axes: Axes, name: str, seeds: Sequence[Analysis]) -> None:
    """Draws the ratio of each model, thin by seed."""
    for at, model in enumerate(dict.fromkeys(row["model"] for row in rows(seeds[0]))):
        for thin, found in [*((True, rows(one)) for one in seeds), (False, pooled(seeds))]:
            kept = [r for r in found if r["model"] == model and r.get("softmax") != REST and r["loss"] is not None]
            if name == "without_shared":
                xs: list[Any] = [f"{row['shared']} + {row['routed']}" for row in kept]
            else:
                whole = max(row[AXES[name]] for row in kept) if name == "fewer_active" else 1
                xs = [row[AXES[name]] / whole for row in kept]
            style: Any = {"alpha": 0.35, "lw": 0.8} if thin else {"lw": 1.8, "label": model}
            line = "o" if name == "without_shared" else "o-"
            axes.plot(xs, [row["ratio"] for row in kept], f"C{at}{line}", ms=3, **style)
    axes.legend(frameon=False)


def picture(answers: dict[str, list[Analysis]], path: Path) -> None:
    figure = Figure(figsize=(4.2 * len(answers), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    places = figure.subplots(1, len(answers), squeeze=False)[0]
    labels = {
        "disable_top": "fraction of the routed experts masked",
        "without_shared": "shared + routed experts at work",
        "fewer_active": "fraction of its own routed experts",
    }
    for axes, (name, seeds) in zip(places, answers.items(), strict=True):
        draw(axes, name, seeds)
        axes.set(xlabel=labels[name], ylabel="loss / unaltered loss")
    figure.savefig(path, dpi=110)


def page(args: argparse.Namespace, words: list[str], answers: dict[str, list[Analysis]]) -> list[str]:
    """Returns the lines of the page."""
    ran, seeds = receipts.versions(), len(args.models) // 2
    first = rows(next(iter(answers.values()))[0])[0]
    lines = [
        "# Probes: are the experts hard to replace", "", *([args.note, ""] if args.note else []),
        f"`{shlex.join(['python', 'benchmarks/probes.py', *words])}`, commit {args.commit}, moekit {ran['moekit']}, "
        f"torch {ran['torch']}, {ran['system']}, {ran['threads']} threads. {seeds} seed{'s' * (seeds > 1)}, "
        f"{first['tokens']:,} tokens in {first['windows']:,} windows of {args.length}, the same for all.", "",
        f"![loss relative to the unaltered model]({args.out.with_suffix('.png').name})", "",
        "Losses are nats per token, means over domains; the ratio is to the model's own unaltered loss, as the two",
        "do not start at the same. Standard errors are of the difference, windows paired. By seed and domain:",
        f"[the numbers]({args.out.with_suffix('.json').name}).", "",
    ]  # fmt: skip
    for found in answers.values():
        lines += [f"## {found[0].title}", "", found[0].reading, "", *table(found), ""]
        told = []
        for model, x, loss, ratio in found[0].tables["in the paper"].rows:
            place = f"{x:.4g}" if isinstance(x, float | int) else str(x).replace("\n", " ")
            told.append(f"{model}, {place}: {loss} ({ratio:.3f})")
        lines += [f"In the paper (2B parameters, the Pile; curves are read from its figures): {'; '.join(told)}.", ""]
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("models", nargs="+", type=Path, metavar="MODEL", help="two models, or two for each seed")
    add("--data", type=Path, required=True, help="what `moekit prepare` wrote; its validation text is used")
    add("--names", nargs=2, default=["deepseekmoe", "gshard"], help="what the two are called")
    add("--length", type=int, default=256, help="tokens of a window (256)")
    add("--tokens", type=int, default=16_384, help="of each domain at most (16,384)")
    add("--batch", type=int, default=8, help="windows at once (8)")
    add("--device", default="auto")
    add("--note", default="", help="text under the title: how the models were made, what is seen")
    add("--commit", default="unknown")
    add("--out", type=Path, required=True)
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(words)
    if len(args.models) % 2:
        raise ConfigError(f"{len(args.models)} models were given; give two, or two for each seed")
    dataset, device = open_dataset(args.data, "valid"), choose_device(args.device)
    answers: dict[str, list[Analysis]] = {}
    for pair in zip(args.models[::2], args.models[1::2], strict=True):
        folders = [model_folder(given) for given in pair]
        for folder in folders:
            if load_tokenizer(folder).fingerprint != dataset.tokenizer_fingerprint:
                raise ConfigError(f"{folder} has another tokenizer than {args.data}; choose the text it was trained on")
        one, other = (moekit.load(folder, device=device) for folder in folders)
        text = windows(dataset, args.length, args.tokens, args.batch)
        for answer in probes(one, text, other, names=tuple(args.names)):
            answers.setdefault(answer.name, []).append(answer)
    picture(answers, args.out.with_suffix(".png"))
    numbers = {"command": words, "commit": args.commit, "versions": receipts.versions(), "seeds": []}
    for seed in range(len(args.models) // 2):
        tables = {name: found[seed].tables.items() for name, found in answers.items()}
        numbers["seeds"].append({name: {title: one._asdict() for title, one in of} for name, of in tables.items()})
    files.write(args.out.with_suffix(".json"), json.dumps(numbers, ensure_ascii=False) + "\n")
    files.write(args.out, "\n".join(page(args, words, answers)))


if __name__ == "__main__":
    main()
