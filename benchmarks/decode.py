#!/usr/bin/env python3
"""How fast on this CPU? Every way of ours against transformers and llama.cpp, in one run.

    python benchmarks/decode.py                            # all of it, within ten minutes
    python benchmarks/decode.py --only real packaged       # some sections
    python benchmarks/decode.py --json benchmarks/decode.json
    python benchmarks/decode.py --model DIR                # in place of random weights
    python benchmarks/decode.py --tiny --runs 1            # does the script itself work?

The sections:

    real      decode and prefill of one text at Qwen3-0.6B's size, with random weights: float32,
              bfloat16, int8, int4
    packaged  the small model of the package, whose steps are all Python
    training  tokens a second, forward, back and AdamW, at the packaged size
    memory    the peak of a load that quantises
    dtype     products with bfloat16 weights, with and without instructions for them
    bands     products of few rows in float32, as they stand and with the weight in bands

All ways of a section get the same files and the same prompt, write greedily and do not stop, and
are asked in turn; the first round does not count. The clock stands where a user's would: at the
call, at the first token, at each token after it. Prefill is the prompt over the time to the first
token, decode is the rest over the rest. Figures are medians; a ratio is the median of the pairs,
its range stands behind it. llama.cpp is asked for one token after the other, without sampling.

A step of decode has to read all weights and the cache. Bytes read a second, over what the machine
reads when it does nothing else (the sum of a large tensor), is the share of the memory's speed that
is reached. What is not there (llama_cpp, a way that this package does not have) is said in a line.
"""

import argparse
import gc
import inspect
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from datetime import date
from pathlib import Path

warnings.filterwarnings("ignore")
os.environ |= dict(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TQDM_DISABLE="1")
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import torch  # noqa: E402
from load import make_checkpoint, memory  # noqa: E402

from qwen_nb.generation import generate, stream  # noqa: E402
from qwen_nb.inspect import packaged_model  # noqa: E402
from qwen_nb.log import measure_peak  # noqa: E402
from qwen_nb.model import Qwen, QwenConfig  # noqa: E402
from qwen_nb.speed import measure_bandwidth, pass_of  # noqa: E402

SECTIONS = "real", "packaged", "training", "memory", "dtype", "bands"
HAS_FAST = "fast" in inspect.signature(generate).parameters
HAS_QUANTIZE = "quantize" in inspect.signature(Qwen.from_pretrained).parameters
FAST = {"plain": False, "fast": True, "compiled": "compile"}
GGUF = dict(bfloat16="BF16", int8="Q8_0", int4="Q4_0")  # our names → llama.cpp's

SAID = set()

# What was set out for: (kind, what, against whom, at least)
GOALS = (
    ("float32", "decode", "transformers", 1.1),
    ("bfloat16", "decode", "transformers", 2),
    ("bfloat16", "decode", "llama.cpp", 1.25),
    ("int8", "decode", "llama.cpp", 1.1),
    ("int4", "decode", "llama.cpp", 1.1),
    ("float32", "prefill", "transformers", 1),
    ("bfloat16", "prefill", "transformers", 1),
    ("bfloat16", "prefill", "llama.cpp", 0.8),
    ("int8", "prefill", "llama.cpp", 0.8),
    ("int4", "prefill", "llama.cpp", 0.8),
)

clock = time.perf_counter  # --busy: time.thread_time


# Ways to write. Each takes a prompt (1, seq) and a number of tokens, and gives the times at the
# call and at each token.


def way_of_ours(model, **how):
    "Ours; `how` is fast=True or fast=False, or nothing where there is one way only."

    def write(ids, new):
        times = [clock()]
        for _ in stream(model, ids, new, temperature=0.0, stop_ids=(), **how):
            times.append(clock())
        return times

    return write


class Times:
    "A streamer for transformers: notes when each token came."

    def __init__(self):
        self.times, self.begun = [clock()], False

    def put(self, value):
        if self.begun:  # the first that is put is the prompt
            self.times.append(clock())
        self.begun = True

    def end(self):
        pass


def way_of_theirs(model):
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    @torch.no_grad()
    def write(ids, new):
        streamer, mask = Times(), torch.ones_like(ids)
        model.generate(
            ids, attention_mask=mask, max_new_tokens=new, do_sample=False, streamer=streamer
        )
        return streamer.times

    return write


def way_of_llama(model):
    def write(ids, new):
        prompt = ids[0].tolist()
        model.reset()
        times = [clock()]
        model.eval(prompt)
        times.append(clock())
        for _ in range(new - 1):
            model.eval(prompt[-1:])
            times.append(clock())
        return times

    return write


def llama_model(file, room):
    "A GGUF file opened by llama.cpp, on as many threads as PyTorch has."
    from llama_cpp import Llama

    threads = torch.get_num_threads()
    return Llama(
        str(file),
        n_ctx=room,
        n_threads=threads,
        n_threads_batch=threads,
        n_batch=512,
        verbose=False,
    )


def gguf_file(folder, kind):
    "The folder's model as a GGUF file, written beside it: by us, and Q4_0 by llama.cpp."
    import ctypes

    import llama_cpp

    from qwen_nb.to_gguf import FILE_TYPES, save_gguf

    file = Path(folder) / f"{kind}.gguf"
    if file.is_file():
        return file
    if kind in FILE_TYPES:
        save_gguf(folder, file, kind)
        return file
    source = gguf_file(folder, "BF16")
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    names = str(source).encode(), str(file).encode()
    if llama_cpp.llama_model_quantize(*names, ctypes.byref(settings)):
        raise ValueError(f"llama.cpp could not quantise {source}")
    return file


def said_once(sentence):
    "What is missing is said once."
    if sentence not in SAID:
        print(f"  ({sentence})")
    SAID.add(sentence)


def can_ask_llama():
    try:
        import llama_cpp  # noqa: F401
    except ImportError:
        said_once("llama_cpp is not installed: nothing is compared with llama.cpp")
        return False
    return True


def open_ours(folder, kind):
    "The model, or None where this package cannot open it so."
    if kind in ("float32", "bfloat16"):
        return Qwen.from_pretrained(folder, kind)
    if not HAS_QUANTIZE:
        said_once("this package has no from_pretrained(quantize=…): no int8 and int4 of ours")
        return None
    return Qwen.from_pretrained(folder, quantize=kind)


def open_ways(folder, kind, room, compare=("transformers", "llama.cpp")):
    "`(ours or None, name → way)` of all that can be opened here. kind: a dtype, int8 or int4."
    ours, ways = open_ours(folder, kind), {}
    if not HAS_FAST:
        said_once("this package has no generate(fast=…): the plain way alone")
    if ours:
        for name, fast in FAST.items() if HAS_FAST else [("plain", None)]:
            way = way_of_ours(ours, **(dict(fast=fast) if HAS_FAST else {}))
            try:
                begin = time.perf_counter()
                way(torch.zeros(1, 2).long(), 2)  # what compiles does it at the first step
                ways[f"ours, {name}"] = way
                if name == "compiled":
                    took = time.perf_counter() - begin
                    print(f"  ours, compiled, {kind}: ready to write after {took:.1f} s")
            except (ValueError, RuntimeError) as error:
                said_once(f"ours, {name}, {kind}: {str(error).splitlines()[0]}")
    if "transformers" in compare and kind in ("float32", "bfloat16"):
        from transformers import AutoModelForCausalLM

        dtype = getattr(torch, kind)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        ways["transformers"] = way_of_theirs(theirs)
    if "llama.cpp" in compare and kind in GGUF and can_ask_llama():
        try:
            ways["llama.cpp"] = way_of_llama(llama_model(gguf_file(folder, GGUF[kind]), room))
        except (ValueError, OSError, RuntimeError) as error:
            said_once(f"llama.cpp, {GGUF[kind]}: {error}")
    return ours, ways


# Measuring and telling.


def in_turn(ways, ids, new, runs):
    "Name → [(prefill, decode)] in tokens a second, one pair for each round."
    speeds, prompt = {name: [] for name in ways}, ids.shape[1]
    for round_ in range(runs + 1):  # the first does not count
        order = list(ways) if round_ % 2 else list(ways)[::-1]
        for name in order:
            times = ways[name](ids, new)
            assert len(times) == new + 1, f"{name} wrote {len(times) - 1} tokens, not {new}"
            start, first, last = times[0], times[1], times[-1]
            if round_:
                speeds[name].append((prompt / (first - start), (new - 1) / (last - first)))
    return speeds


def medians(pairs):
    return [statistics.median(column) for column in zip(*pairs)]


def ratio_text(ours, theirs, goal=None):
    "The ratio of two lists of speeds measured in pairs."
    ratios = sorted(a / b for a, b in zip(ours, theirs))
    text = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    return text + (f", goal {goal}" if goal else "")


def weight_bytes(model):
    "Bytes of weights that a step reads: all, without an embedding that is not the head."
    tensors = {name: t for name, t in model.state_dict().items() if torch.is_tensor(t)}
    own_head = any(name.startswith("lm_head.") for name in tensors)
    return sum(t.nbytes for name, t in tensors.items() if not (own_head and "embed_tokens" in name))


def tell(name, kind, model, speeds, prompt, new, machine):
    "Print a table and the ratios; what JSON is to keep of it comes back."
    print(f"\n{name}, {kind}: prompt of {prompt} tokens, {new} new ones")
    print(f"  {'':14}{'prefill':>10}{'decode':>10}   tokens/s   bytes read, of the memory's speed")
    numbers = 4 if kind == "float32" else 2
    needs = pass_of(model.config, 1, 1, prompt + new // 2, numbers) if model else None
    read = weight_bytes(model) + needs.cache if model else None
    rows = []
    for way, pairs in speeds.items():
        prefill, decode = medians(pairs)
        line = f"  {way:14}{prefill:10.1f}{decode:10.2f}"
        if model:
            share = decode * read / machine["bandwidth"]
            line += f"{'':14}{decode * read / 1e9:7.2f} GB/s = {share:.0%}"
        print(line)
        row = dict(model=name, kind=kind, way=way, prefill=prefill, decode=decode)
        rows.append(row | (dict(operations=needs.operations, bytes=read) if model else {}))
    best = "ours, fast" if "ours, fast" in speeds else "ours, plain"
    for j, what in enumerate(("prefill", "decode")):
        for other in speeds:
            if other == best or best not in speeds:
                continue
            goals = [g for k, w, o, g in GOALS if (k, w, o) == (kind, what, other)]
            goal = goals[0] if goals and name != "the packaged model" else None
            columns = [[pair[j] for pair in speeds[way]] for way in (best, other)]
            print(f"  {what}, {best} / {other}: {ratio_text(*columns, goal)}")
    return rows


def measure(name, folder, kind, prompt, new, runs, machine, compare):
    "One table: a model in one kind of numbers, all ways in turn."
    room = prompt + new + 8
    ours, ways = open_ways(folder, kind, room, compare)
    rows = []
    if ways:
        size = (ours.config if ours else QwenConfig.from_pretrained(folder)).vocab_size
        ids = torch.randint(0, size // 2, (1, prompt), generator=torch.Generator().manual_seed(0))
        rows = tell(name, kind, ours, in_turn(ways, ids, new, runs), prompt, new, machine)
    del ours, ways
    gc.collect()
    return rows


# The sections. Each gives what JSON is to keep.


def real(args, folder, machine):
    rows = []
    for kind in args.kinds:
        name = args.model or ("a tiny model" if args.tiny else "Qwen3-0.6B's size")
        both = "transformers", "llama.cpp"
        rows += measure(name, folder, kind, args.prompt, args.new, args.runs, machine, both)
    return rows


def packaged(args, folder, machine):
    rows, new, runs = [], 24 if args.tiny else 100, 3 * args.runs
    for kind in ("float32", "bfloat16"):
        where = packaged_model()
        theirs = ("transformers",)
        rows += measure("the packaged model", where, kind, args.prompt, new, runs, machine, theirs)
    return rows


def training(args, folder, machine):
    "Ours and transformers' module in the loop of benchmarks/train.py, which says more."
    from train import Side, make_batch, make_models, packaged_config, theirs_forward

    from qwen_nb.budget import cast_once
    from qwen_nb.train import forward

    texts, length = (2, 32) if args.tiny else (4, 256)
    config, rows = packaged_config(), []
    print(f"\ntraining, packaged size, {texts} rows of {length} tokens")
    for kind in ("float32", "bfloat16"):
        low, batch = kind == "bfloat16", make_batch(config, texts, length, True, "cpu")
        ours, theirs = make_models(config, "cpu")
        if low:
            cast_once(ours)
        sides = dict(ours=Side(ours, forward, low, False))
        sides["transformers"] = Side(theirs, theirs_forward, low, False)
        seconds = {name: [] for name in sides}
        for round_ in range(args.runs + 2):  # the first does not count
            for name in list(sides) if round_ % 2 else list(sides)[::-1]:
                took, _ = sides[name].time(batch)
                if round_:
                    seconds[name].append(took)
        for name, took in seconds.items():
            speed = texts * length / statistics.median(took)
            print(f"  {kind:10}{name:14}{speed:10,.0f} tokens/s")
            rows.append(dict(kind=kind, way=name, tokens_per_second=speed))
        ratio = ratio_text(seconds["transformers"], seconds["ours"], 1.2)
        print(f"  {kind:10}ours / transformers: {ratio}")
    return rows


def in_a_process(*words, **environment):
    "This script in a process of its own, with one thing to do; what it prints, from JSON."
    command = [sys.executable, __file__, "--child", *map(str, words)]
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["it failed"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


class Peak:
    "Inside, the most memory of its own that the process has; what a mapped file shows is not its."

    def __enter__(self):
        self.before, self.most, self.watching = memory("RssAnon"), 0, True
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while self.watching:
            self.most = max(self.most, memory("RssAnon") - self.before)
            time.sleep(0.001)

    def __exit__(self, *error):
        self.watching = False
        self.thread.join()


def child_memory(folder, kind):
    """Open once, and say what the process grew by over the bytes that stay: what two layers share
    counts once."""
    from qwen_nb.quantised_model import held_bytes

    start = time.perf_counter()
    with Peak() as peak:
        model = open_ours(folder, kind)
    took, peak = time.perf_counter() - start, peak.most
    stays = held_bytes(model)
    return dict(kind=kind, seconds=took, peak=peak, stays=stays)


def memory_(args, folder, machine):
    print("\nopening and quantising: the peak of the process over the bytes that stay")
    rows = []
    for kind in ("bfloat16", "int8", "int4"):
        if kind != "bfloat16" and not HAS_QUANTIZE:
            said_once("this package has no from_pretrained(quantize=…)")
            continue
        row = in_a_process("memory", folder, kind)
        share = row["peak"] / row["stays"]
        print(f"  {kind:10}{row['stays'] / 1e6:8,.0f} MB, {share:.2f} × in {row['seconds']:.1f} s")
        rows.append(row)
    return rows


def best_of(run, times=3):
    found = float("inf")
    for _ in range(times):
        start = clock()
        run()
        found = min(found, clock() - start)
    return found


@torch.no_grad()
def child_dtype(folder, busy):
    "Products of 1 to 64 rows with bfloat16 weights, both ways; and a prefill."
    from unittest import mock

    from torch.nn import functional as F

    from qwen_nb import width

    if busy == "True":
        be_busy()
    rows, found = [1, 2, 4, 8, 16, 32, 64], {"as it stands": [], "by way of float32": []}
    weight = torch.randn(3072, 1024).bfloat16()
    for n in rows:
        x = torch.randn(n, 1024).bfloat16()
        found["as it stands"].append(best_of(lambda: F.linear(x, weight)))
        found["by way of float32"].append(best_of(lambda: width.by_way_of_float32(x, weight)))
    model, ids = Qwen.from_pretrained(folder, "bfloat16"), torch.arange(128)[None] % 256
    plain = best_of(lambda: model(ids, last_only=True), 1)
    with mock.patch.object(width, "pays", wraps=width.pays) as asked, width.wide_products():
        model(ids, last_only=True)  # measures
        wide = best_of(lambda: model(ids, last_only=True), 1)
    assert asked.call_count, "no product was looked at"
    chosen = width.faster_dtype(width.product_seconds(32, 1024, 3072, clock=clock))
    prefill = dict(plain=128 / plain, wide=128 / wide)
    return found | dict(rows=rows, chosen=chosen, prefill=prefill)


def dtype_(args, folder, machine):
    print("\nproducts with bfloat16 weights, 1024 × 3072, milliseconds")
    sides = [
        (
            "without bfloat16 instructions",
            dict(ATEN_CPU_CAPABILITY="avx2", ONEDNN_MAX_CPU_ISA="AVX2"),
        )
    ]
    if machine["bfloat16_instructions"]:
        sides.insert(0, ("with bfloat16 instructions", {}))
    rows = []
    for instructions, environment in sides:
        side = in_a_process("dtype", folder, args.busy, **environment)
        print(f"  {instructions}: asked once, the machine says {side['chosen']}")
        print(f"  {'rows':>20}" + "".join(f"{n:8}" for n in side["rows"]))
        for name in ("as it stands", "by way of float32"):
            print(f"  {name:>20}" + "".join(f"{1e3 * s:8.2f}" for s in side[name]))
        speeds = "{plain:.0f} tokens/s as it stands, {wide:.0f} in wide_products()"
        print("    prefill of 128 tokens: " + speeds.format(**side["prefill"]))
        rows.append(dict(instructions=instructions) | side)
    return rows


@torch.no_grad()
def bands(args, folder, machine):
    "Products of 1 to 128 rows with weights that no cache holds; with one core, and with all."
    from torch.nn import functional as F

    from qwen_nb.bands import in_bands

    rows, threads = [1, 2, 4, 8, 16, 32, 64, 128], torch.get_num_threads()
    weights = [torch.randn(4096, 1024) for _ in range(4 if args.tiny else 24)]
    ways = {
        "as it stands, one core": (F.linear, 1),
        "as it stands": (F.linear, threads),
        "in bands": (in_bands, threads),
    }
    found = dict(rows=rows, bytes=weights[0].nbytes) | {way: [] for way in ways}
    for n in rows:
        x = torch.randn(n, 1024)
        for way, (product, cores) in ways.items():
            torch.set_num_threads(cores)
            seconds = best_of(lambda: [product(x, weight) for weight in weights])
            found[way].append(seconds / len(weights))
    torch.set_num_threads(threads)
    print("\nproducts in float32 with weights of 4096 × 1024 numbers, GB of weights a second")
    print(f"  {'rows':>22}" + "".join(f"{n:8}" for n in rows))
    for way in ways:
        print(f"  {way:>22}" + "".join(f"{found['bytes'] / s / 1e9:8.1f}" for s in found[way]))
    return found


RUN = dict(
    real=real, packaged=packaged, training=training, memory=memory_, dtype=dtype_, bands=bands
)
CHILDREN = dict(memory=child_memory, dtype=child_dtype)


# The machine, the model, and all of it.


def be_busy():
    global clock
    import train

    clock = train.clock = time.thread_time
    torch.set_num_threads(1)


def about_the_machine(busy):
    "What stands above the tables, and in JSON."
    info, flags = Path("/proc/cpuinfo"), ""
    name = platform.processor() or platform.machine()
    if info.is_file():
        lines = [line.split(":", 1) for line in info.read_text().splitlines() if ":" in line]
        facts = {key.strip(): value.strip() for key, value in lines}
        name, flags = facts.get("model name", name), facts.get("flags", "")
    threads = torch.get_num_threads()
    about = dict(
        machine=f"{name}, {threads} thread{'s' * (threads > 1)}, torch {torch.__version__}",
        date=str(date.today()),
        busy=busy,
        bfloat16_instructions=any(flag in flags for flag in ("avx512_bf16", "amx_bf16")),
        peak={d: measure_peak("cpu", d, clock=clock) for d in ("float32", "bfloat16")},
        bandwidth=measure_bandwidth("cpu", 1024, clock=clock),
    )
    peaks = ", ".join(f"{p / 1e9:,.0f} in {d}" for d, p in about["peak"].items())
    print(
        f"{about['machine']}{', processor time' * busy}; memory read at "
        f"{about['bandwidth'] / 1e9:.1f} GB/s, products at {peaks} GFLOP/s"
    )
    return about


def tiny_checkpoint(folder):
    "Random weights of a model that takes a moment, for trying this script."
    from qwen_nb.durable import save_pretrained
    from qwen_nb.train import init_weights

    sizes = dict(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
    )
    save_pretrained(init_weights(Qwen(QwenConfig(**sizes))), folder, packaged_model())


def make_model(args, folder):
    "The folder of the model for `real`, `memory` and `dtype`."
    if args.model:
        return Path(args.model)
    if args.tiny:
        tiny_checkpoint(folder)
        return folder
    make_checkpoint(folder)
    torch.set_default_dtype(torch.float32)
    for file in packaged_model().glob("tokenizer*.json"):  # a GGUF file wants one; any will do
        shutil.copy(file, folder)
    return folder


def read_words():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="these sections")
    add(
        "--kinds",
        nargs="+",
        choices=["float32", "bfloat16", "int8", "int4"],
        default=["float32", "bfloat16", "int8", "int4"],
        help="of the section real",
    )
    add("--model", help="a folder, in place of random weights of Qwen3-0.6B's size")
    add("--tiny", action="store_true", help="a tiny random model, to try this script")
    add("--prompt", type=int, default=128, help="tokens of the prompt (default: %(default)s)")
    add("--new", type=int, default=16, help="tokens to write (default: %(default)s)")
    add("--runs", type=int, default=3, help="rounds that count (default: %(default)s)")
    add("--no-compile", action="store_true", help="leave out the compiled way")
    add(
        "--busy",
        action="store_true",
        help="one thread, and its processor time in place of the "
        "clock: for a machine that has other work",
    )
    add("--json", type=Path, help="write what was measured into this file as well")
    add("--child", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    args = read_words()
    if args.child:
        what, *words = args.child
        print(json.dumps(CHILDREN[what](*words)))
        return
    if args.busy:
        be_busy()
    if args.no_compile:
        del FAST["compiled"]
    begin, found = time.perf_counter(), about_the_machine(args.busy)
    if args.json and args.json.is_file():  # sections that do not run now stay as they were
        found = json.loads(args.json.read_text(encoding="utf-8")) | found
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_model(args, Path(scratch) / "random")
        for section in args.only:
            try:
                found[section] = RUN[section](args, folder, found)
            except (ValueError, RuntimeError, ImportError) as error:
                print(f"  ({section}: {error})")
            if args.json:
                text = json.dumps(found, indent=1) + "\n"
                args.json.write_text(text, encoding="utf-8")
            print(f"  … {(time.perf_counter() - begin) / 60:.1f} minutes", flush=True)


if __name__ == "__main__":
    main()
