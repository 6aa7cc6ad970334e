#!/usr/bin/env python3
"""How fast on a GPU? All that is claimed of one, checked and measured within five minutes.

    python benchmarks/gpu.py --json gpu.json     # on a machine with CUDA; elsewhere it says so
    python benchmarks/gpu.py --cpu               # the same path with tiny sizes, to try the script
    python benchmarks/gpu.py --only check one    # some sections

The sections, in this order:

    check     the packaged models: logits in float32 against transformers, and the same greedy ids
              by the plain way, the fast way and transformers
    one       batch 1 at Qwen3-0.6B's size in bfloat16: plain, fast, transformers, and transformers
              with its static cache, which it compiles
    many      the same for a batch of 256
    engine    64 requests of different lengths under way, a fixed batch of 64, one after the other
    training  tokens a second of the packaged size and of 12 layers of width 512, plain and compiled

Decode is what a call of many tokens takes longer than one of a few, so that prefill, warm-up and
capture do not count; both were called before. What is reached stands beside what was set out for. A
section that begins after `--minutes` is left out, and says so; what fails says why, and the rest
goes on. Weights are random where none are named.
"""

import argparse
import gc
import json
import os
import sys
import time
import traceback
import warnings
from datetime import date
from pathlib import Path
from typing import NamedTuple

warnings.filterwarnings("ignore")
os.environ |= dict(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TQDM_DISABLE="1")
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import torch  # noqa: E402
from train import Side, make_batch, make_models, packaged_config, wide_config  # noqa: E402

from qwen_nb.fast import why_plain  # noqa: E402
from qwen_nb.generation import generate  # noqa: E402
from qwen_nb.inspect import packaged_model  # noqa: E402
from qwen_nb.log import flops_per_token, measure_peak  # noqa: E402
from qwen_nb.model import Qwen, QwenConfig  # noqa: E402
from qwen_nb.sampling import sampling_for  # noqa: E402
from qwen_nb.speed import measure_bandwidth, pass_of  # noqa: E402

GREEDY = dict(temperature=0.0, stop_ids=())
CHECKED = None, "qwen1", "qwen2", "qwen3_moe", "qwen3_5"  # packaged models; None: Qwen3


class Sizes(NamedTuple):
    "How much is measured."

    config: QwenConfig
    prompt: int  # tokens
    new: int  # tokens that are timed
    warm: int  # tokens of the short call, which is taken off
    batch: int  # of `many`
    requests: int  # of `engine`
    trained: tuple  # (name, config, rows of a step) of each size that is trained
    train_length: int
    steps: int  # of training that are timed


TINY = QwenConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
)
BOTH = ("packaged size", packaged_config(), 16), ("12 × 512", wide_config(), 4)
ON_GPU = Sizes(QwenConfig(), 128, 64, 16, 256, 64, BOTH, 512, 10)
ON_CPU = Sizes(TINY, 8, 8, 2, 4, 4, (("a tiny model", TINY, 2),), 32, 2)

# What was set out for: name → at least
GOALS = {
    "batch 1, fast / transformers": 20,
    "batch 1, fast / transformers, static and compiled": 1,
    "batch 1, fast, share of the memory's speed": 0.3,
    "batch 256, fast / plain": 2,
    "engine / fixed batch": 0.8,
    "engine / one after the other": 10,
    "training, packaged size, compiled / plain": 2,
    "training, 12 × 512, compiled / plain": 2,
}


class Bench:
    "The machine, the sizes, and what was found so far."

    def __init__(self, device, sizes):
        self.device, self.sizes, self.found, self.failed = torch.device(device), sizes, {}, []
        self.begin, self.models = time.perf_counter(), None

    def wait(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, run):
        self.wait()
        start = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - start

    def minutes(self):
        return (time.perf_counter() - self.begin) / 60

    def note(self, name, value, text=None):
        "Keep a number and print it, with its goal if it has one."
        self.found[name] = value
        goal = GOALS.get(name)
        reached = f"   goal {goal}: {'reached' if value >= goal else 'NOT reached'}" if goal else ""
        print(f"  {name:52}{text or f'{value:,.2f}':>16}{reached}", flush=True)

    def tried(self, what, run):
        "What `run` gives; None, with the reason said, if it fails."
        try:
            return run()
        except Exception as error:  # whatever it is: the rest has to be measured
            self.failed.append(f"{what}: {type(error).__name__}: {error}".splitlines()[0])
            print(f"  {what}: FAILED, {self.failed[-1]}")
            if not isinstance(error, ImportError):
                traceback.print_exc(limit=3)
            return None

    def random_ids(self, batch, length, high):
        chance = torch.Generator().manual_seed(batch + length)
        return torch.randint(0, high, (batch, length), generator=chance).to(self.device)


# Ways to write: ids (batch, seq) and a number of tokens in, all ids out.


def ways_of_ours(model):
    "Name → way. Where there is no fast way, the plain one alone."

    def plain(ids, new):
        return generate(model, ids, new, **GREEDY, fast=False)

    def fast(ids, new):
        return generate(model, ids, new, **GREEDY, fast=True)

    return dict(plain=plain) if why_plain(model) else dict(plain=plain, fast=fast)


def way_of_theirs(model, **settings):
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    @torch.no_grad()
    def write(ids, new):
        mask = torch.ones_like(ids)
        return model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            **settings,
        )

    return write


def decode_speed(bench, write, ids):
    "`(tokens a second of decode, seconds of the first calls)`."
    sizes = bench.sizes
    short, long = sizes.warm, sizes.warm + sizes.new
    first = bench.seconds(lambda: (write(ids, short), write(ids, long)))
    fewest = min(bench.seconds(lambda: write(ids, short)) for _ in range(2))
    most = min(bench.seconds(lambda: write(ids, long)) for _ in range(2))
    return len(ids) * sizes.new / (most - fewest), first


# Sections.


@torch.no_grad()
def check(bench):
    "Right before it is fast: logits and greedy ids of the packaged models, in float32."
    from transformers import AutoModelForCausalLM

    for name in CHECKED:
        folder, told = packaged_model(*[name] * bool(name)), name or "qwen3"
        ours = Qwen.from_pretrained(folder, torch.float32, bench.device)
        ids = bench.random_ids(2, 24, 256)
        written = {way: write(ids, 24) for way, write in ways_of_ours(ours).items()}
        if name != "qwen1":  # transformers has no Qwen1
            theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            theirs = theirs.to(bench.device)
            a, b = ours(ids), theirs(ids).logits
            off = ((a - b).abs().max() / b.abs().max()).item()
            assert off < 1e-4, f"{told}: logits are {off:.1e} of their scale apart"
            bench.note(f"check, {told}, logits off by", off, f"{off:.1e}")
            written["transformers"] = way_of_theirs(theirs)(ids, 24)
        for way, found in written.items():
            same = torch.equal(found, written["plain"])
            assert same, f"{told}: greedy ids of {way} are not those of the plain way"
        bench.note(f"check, {told}, ways with the same greedy ids", len(written))


def real_models(bench):
    "Ours and transformers', with the same random weights, in bfloat16; made once."
    if bench.models is None:
        pair = make_models(bench.sizes.config, "cpu")
        bench.models = [m.to(torch.bfloat16).to(bench.device).eval() for m in pair]
    return bench.models


def speeds(bench, batch, told):
    "Decode by every way, and the ratios that were set out for."
    sizes = bench.sizes
    ours, theirs = real_models(bench)
    ids = bench.random_ids(batch, sizes.prompt, sizes.config.vocab_size)
    ways = ways_of_ours(ours) | {"transformers": way_of_theirs(theirs)}
    if batch == 1:
        static = way_of_theirs(theirs, cache_implementation="static")
        ways["transformers, static and compiled"] = static
    found = {}
    for way, write in ways.items():
        measured = bench.tried(f"{told}, {way}", lambda: decode_speed(bench, write, ids))
        if measured is None:
            continue
        found[way], first = measured
        bench.note(f"{told}, {way}, tokens/s", found[way], f"{found[way]:,.0f}")
        bench.note(f"{told}, {way}, seconds of the first calls", first)
    if batch == 1:
        same = torch.equal(*[ways[w](ids, sizes.new) for w in ("plain", "fast")])
        bench.note(f"{told}, bfloat16: greedy ids of plain and fast alike", float(same))
    best = "fast" if "fast" in found else "plain"
    for way in found:
        if way != best:
            bench.note(f"{told}, {best} / {way}", found[best] / found[way])
    needs = pass_of(sizes.config, batch, 1, sizes.prompt + sizes.warm + sizes.new // 2)
    share = found[best] / batch * needs.bytes / bench.found["bandwidth"]
    bench.note(f"{told}, {best}, share of the memory's speed", share)
    bench.note(f"{told}, peak of memory, GiB", peak_memory(bench))


def peak_memory(bench):
    return torch.cuda.max_memory_allocated() / 2**30 if bench.device.type == "cuda" else 0.0


def one(bench):
    speeds(bench, 1, "batch 1")


def many(bench):
    speeds(bench, bench.sizes.batch, f"batch {bench.sizes.batch}")


def engine(bench):
    "Requests of different lengths at once, against a fixed batch and one after the other."
    from qwen_nb.serve import Engine

    sizes, n = bench.sizes, bench.sizes.requests
    ours, _ = real_models(bench)
    sampling, high = sampling_for(ours, **GREEDY), sizes.config.vocab_size
    prompts = [sizes.prompt // 2 + sizes.prompt * i // n for i in range(n)]
    news = [sizes.new // 2 + sizes.new * (7 * i % n) // n for i in range(n)]
    texts = [bench.random_ids(1, length, high) for length in prompts]

    def all_at_once():
        line = Engine(ours, max_rows=n)
        requests = [line.add(t[0].tolist(), new, sampling) for t, new in zip(texts, news)]
        while not all(r.done for r in requests):
            line.step()

    def one_by_one(few):
        for text, new in list(zip(texts, news))[:few]:
            generate(ours, text, new, **GREEDY)

    same_length = bench.random_ids(n, sizes.prompt, high)
    fixed = lambda: generate(ours, same_length, sizes.new, **GREEDY)
    few = max(1, n // 16)
    all_at_once(), fixed(), one_by_one(few)  # warm
    speed = {
        "engine": sum(news) / bench.seconds(all_at_once),
        "fixed batch": n * sizes.new / bench.seconds(fixed),
        "one after the other": sum(news[:few]) / bench.seconds(lambda: one_by_one(few)),
    }
    for name, found in speed.items():
        bench.note(f"{n} requests, {name}, tokens/s", found, f"{found:,.0f}")
    bench.note("engine / fixed batch", speed["engine"] / speed["fixed batch"])
    bench.note("engine / one after the other", speed["engine"] / speed["one after the other"])


def training(bench):
    "A step of training in bfloat16, as a run does it and through torch.compile."
    from qwen_nb.budget import cast_once
    from qwen_nb.train import forward

    sizes = bench.sizes
    bench.models = None  # makes room
    for told, config, rows in sizes.trained:
        batch = make_batch(config, rows, sizes.train_length, False, bench.device)
        found = {}
        for way in ("plain", "compiled"):
            ours, _ = make_models(config, bench.device)
            side = Side(cast_once(ours), forward, True, way == "compiled")

            def steps(side=side, n=sizes.steps):
                for _ in range(n):
                    side.step(batch)

            def timed(side=side, steps=steps):
                bench.seconds(lambda: steps(n=2))  # compiles
                return rows * sizes.train_length * sizes.steps / bench.seconds(steps)

            found[way] = bench.tried(f"training, {told}, {way}", timed)
            if found[way]:
                name = f"training, {told}, {way}, tokens/s"
                bench.note(name, found[way], f"{found[way]:,.0f}")
        if all(found.values()):
            bench.note(f"training, {told}, compiled / plain", found["compiled"] / found["plain"])
            reached = found["compiled"] * flops_per_token(config, sizes.train_length)
            bench.note(f"training, {told}, share of the peak", reached / bench.found["peak"])


SECTIONS = dict(check=check, one=one, many=many, engine=engine, training=training)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--cpu", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--minutes", type=float, default=4.5, help="no section begins after them")
    parser.add_argument("--json", type=Path, help="write what was found into this file")
    args = parser.parse_args()
    if not args.cpu and not torch.cuda.is_available():
        print("There is no GPU with CUDA here, so nothing is measured (--cpu tries the script).")
        return
    bench = Bench("cpu", ON_CPU) if args.cpu else Bench("cuda", ON_GPU)
    card = "CPU, tiny sizes" if args.cpu else torch.cuda.get_device_name()
    print(f"{card}, torch {torch.__version__}, {date.today()}")
    torch.set_float32_matmul_precision("highest")
    bench.note("bandwidth", measure_bandwidth(bench.device, 64 if args.cpu else None))
    bench.note("peak", measure_peak(bench.device, "bfloat16"))
    for name in args.only:
        if bench.minutes() > args.minutes:
            bench.failed.append(f"{name}: left out, {bench.minutes():.1f} minutes are over")
            print(f"{name}: {bench.failed[-1]}")
            continue
        print(f"{name}, after {bench.minutes():.1f} minutes")
        bench.tried(name, lambda: SECTIONS[name](bench))
        gc.collect()
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
        if args.json:
            about = dict(card=card, torch=torch.__version__, date=str(date.today()))
            about |= dict(found=bench.found, failed=bench.failed, goals=GOALS)
            args.json.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    print(f"{bench.minutes():.1f} minutes; {len(bench.failed)} of it failed or were left out")
    for sentence in bench.failed:
        print(f"  {sentence}")


if __name__ == "__main__":
    main()
