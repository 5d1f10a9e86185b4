"""continue a text

example:
  moekit generate run --prompt "Once upon a time" --temperature 0.8
"""

import argparse
import sys

from moekit.cli.output import emit, read_text
from moekit.cli.parser import DEVICE, Add, dtype, path, positive
from moekit.errors import ConfigError


def options(add: Add) -> None:
    add("model", type=path, metavar="DIR", help="a model directory or a run")
    add("--prompt", action="append", default=[], metavar="TEXT", help="text to continue; may be repeated")
    add("--prompts-file", type=path, metavar="FILE", help="one prompt per line")
    add("--max-new-tokens", type=positive, default=64, metavar="N", help="(64)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest token (0)")
    add("--top-k", type=positive, metavar="N", help="sample among the N likeliest tokens")
    add("--top-p", type=float, metavar="P", help="sample among the likeliest tokens of total probability P")
    add("--min-p", type=float, metavar="P", help="drop tokens below P times the likeliest one's probability")
    add("--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1: avoid tokens seen (1)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated")
    add("--seed", type=int, default=0, help="of the sampling (0)")
    add("--device", **DEVICE)
    add("--dtype", type=dtype, choices=("float32", "bfloat16", "float16"), help="of the weights (as saved)")
    add("--backend", default="auto", metavar="NAME", help="of the experts' products; see `moekit doctor` (auto)")
    mapped = "read weights from their files as they are needed (where they exceed half of the memory)"
    add("--mapped", action=argparse.BooleanOptionalAction, help=mapped)


def run(args: argparse.Namespace) -> int:
    more = read_text(args.prompts_file).splitlines() if args.prompts_file else []
    prompts = [*args.prompt, *more]
    if not prompts:
        raise ConfigError("--prompt or --prompts-file is missing: the text to continue")
    import torch

    from moekit.config import validate
    from moekit.formats.checkpoint import load
    from moekit.formats.tokenizer import load_tokenizer
    from moekit.formats.weights import weight_bytes
    from moekit.generate import SamplingSettings, complete
    from moekit.train.hardware import choose_device, memory
    from moekit.train.state import model_folder

    settings = validate(SamplingSettings, {name: getattr(args, name) for name in SamplingSettings.model_fields})
    folder = model_folder(args.model)
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    device, mapped = choose_device(args.device), args.mapped
    if mapped is None:
        mapped = device.type == "cpu" and weight_bytes(folder) > memory() / 2
    check = folder is args.model and not mapped  # which would read all that is to stay in the files
    model = load(folder, device, dtype, check_hashes=check, mapped=mapped)
    model.set_experts_backend(args.backend)
    tokenizer = load_tokenizer(folder)
    untold = [prompts[0]]  # not written before the first token comes: a mistake must not follow half a line

    def stream(number: int, text: str) -> None:
        sys.stdout.write("".join((*untold, text)))
        sys.stdout.flush()
        untold.clear()

    live = stream if len(prompts) == 1 and not args.json else None  # several prompts grow side by side
    texts = complete(
        model, tokenizer, prompts, settings, max_new_tokens=args.max_new_tokens, stop=args.stop, stream=live
    )
    if args.json:
        return emit(args, {"completions": [completion._asdict() for completion in texts]}, list)
    ends = untold if live else [completion.prompt + completion.text for completion in texts]
    sys.stdout.write("\n\n".join(ends) + "\n")
    return 0
