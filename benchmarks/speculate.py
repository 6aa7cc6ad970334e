#!/usr/bin/env python3
"""How much faster does a draft make it? `speculate` against `generate`, on the same stories, in one
run.

    python benchmarks/speculate.py             # the packaged Qwen3 and Qwen3.5
    python benchmarks/speculate.py --model DIR --draft DIR   # your own, beside lookup
    python benchmarks/speculate.py --wide      # what a check costs in wide layers

Both write the same stories on, greedily, and do not stop; each way is asked in turn, in both
orders. In float32 the ids have to be the same, or the script ends with an error. (In bfloat16
rounding may choose otherwise where two tokens are equally likely; how many texts are the same is
printed.) A pass is one call of the model: plain writing takes one for each token. The ratio is that
of the times, its median and range over the runs; the last column compares with plain steps
(`fast=False`). The packaged Qwen2 is as large as the model that it guesses for, so it cannot pay:
it is there to show that. `--wide` takes no text: it makes eight layers with random weights, as wide
as those of Qwen3.5-0.8B, and tells what a check of so many tokens takes, a lean step being 1.
"""

import argparse
import os
import platform
import statistics
import time
import warnings
from pathlib import Path
from random import Random

import torch

warnings.filterwarnings("ignore")
os.environ |= dict(HF_HUB_OFFLINE="1", TQDM_DISABLE="1")

clock = time.perf_counter  # --busy: time.thread_time


def prompts_for(folder, stories):
    "The first lines of some stories."
    from qwen_nb.tokenizer import Tokenizer
    from qwen_nb.world import Chooser, story

    tokenizer, found = Tokenizer.from_pretrained(folder), []
    for seed in range(10_000, 10_000 + stories):
        lines = [line.text for line in story(Chooser(Random(seed)))][:8]
        found.append(torch.tensor([tokenizer.encode("\n".join(lines) + "\n")]))
    return found


def measure(name, model, draft, k, prompts, new, runs):
    "One line of the table."
    from qwen_nb.drafts import speculate
    from qwen_nb.generation import generate

    greedy, traces = dict(temperature=0.0, stop_ids=()), []

    def written():
        return [generate(model, ids, new, **greedy) for ids in prompts]

    def plain():
        return [generate(model, ids, new, fast=False, **greedy) for ids in prompts]

    def ahead():
        traces.clear()
        return [speculate(model, ids, new, draft, k, trace=traces, **greedy) for ids in prompts]

    ratios, over_plain = [], []
    for run in range(runs + 1):  # the first does not count
        times, texts = {}, {}
        for way in (written, ahead, plain) if run % 2 else (plain, ahead, written):
            start = clock()
            texts[way] = way()
            times[way] = clock() - start
        if run:
            ratios.append(times[written] / times[ahead])
            over_plain.append(times[plain] / times[ahead])
    same = sum(map(torch.equal, texts[written], texts[ahead]))
    if next(model.parameters()).dtype == torch.float32 and same < len(prompts):
        raise SystemExit(f"{name}: {len(prompts) - same} texts are not those of generate")
    guesses = sum(len(guessed) for guessed, _ in traces)
    kept = sum(number for _, number in traces)
    print(
        f"{name:28}{k:4}{(kept + len(traces)) / len(traces):10.2f}{kept / max(1, guesses):11.0%}"
        f"{same:7} of {len(prompts)}{statistics.median(ratios):9.2f}  "
        f"({min(ratios):.2f} to {max(ratios):.2f}){statistics.median(over_plain):10.2f}",
        flush=True,
    )


def fastest(run, times=7):
    best = float("inf")
    for _ in range(times):
        start = clock()
        run()
        best = min(best, clock() - start)
    return best


def measure_wide(dtype, device, runs):
    "What checks take, lean and plain, in lean steps, for a wide hybrid."
    from qwen_nb.model import Qwen
    from qwen_nb.qwen3_5 import HybridConfig
    from qwen_nb.recurrent import fixed_cache, step_for
    from qwen_nb.speculation import Reader
    from qwen_nb.way_back import reader_for

    torch.manual_seed(0)
    config = HybridConfig(vocab_size=4000, num_hidden_layers=8)
    model = Qwen(config).eval().requires_grad_(False).to(device, getattr(torch, dtype))
    ids = torch.randint(0, config.vocab_size, (60,)).tolist()
    cache = fixed_cache(model, 1, 200, model.dtype, device)
    readers = {"lean": reader_for(model, 200), "plain": Reader(model, 200)}
    with torch.no_grad():
        model(torch.tensor([ids[:42]], device=device), cache=cache, last_only=True)
        step, token = step_for(model)(model, cache), torch.tensor([3], device=device)
        for reader in readers.values():
            reader.read(ids[:40])
            reader.read(ids[40:42])

        def check(reader, n):
            reader.read(ids[42 : 42 + n], n).sum().item()
            reader.go_back(42)

        for _ in range(runs):
            one = fastest(lambda: step(token).sum().item())
            words = [f"a lean step {one * 1e3:.1f} ms; in lean steps"]
            for n in (1, 4, 7, 8, 11):
                lean, plain = (fastest(lambda r=r: check(r, n)) / one for r in readers.values())
                words.append(f"{n} tokens {lean:.2f} (plain {plain:.2f})")
            print(", ".join(words), flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a folder with a Qwen checkpoint, in the place of ours")
    parser.add_argument("--draft", help="a folder with a smaller one that has the same tokens")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--stories", type=int, default=8, help="texts (default: %(default)s)")
    parser.add_argument(
        "--new", type=int, default=100, help="tokens of each (default: %(default)s)"
    )
    parser.add_argument("--runs", type=int, default=5, help="that count (default: %(default)s)")
    parser.add_argument(
        "--busy", action="store_true", help="one thread, and its processor time for the clock"
    )
    parser.add_argument("--wide", action="store_true", help="only what a check costs in a wide one")
    args = parser.parse_args()
    if args.busy:
        global clock
        clock = time.thread_time
        torch.set_num_threads(1)
    from qwen_nb.inspect import packaged_model
    from qwen_nb.model import Qwen

    def open_model(folder):
        return Qwen.from_pretrained(folder, args.dtype, args.device)

    if args.wide:
        return measure_wide(args.dtype, args.device, args.runs)
    folders = [Path(args.model)] if args.model else [packaged_model(), packaged_model("qwen3_5")]
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, {args.device}, {args.dtype}"
        f"{', processor time' * args.busy}, torch {torch.__version__}; {args.stories} stories of "
        f"{args.new} tokens, {args.runs} runs"
    )
    print(f"{'model, draft':28}{'k':>4}{'tokens':>10}{'accepted':>11}{'same':>12}{'times as':>9}")
    print(f"{'':32}{'a pass':>10}{'':23}{'fast':>9}{'':16}{'as plain steps':>16}")
    for folder in folders:
        model, prompts = open_model(folder), prompts_for(folder, args.stories)
        prompts = [ids.to(args.device) for ids in prompts]
        label = (
            folder.name if args.model else dict(pretrained="Qwen3", qwen3_5="Qwen3.5")[folder.name]
        )
        for k in (4, 6, 10):
            measure(f"{label}, lookup", model, "lookup", k, prompts, args.new, args.runs)
        draft = args.draft or (None if args.model else packaged_model("qwen2"))
        if draft:
            guesser = open_model(draft)
            for k in (2, 4):
                words = f"{label}, {Path(draft).name} guesses"
                measure(words, model, guesser, k, prompts, args.new, args.runs)


if __name__ == "__main__":
    main()
