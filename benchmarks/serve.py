#!/usr/bin/env python3
"""How many tokens a second does the engine write for many texts at once?

    python benchmarks/serve.py               # the packaged model; on a GPU where there is one
    python benchmarks/serve.py --model NAME  # or another: a folder, or a hub id
    python benchmarks/serve.py --busy        # one thread, its processor time in place of the clock:
                                             # for a machine that has other work

The ways, in turn, the same dtype, greedy, without stop ids, written tokens a second:

- one after the other: `generate` for each request by itself,
- a fixed batch: `generate` for as many prompts as the engine has rows, all of the same length and
  with the same number of new tokens, so that nothing is wasted. No batch can do better,
- the engine: requests of different lengths, four times as many as it has rows, until none waits any
  more. So all rows are under way, those that end are refilled, and prompts are read in between.
  Once by plain passes of the model, once by lean ones.

The last lines serve the same requests behind a beginning that all have, once in pages that are
shared and once behind beginnings that differ in their first token. Medians over the runs.
"""

import argparse
import platform
import random
import statistics
import time

import torch

from qwen_nb.generation import generate
from qwen_nb.model import Qwen
from qwen_nb.sampling import Sampling
from qwen_nb.serve import Engine


def draw(n, vocab_size, prompt, new, seed):
    "n requests (ids, new tokens) of different lengths, their means about `prompt` and `new`."
    rng = random.Random(seed)

    def around(mean):
        return rng.randint(mean // 4, 2 * mean - mean // 4)

    return [
        ([rng.randrange(vocab_size) for _ in range(around(prompt))], around(new)) for _ in range(n)
    ]


def one_after_the_other(model, requests):
    for ids, new in requests:
        generate(model, torch.tensor([ids], device=model.device), new, temperature=0.0, stop_ids=())
    return sum(new for _, new in requests)


def fixed_batch(model, rows, prompt, new):
    ids = torch.randint(model.config.vocab_size, (rows, prompt), device=model.device)
    generate(model, ids, new, temperature=0.0, stop_ids=())
    return rows * new


def engine(model, requests, rows, fast=None):
    served = Engine(model, max_rows=rows, prefill_chunk=16 * rows, fast=fast)
    for ids, new in requests:
        served.add(ids, new, Sampling())
    while served.waiting:
        served.step()
    return served.counts["tokens_written"]


def rate(clock, work, *args):
    "Tokens a second of one run."
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begin = clock()
    tokens = work(*args)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return tokens / (clock() - begin)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a folder or a hub id; the packaged model if left out")
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=64, help="mean length of the prompts")
    parser.add_argument("--new", type=int, default=64, help="mean number of new tokens")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--busy", action="store_true")
    args = parser.parse_args()
    if args.busy:
        torch.set_num_threads(1)
    clock = time.thread_time if args.busy else time.perf_counter

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Qwen.from_pretrained(args.model, args.dtype, device)
    vocab_size, rows = model.config.vocab_size, args.rows
    requests = draw(4 * rows, vocab_size, args.prompt, args.new, seed=0)
    begin = [1] * args.prompt
    alike = [(begin + ids, new) for ids, new in requests]
    apart = [([i % vocab_size] + begin[1:] + ids, new) for i, (ids, new) in enumerate(requests)]
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "CPU"
    print(f"{name}, {args.dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}")

    ways = {
        "one after the other": (one_after_the_other, requests[: max(4, rows // 8)]),
        f"fixed batch of {rows}": (fixed_batch, rows, args.prompt, args.new),
        "engine, plain passes": (engine, requests, rows, False),
        f"engine, {rows} rows": (engine, requests, rows),
        "  a beginning shared": (engine, alike, rows),
        "  beginnings that differ": (engine, apart, rows),
    }
    rates = {name: [] for name in ways}
    for run in range(args.runs + 1):  # the first is a warm-up
        for name, (work, *given) in ways.items():
            rates[name].append(rate(clock, work, model, *given))
    medians = {name: statistics.median(found[1:]) for name, found in rates.items()}
    for name, found in medians.items():
        print(f"{name:26} {found:9,.0f} tokens/s")
    alone, fixed, plain, lean = list(medians.values())[:4]
    for name, ours in (("plain", plain), ("lean", lean)):
        ratios = f"{ours / fixed:.2f} of the fixed batch, {ours / alone:.1f} x one after the other"
        print(f"engine by {name} passes: {ratios}")


if __name__ == "__main__":
    main()
