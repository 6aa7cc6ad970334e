#!/usr/bin/env python3
"""How long does opening a full-size checkpoint take, and how much memory? Ours against
transformers, in one run.

    # makes a random Qwen3-0.6B (1.2 GB) in a temporary folder, measures, deletes it
    python benchmarks/load.py
    python benchmarks/load.py --model DIR

Each opening runs in a process of its own, the two in turn, after one of each that does not count.
"open" is from_pretrained alone; "first logits" goes on until a short text has passed through, so
that every weight has been read. Peak memory is what the process grew by since before the opening,
over the bytes of the weights as stored.
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


def run(who, folder):
    out = subprocess.run(
        [sys.executable, __file__, "--child", who, "--model", str(folder)],
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
    parser.add_argument("--child", choices=["ours", "transformers"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child, args.model)
    if args.model:
        return compare(args.model, args.runs)
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(folder)
        compare(folder, args.runs)


if __name__ == "__main__":
    main()
