#!/usr/bin/env python3
"""How long does a token take, compiled and as it stands?

    python benchmarks/compiled.py              # the packaged models
    python benchmarks/compiled.py --tokens 64
    python benchmarks/compiled.py --halves     # of a layer, as fast="compile" compiles them

`torch.compile(model, fullgraph=True)` and the model itself read the same text of so many tokens, in
float32, in turn; the figures are medians, in milliseconds a pass and a token, and the ratio of the
two. A C++ compiler is needed. A compiled mixture asks every expert of every token, since a traced
program cannot count who is asked: it can be slower than the model as it stands.

With --halves: microseconds of one thread's processor time for one token in the first layer of the
packaged model, before and after attention, and for `x + 1`, which shows what a call costs before
the first number is computed. Once more without asking whether the program still fits (its guards).
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


def microseconds(run, times=300):
    "The median of the processor time of a call."
    found = []
    for i in range(times):
        begin = time.thread_time()
        run()
        found.append(time.thread_time() - begin)
    return 1e6 * statistics.median(found)


@torch.inference_mode()
def halves():
    from qwen_nb.captured import compiled_halves
    from qwen_nb.fixed import FixedCache, before_attention
    from qwen_nb.lean import LeanStep, after_attention

    torch.set_num_threads(1)
    model = Qwen.from_pretrained(None, torch.float32)
    cache = FixedCache(model.config, 1, 64)
    model(torch.arange(40)[None], cache=cache)
    step = LeanStep(model, cache)
    w, turns = step.layers[0], step.turns(cache.position)[0]
    x = torch.randn(1, model.config.hidden_size)
    mix = before_attention(x, w, *turns)[0].reshape(1, -1)
    first, second = compiled_halves()
    calls = {
        "x + 1": (lambda x: x + 1, torch.compile(lambda x: x + 1, dynamic=False), (x,)),
        "before attention": (before_attention, first, (x, w, *turns)),
        "after attention": (after_attention, second, (x, mix, w)),
    }
    print("microseconds, one thread: as it stands, compiled, compiled and without guards")
    for name, (plain, compiled, args) in calls.items():
        for function in (plain, compiled):
            [function(*args) for _ in range(3)]
        times = [microseconds(lambda: plain(*args)), microseconds(lambda: compiled(*args))]
        with torch.compiler.set_stance(skip_guard_eval_unsafe=True):
            times.append(microseconds(lambda: compiled(*args)))
        print(f"{name:20}" + "".join(f"{t:8.1f}" for t in times))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--models", nargs="+", default=["qwen3", "qwen3_moe", "qwen3_5"])
    parser.add_argument("--halves", action="store_true", help="the halves of a layer")
    args = parser.parse_args()
    threads = torch.get_num_threads()
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {threads} threads"
    print(f"{machine}, torch {torch.__version__}")
    if args.halves:
        return halves()
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
