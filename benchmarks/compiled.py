#!/usr/bin/env python3
"""How long does a token take, compiled and as it stands?

    python benchmarks/compiled.py              # the packaged models
    python benchmarks/compiled.py --tokens 64

`torch.compile(model, fullgraph=True)` and the model itself read the same text of so many tokens, in
float32, in turn; the figures are medians, in milliseconds a pass and a token, and the ratio of the
two. A C++ compiler is needed. A compiled mixture asks every expert of every token, since a traced
program cannot count who is asked: it can be slower than the model as it stands.
"""

import argparse
import os
import platform
import statistics
import time

import torch

from qwen_nb.inspect import packaged_model
from qwen_nb.model import Qwen


@torch.no_grad()
def seconds(models, ids, runs):
    "The median time of a pass for each model, asked in turn."
    times = [[] for _ in models]
    for _ in range(runs):
        for own, model in zip(times, models):
            begin = time.perf_counter()
            model(ids)
            own.append(time.perf_counter() - begin)
    return [statistics.median(own) for own in times]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--models", nargs="+", default=["qwen3", "qwen3_moe", "qwen3_5"])
    args = parser.parse_args()
    threads = torch.get_num_threads()
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {threads} threads"
    print(f"{machine}, torch {torch.__version__}")
    for name in args.models:
        folder = None if name == "qwen3" else packaged_model(name)
        model = Qwen.from_pretrained(folder, torch.float32)
        for n in args.tokens:
            torch._dynamo.reset()
            compiled = torch.compile(model, fullgraph=True)
            ids = torch.arange(n)[None]
            seconds([model, compiled], ids, 3)  # compiles
            plain, fast = seconds([model, compiled], ids, args.runs)
            each = f"{1e3 * plain:.2f} ms as it stands, {1e3 * fast:.2f} ms compiled"
            print(f"{name:10} {n:4} tokens a pass: {each}, {plain / fast:.2f} times as fast")


if __name__ == "__main__":
    main()
