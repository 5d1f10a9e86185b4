"""What llama-bench measures, through llama.cpp's own interface in the package llama_cpp: its options and its JSON."""

import argparse
import json
import random
import sys
import time

import llama_cpp


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-m", required=True, help="GGUF file")
    parser.add_argument("-p", type=int, default=0, help="tokens of the prompt that is timed")
    parser.add_argument("-n", type=int, default=0, help="tokens timed one by one")
    parser.add_argument("-d", type=int, default=0, help="tokens read before the clock starts")
    for option in ("-t", "-r"):
        parser.add_argument(option, type=int, default=1, help="threads; repetitions")
    parser.add_argument("-o", choices=["json"], default="json")
    parser.add_argument("--version", action="version", version=f"version: llama-cpp-python {llama_cpp.__version__}")
    args = parser.parse_args()
    model = llama_cpp.llama_model_load_from_file(args.m.encode(), llama_cpp.llama_model_default_params())
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = args.d + args.p + args.n + 1
    settings.n_threads = settings.n_threads_batch = args.t
    context = llama_cpp.llama_init_from_model(model, settings) if model else None
    if context is None:
        sys.exit(f"llama.cpp does not read {args.m}")
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def read(count: int) -> None:
        ids = (llama_cpp.llama_token * count)(*random.choices(range(vocabulary), k=count))
        if count and llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(ids, count)):
            sys.exit("llama.cpp did not read the tokens")

    samples = []
    for _ in range(args.r + 1):
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        read(args.d)
        start = time.perf_counter_ns()
        read(args.p)
        for _ in range(args.n):
            read(1)
        samples.append(time.perf_counter_ns() - start)
    sys.stdout.write(json.dumps([{"samples_ns": samples[1:]}]))


if __name__ == "__main__":
    main()
