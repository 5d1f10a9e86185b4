"""turn text into a tokenizer and tokenised shards; run again, it goes on where it stopped

example:
  moekit prepare books/ news.jsonl.gz --out data --vocab-size 4096
  moekit prepare --synthetic phone-book --examples 10000 --out book
"""

import argparse

from moekit.cli.output import bars, emit
from moekit.cli.parser import Add, given, path, positive, whole
from moekit.errors import ConfigError

OF_FILES = ("valid", "valid_fraction", "vocab_size", "tokenizer", "text_field", "domain_field", "prompt_field")
OF_TEXT = (*OF_FILES, "similar", "embeddings")
OF_TASKS = ("examples", "questions", "seed")


def options(add: Add) -> None:
    add(
        "files",
        type=given,
        nargs="*",
        metavar="FILE",
        help="jsonl, txt or parquet, plain, .gz or .zst; or folders of them",
    )
    add("--out", type=path, required=True, metavar="DATA", help="directory to write")
    add("--valid", type=given, nargs="+", metavar="FILE", help="validation text; else a part of FILES is held out")
    add("--valid-fraction", type=float, metavar="F", help="documents held out without --valid (0.01)")
    add("--vocab-size", type=positive, metavar="N", help="of the tokenizer that is trained (4096)")
    add("--tokenizer", type=given, metavar="FILE|DIR", help="use this tokenizer.json instead of training one")
    add("--text-field", metavar="NAME", help="field of a record that holds its text (text)")
    add("--domain-field", metavar="NAME", help="field that names its domain (domain)")
    add("--prompt-field", metavar="NAME", help="field that stands before the text: read, but not learned (none)")
    add(
        "--similar",
        action="store_true",
        default=None,
        help="write the order of like documents too (data.order similar)",
    )
    add(
        "--embeddings",
        type=given,
        metavar="FILE",
        help="of the training documents, .npy, for --similar (hashed TF-IDF)",
    )
    add("--synthetic", metavar="TASK", help="instead of FILES: phone-book, shortest-path or connectivity")
    add("--examples", type=positive, metavar="N", help="of the synthetic task, to train on (10000)")
    add("--questions", type=positive, metavar="N", help="of the synthetic task, to ask (1000)")
    add("--seed", type=whole, metavar="N", help="of the synthetic task (0)")


def run(args: argparse.Namespace) -> int:
    from moekit.data.prepare import prepare
    from moekit.data.synthetic import prepare_synthetic
    from moekit.tables import prepare_tables

    given = {name: value for name in OF_TEXT + OF_TASKS if (value := getattr(args, name)) is not None}
    if args.synthetic is None and not args.files:
        raise ConfigError("FILE is missing: the text to prepare, or --synthetic TASK")
    if args.synthetic is not None and args.files:
        raise ConfigError(f"--synthetic {args.synthetic} makes its own text; leave out {args.files[0]}")
    if wrong := given.keys() & set(OF_TEXT if args.synthetic else OF_TASKS):
        option = "--" + min(wrong).replace("_", "-")
        raise ConfigError(f"{option} has no effect with{'' if args.synthetic else 'out'} --synthetic; leave it out")
    with bars() as progress:
        if args.synthetic is not None:
            manifest = prepare_synthetic(args.synthetic, args.out, progress=progress, **given)
        else:
            valid = given.pop("valid", None)
            manifest = prepare(args.files, args.out, valid_paths=valid, progress=progress, **given)
    return emit(args, manifest, lambda: prepare_tables(manifest, str(args.out)))
