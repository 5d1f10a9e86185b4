"""turn text into a tokenizer and tokenised shards; run again, it goes on where it stopped

example:
  moekit prepare books/ news.jsonl.gz --out data --vocab-size 4096
"""

import argparse
from pathlib import Path

from moekit.cli.output import bars, emit
from moekit.cli.parser import Add, positive


def options(add: Add) -> None:
    add("files", nargs="+", metavar="FILE", help="jsonl, txt or parquet, plain, .gz or .zst; or folders of them")
    add("--out", type=Path, required=True, metavar="DATA", help="directory to write")
    add("--valid", nargs="+", metavar="FILE", help="validation text; else a part of FILES is held out")
    add("--valid-fraction", type=float, metavar="F", help="documents held out without --valid (0.01)")
    add("--vocab-size", type=positive, metavar="N", help="of the tokenizer that is trained (4096)")
    add("--tokenizer", metavar="FILE|DIR", help="use this tokenizer.json instead of training one")
    add("--text-field", default="text", help="field of a record that holds its text (text)")
    add("--domain-field", default="domain", help="field that names its domain (domain)")


def run(args: argparse.Namespace) -> int:
    from moekit.data.prepare import prepare
    from moekit.tables import prepare_tables

    same = ("valid_fraction", "vocab_size", "tokenizer", "text_field", "domain_field")
    options = {name: getattr(args, name) for name in same}
    with bars() as progress:
        manifest = prepare(args.files, args.out, valid_paths=args.valid, progress=progress, **options)
    return emit(args, manifest, lambda: prepare_tables(manifest, str(args.out)))
