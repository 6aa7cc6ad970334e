#!/usr/bin/env python3
"""How long does opening a full-size checkpoint take, and how much memory? Ours against
transformers, in one run.

    # makes a random Qwen3-0.6B (1.2 GB) in a temporary folder, measures, deletes it
    python benchmarks/load.py
    python benchmarks/load.py --model DIR
    python benchmarks/load.py --quantised              # codes: from their folder, and made on load

Each opening runs in a process of its own, the two in turn, after one of each that does not count.
"open" is from_pretrained alone; "first logits" goes on until a short text has passed through, so
that every weight has been read. Peak memory is what the process grew by since before the opening,
over the bytes of the weights as stored.

With --quantised: int8 and int4, once opened with `quantize=` from the plain folder and once from a
folder that `save_quantized` wrote, in turn; processor time stands beside the clock's, for a machine
that has other work. Codes that are stored are put in a kernel's layout when they are first used,
so "first logits" says what that costs.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def make_checkpoint(folder):
    "A random Qwen3-0.6B in the reference's own files."
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    from qwen_nb.model import QwenConfig

    c = QwenConfig()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads,
        head_dim=c.head_dim,
        tie_word_embeddings=True,
        max_position_embeddings=c.max_position_embeddings,
        rope_parameters=dict(rope_type="default", rope_theta=c.rope_theta),
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def memory(field):
    "VmRSS, VmHWM or RssAnon of this process, in bytes (Linux)."
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1]) * 1024


def child(who, folder):
    "Open the model once in this process and print what it took."
    import torch

    ids = torch.arange(1, 9)[None]
    if who == "ours":
        from qwen_nb.model import Qwen

        load = lambda: Qwen.from_pretrained(folder)
    else:
        from transformers import AutoModelForCausalLM

        # imported here so that it is not timed
        from transformers.models.qwen3 import modeling_qwen3  # noqa: F401

        load = lambda: AutoModelForCausalLM.from_pretrained(folder)
    before = memory("VmRSS")
    start = time.perf_counter()
    model = load()
    opened = time.perf_counter() - start
    peak_open = memory("VmHWM") - before
    with torch.no_grad():
        logits = model(ids)
    first = time.perf_counter() - start
    logits = getattr(logits, "logits", logits)
    print(
        json.dumps(
            dict(
                open=opened,
                first=first,
                peak_open=peak_open,
                peak=memory("VmHWM") - before,
                dtype=str(logits.dtype),
                sample=logits[0, -1].float().tolist(),
            )
        )
    )


def child_quantised(folder, kind, stored):
    "Open codes in this process, made on load or stored; the first call saves them."
    import torch

    from qwen_nb.model import Qwen
    from qwen_nb.quantised_model import save_quantized

    if stored == "save":
        save_quantized(Qwen.from_pretrained(folder, quantize=kind), Path(folder) / kind)
        return print("{}")
    settings = {} if stored == "stored" else dict(quantize=kind)
    Qwen.from_pretrained(None, quantize=kind)  # all modules are there, all kernels tried
    start, busy = time.perf_counter(), time.process_time()
    model = Qwen.from_pretrained(Path(folder) / (kind if stored == "stored" else "."), **settings)
    opened, opened_busy = time.perf_counter() - start, time.process_time() - busy
    with torch.no_grad():
        model(torch.arange(1, 9)[None])
    first, first_busy = time.perf_counter() - start, time.process_time() - busy
    print(json.dumps(dict(open=opened, first=first, busy=opened_busy, first_busy=first_busy)))


def compare_quantised(folder, runs):
    print(f"\n{'codes':18}{'open (s)':>10}{'first logits':>14}{'processor, open':>17}{'first':>8}")
    for kind in ("int8", "int4"):
        run(kind, folder, "save")
        found = dict(made=[], stored=[])
        for round_ in range(runs + 1):
            for how, kept in found.items():
                measured = run(kind, folder, how)
                if round_:  # the first does not count
                    kept.append(measured)
        for how, rows in found.items():
            m = {k: statistics.median(r[k] for r in rows) for k in rows[0]}
            numbers = f"{m['open']:10.2f}{m['first']:14.2f}{m['busy']:17.2f}{m['first_busy']:8.2f}"
            print(f"{kind + ', ' + how:18}{numbers}")
        pairs = list(zip(found["stored"], found["made"]))
        for what, key in (("open", "busy"), ("first logits", "first_busy")):
            ratios = [a[key] / b[key] for a, b in pairs]
            goal = ", goal 0.25" if key == "busy" else ""
            text = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
            print(f"  stored / made, processor time, {what}: {text}{goal}")


def run(who, folder, *words):
    out = subprocess.run(
        [sys.executable, __file__, "--child", who, *words, "--model", str(folder)],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | dict(TQDM_DISABLE="1", HF_HUB_OFFLINE="1"),
    )
    return json.loads(out.stdout.splitlines()[-1])


def compare(folder, runs):
    size = sum(p.stat().st_size for p in Path(folder).glob("*.safetensors"))
    results = dict(ours=[], transformers=[])
    for i in range(runs + 1):
        for who, kept in results.items():
            measured = run(who, folder)
            if i:
                kept.append(measured)
    a, b = (r[0]["sample"] for r in results.values())
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}; "
        f"weights {size / 1e9:.2f} GB; {runs} runs each, medians"
    )
    print(f"largest difference of the logits: {max(abs(x - y) for x, y in zip(a, b)):g}")
    print(f"{'':14}{'open (s)':>10}{'first logits (s)':>18}{'peak, open':>12}{'peak, run':>12}")
    middle = {
        who: {
            k: statistics.median(r[k] for r in rs) for k in ("open", "first", "peak_open", "peak")
        }
        for who, rs in results.items()
    }
    for who, m in middle.items():
        opened, peak = m["peak_open"] / size, m["peak"] / size
        print(f"{who:14}{m['open']:10.3f}{m['first']:18.3f}{opened:12.2f}{peak:12.2f}")
    ratios = [x["open"] / y["open"] for x, y in zip(*results.values())]
    print(
        f"ours / transformers, open: {statistics.median(ratios):.3f} ({min(ratios):.3f} to "
        f"{max(ratios):.3f})"
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        help="a folder with a Qwen checkpoint (default: a random Qwen3-0.6B, made and deleted)",
    )
    parser.add_argument(
        "--runs", type=int, default=5, help="openings of each that count (default: %(default)s)"
    )
    parser.add_argument(
        "--quantised", action="store_true", help="codes from their folder, and made on load"
    )
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        who, *words = args.child
        return child_quantised(args.model, who, *words) if words else child(who, args.model)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        if not args.model:
            make_checkpoint(folder)
        elif args.quantised:  # codes are written beside links to its files
            folder.mkdir()
            for file in Path(args.model).resolve().glob("*.*"):
                (folder / file.name).symlink_to(file)
        else:
            folder = Path(args.model)
        (compare_quantised if args.quantised else compare)(folder, args.runs)


if __name__ == "__main__":
    main()
