"""what the experts of a model do on a text: tables, pictures, a report

examples:
  moekit inspect run --text texts/ --out inspected
  moekit inspect run --data data --against other --probes
  moekit inspect run --watch
"""

import argparse
from pathlib import Path

from moekit.cli.output import bars, emit, read_text
from moekit.cli.parser import DEVICE, Add, Parser, dtype, path, positive
from moekit.errors import ConfigError


def options(add: Add) -> None:
    add("model", type=path, metavar="MODEL", help="a model directory or a run, whose newest checkpoint is taken")
    add("--text", type=path, nargs="+", default=[], metavar="FILE", help="text files or folders: jsonl, txt, parquet")
    add("--data", type=path, metavar="DATA", help="a prepared dataset instead; its validation text if it has any")
    add("--out", type=path, default=Path("inspected"), metavar="DIR", help="where the report goes (inspected)")
    add("--tokens", type=positive, default=65_536, metavar="N", help="most tokens of each domain (65536)")
    add("--against", type=path, metavar="OTHER", help="another model, to be shown beside the first")
    named = "load, domains, kinds, positions, tokens, together, similarity, agreement; with commas between (all)"
    add("--analyses", metavar="NAMES", help=named)
    add(
        "--probes",
        action="store_true",
        help="the loss without a token's first experts, without shared ones, with fewer",
    )
    add("--watch", action="store_true", help="instead: show a training run's load and domains as it goes on")
    add("--trace", metavar="TEXT", help="a text whose routing is written token by token, as a file and as a page")
    add("--trace-file", type=path, metavar="FILE", help="the same, read from a file")
    add("--text-field", default="text", metavar="NAME", help="of jsonl and parquet (text)")
    add("--domain-field", default="domain", metavar="NAME", help="of jsonl and parquet (domain)")
    add("--sequence-length", type=positive, metavar="N", help="tokens of a window (512, or all that the model reads)")
    add("--batch-size", type=positive, default=8, metavar="N", help="windows at a time; changes no result (8)")
    add("--device", **DEVICE)
    add("--dtype", type=dtype, choices=("float32", "bfloat16", "float16"), help="of the weights (as saved)")


def run(args: argparse.Namespace) -> int:
    if args.watch:
        return _watch(args)
    if args.trace is not None and args.trace_file is not None:
        raise ConfigError("--trace and --trace-file are both given; choose one")
    import torch

    from moekit.inspect.job import Text, inspect
    from moekit.tables import inspect_tables

    with bars() as progress:
        document = inspect(
            args.model,
            Text(args.text, args.data, args.tokens, args.text_field, args.domain_field),
            args.out,
            against=args.against,
            analyses=None if args.analyses is None else [name.strip() for name in args.analyses.split(",")],
            probed=args.probes,
            trace_text=args.trace if args.trace_file is None else read_text(args.trace_file),
            sequence_length=args.sequence_length,
            batch_size=args.batch_size,
            device=args.device,
            dtype=None if args.dtype is None else getattr(torch, args.dtype),
            progress=progress,
        )
    return emit(args, document, lambda: inspect_tables(document))


def _watch(args: argparse.Namespace) -> int:
    own = Parser()
    options(own.add_argument)
    for action in own._actions:
        if action.dest not in ("help", "model", "watch") and getattr(args, action.dest) != action.default:
            raise ConfigError(f"{action.option_strings[0]} has no effect with --watch; leave it out")
    from moekit.inspect.watch import latest, watch

    if args.json:
        return emit(args, latest(args.model), list)
    watch(args.model)
    return 0
