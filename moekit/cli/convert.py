"""a model in another precision or format, with what that costs

examples:
  moekit convert run small --dtype int8
  moekit convert run small.gguf --to gguf --dtype q8_0
"""

import argparse
from collections.abc import Callable
from typing import Any

from moekit.cli.output import bars, emit, read_text
from moekit.cli.parser import Add, dtype, path
from moekit.errors import ConfigError


def options(add: Add) -> None:
    add("source", type=path, metavar="SRC", help="a model directory, a run or a GGUF file")
    add("target", type=path, metavar="DST", help="directory, or GGUF file, to write; it must not exist")
    layouts = "moekit, gguf, a model_type such as deepseek_v2, or hf: the first that fits (moekit)"
    add("--to", default="moekit", metavar="LAYOUT", help=layouts)
    precisions = ("float32", "float16", "bfloat16", "int8", "int4", "q8_0", "q4_0")
    add("--dtype", type=dtype, choices=precisions, help="of the weights (as they are)")
    add(
        "--mtp", choices=("drop", "keep"), default="drop", help="DeepSeek-V3's layers for multi-token prediction (drop)"
    )
    add("--text", type=path, metavar="FILE", help="text to compare the logits on (random tokens)")


def run(args: argparse.Namespace) -> int:
    from moekit.tables import convert_tables

    text = None if args.text is None else read_text(args.text)
    with bars() as progress:
        receipt = _converter(args, text)(args.source, args.target, args.dtype, progress=progress)
    emit(args, receipt, lambda: convert_tables(receipt, str(args.target)))
    return 0 if all(check["held"] for check in receipt["checks"]) else 1


def _converter(args: argparse.Namespace, text: str | None) -> Callable[..., dict[str, Any]]:
    """Returns what converts the source's format into the one that is asked for, after checking the options."""
    from moekit.formats.convert import convert
    from moekit.formats.gguf.export import export_gguf
    from moekit.formats.gguf.restore import import_gguf
    from moekit.train.state import model_folder

    source, target = "GGUF" if args.source.is_file() else "a model directory", args.to
    if source == "GGUF" and target != "moekit":
        raise ConfigError(f"{args.source} is a file; make a model directory of it first (--to moekit)")
    dtypes: tuple[str | None, ...] = (None, "float32", "bfloat16")
    if target == "gguf":
        dtypes = (*dtypes, "float16", "q8_0", "q4_0")
    elif source != "GGUF":
        dtypes = (*dtypes, "int8", "int4")
    if args.dtype not in dtypes:
        allowed = f"{source} to {target} takes {', '.join(name or 'no --dtype' for name in dtypes)}"
        raise ConfigError(f"--dtype is {args.dtype or 'missing'} but {allowed}")
    if source != "GGUF" and target != "gguf":
        return lambda source, *rest, **more: convert(
            model_folder(source), *rest, layout=target, text=text, mtp=args.mtp, **more
        )
    if args.mtp == "keep":
        raise ConfigError("--mtp is keep but GGUF has no place for those layers here; leave it out")
    if text is not None:
        raise ConfigError("--text compares logits, which takes two model directories; leave it out")
    if target == "gguf":
        return lambda source, *rest, **more: export_gguf(model_folder(source), *rest, **more)
    return import_gguf
