#!/usr/bin/env python3
"""How many tokens a second? Reading a prompt (prefill) and writing (decode), ours against
transformers.generate, in one run.

    # the packaged model, then a random Qwen3-0.6B (1.2 GB, made and deleted)
    python benchmarks/decode.py
    python benchmarks/decode.py --small    # the packaged model alone
    python benchmarks/decode.py --model DIR

Both open the same files, in float32 and in bfloat16, get the same prompt, write greedily and do not
stop; each of them is asked in turn. The clock stands where a user's would: at the call, at the
first token, at each token after it. Prefill is the prompt over the time to the first token; decode
is the rest over the rest. Figures are medians over the runs, the ratio's range is that of the
pairs. In bfloat16 ours is also timed without `one_row_kernels`.

A step of decode has to read all weights and the cache. Bytes read a second, over what the machine
reads when it does nothing else (the sum of a large tensor, best of several), is the share of the
memory's speed that is reached. (The packaged model fits into the processor's cache, and its steps
are so short that Python's own time counts.)
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
import warnings
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import torch

warnings.filterwarnings("ignore")
os.environ |= dict(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TQDM_DISABLE="1")


clock = time.perf_counter  # --busy: time.thread_time


class Notes:
    "A streamer for `transformers`: notes when each token came."

    def start(self):
        self.times, self.seen, self.ids = [clock()], 0, []

    def put(self, value):
        self.seen += 1
        if self.seen > 1:  # the first is the prompt
            self.times.append(clock())
            self.ids.append(int(value))

    def end(self):
        pass


def time_ours(model, ids, new, fast=True):
    from qwen_nb import stream, writing

    notes = Notes()
    notes.start()
    slow = mock.patch.object(writing, "one_row_kernels", nullcontext)
    with nullcontext() if fast else slow:
        for i in stream(model, ids, new, temperature=0.0, stop_ids=()):
            notes.times.append(clock())
            notes.ids.append(i)
    return notes


def time_theirs(model, ids, new):
    notes = Notes()
    notes.start()
    with torch.no_grad():
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            streamer=notes,
        )
    return notes


def bandwidth(gib=1):
    "Bytes a second that summing a large float32 tensor reads: the best of ten."
    x = torch.ones(gib * 2**28)
    best = float("inf")
    for _ in range(10):
        start = clock()
        x.sum()
        best = min(best, clock() - start)
    return x.nbytes / best


def bytes_per_token(model, length):
    """What one step of decode reads: all weights (of an embedding that is not the head, one row)
    and the cache."""
    from qwen_nb.cache import cache_bytes

    weights = sum(p.nbytes for p in model.parameters())
    if not model.config.tie_word_embeddings:
        weights -= model.model.embed_tokens.weight.nbytes
    return weights + length * cache_bytes(model.config, next(model.parameters()).element_size())


def compare(folder, dtype, prompt, new, runs):
    from transformers import AutoModelForCausalLM

    from qwen_nb.model import Qwen

    ours, theirs = (
        Qwen.from_pretrained(folder, dtype),
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval(),
    )
    theirs.generation_config.eos_token_id = None
    theirs.generation_config.pad_token_id = 0
    ids = torch.randint(
        0, ours.config.vocab_size // 2, (1, prompt), generator=torch.Generator().manual_seed(0)
    )
    ways = {
        "ours": lambda: time_ours(ours, ids, new),
        "transformers": lambda: time_theirs(theirs, ids, new),
    }
    if dtype == torch.bfloat16:
        ways["ours, oneDNN"] = lambda: time_ours(ours, ids, new, fast=False)
    speeds = {name: [] for name in ways}
    for i in range(runs + 1):  # the first does not count
        done = {
            name: way() for name, way in (list(ways.items()) if i % 2 else list(ways.items())[::-1])
        }
        for name, notes in done.items():
            t = notes.times
            assert len(t) == new + 1, f"{name} wrote {len(t) - 1} tokens instead of {new}"
            if i:
                speeds[name].append((prompt / (t[1] - t[0]), (new - 1) / (t[-1] - t[1])))
    memory, same = (
        bandwidth(),
        next(
            (
                i
                for i, (a, b) in enumerate(zip(done["ours"].ids, done["transformers"].ids))
                if a != b
            ),
            new,
        ),
    )
    read = bytes_per_token(ours, prompt + new / 2)
    print(
        f"\n{Path(folder).name}, {str(dtype).removeprefix('torch.')}: prompt of {prompt} tokens, "
        f"{new} new; the first {same} new ones are the same; {read / 1e6:,.1f} MB a token, memory "
        f"read at {memory / 1e9:.1f} GB/s"
    )
    print(f"{'':14}{'prefill':>10}{'decode':>10}   tokens/s   memory speed reached in decode")
    for name, s in speeds.items():
        prefill, decode = (statistics.median(x) for x in zip(*s))
        print(
            f"{name:14}{prefill:10.1f}{decode:10.2f}{'':14}{decode * read / 1e9:7.2f} GB/s = "
            f"{decode * read / memory:.0%}"
        )
    for j, what in enumerate(("prefill", "decode")):
        ratios = sorted(a[j] / b[j] for a, b in zip(speeds["ours"], speeds["transformers"]))
        print(
            f"ours / transformers, {what}: {statistics.median(ratios):.2f} ({ratios[0]:.2f} to "
            f"{ratios[-1]:.2f})"
        )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a folder with a Qwen checkpoint, instead of the two")
    parser.add_argument("--small", action="store_true", help="the packaged model alone")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="one of them alone")
    parser.add_argument(
        "--prompt", type=int, default=128, help="tokens of the prompt (default: %(default)s)"
    )
    parser.add_argument(
        "--new",
        type=int,
        default=32,
        help="tokens to write; the packaged model, being quick, writes 100 (default: %(default)s)",
    )
    parser.add_argument(
        "--busy",
        action="store_true",
        help=(
            "one thread, and its processor time in place of the clock: for a machine that has "
            "other work"
        ),
    )
    parser.add_argument(
        "--runs", type=int, default=5, help="runs that count (default: %(default)s)"
    )
    args = parser.parse_args()
    if args.busy:
        global clock
        clock = time.thread_time
        torch.set_num_threads(1)
    from qwen_nb.inspect import packaged_model

    dtypes = [getattr(torch, args.dtype)] if args.dtype else [torch.float32, torch.bfloat16]
    print(
        f"{platform.machine()}, {torch.get_num_threads()} "
        f"threads{', processor time' * args.busy}, torch {torch.__version__}; {args.runs} runs, "
        f"of the packaged model {3 * args.runs}"
    )
    for dtype in dtypes:
        if not args.model:
            compare(packaged_model(), dtype, args.prompt, 100, 3 * args.runs)
    if args.small:
        return
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(args.model or Path(tmp) / "random-Qwen3-0.6B")
        if not args.model:
            from load import make_checkpoint

            make_checkpoint(folder)
            torch.set_default_dtype(torch.float32)
        for dtype in dtypes:
            compare(folder, dtype, args.prompt, args.new, args.runs)


if __name__ == "__main__":
    main()
