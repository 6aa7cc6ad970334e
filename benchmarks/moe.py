#!/usr/bin/env python3
"""Does the time of a mixture of experts follow the experts that are used? And how does it compare
with transformers?

    python benchmarks/moe.py          # a random Qwen3-MoE in a temporary folder, deleted at the end
    python benchmarks/moe.py --busy   # one thread, its processor time in place of the clock:
                                      # for a machine that has other work

First the whole model: reading a prompt (prefill) and writing (decode), ours against
transformers.generate, asked in turn, the same files, the same prompt, greedy. Then one layer by
itself: the experts in it doubled again and again, with as many for each token as before, and the
other way round. A dense MLP of all the experts' units stands beside, as what the layer would cost
if every expert worked for every token. Figures are medians over the runs, the ratio's range is
that of the pairs.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
import warnings

import torch

warnings.filterwarnings("ignore")
os.environ |= dict(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TQDM_DISABLE="1")

SIZES = dict(
    hidden_size=512,
    intermediate_size=1536,
    moe_intermediate_size=192,
    num_experts=64,
    num_experts_per_tok=8,
    norm_topk_prob=True,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    vocab_size=8192,
    tie_word_embeddings=True,
    max_position_embeddings=1024,
)


def make_checkpoint(folder):
    "A random Qwen3-MoE with the proportions of Qwen3-30B-A3B, a quarter as wide."
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(Qwen3MoeConfig(**SIZES), dtype=torch.bfloat16).save_pretrained(
        folder
    )


def spread(ours, theirs):
    ratios = sorted(a / b for a, b in zip(ours, theirs))
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def whole_model(folder, dtype, prompt, new, runs):
    import decode
    from transformers import AutoModelForCausalLM

    from qwen_nb.mixture import count_active
    from qwen_nb.model import Qwen

    ours, theirs = (
        Qwen.from_pretrained(folder, dtype),
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval(),
    )
    theirs.generation_config.eos_token_id = None
    theirs.generation_config.pad_token_id = 0
    ids, times = (
        torch.randint(
            0, ours.config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(0)
        ),
        {"ours": [], "transformers": []},
    )
    ways = {
        "ours": lambda: decode.time_ours(ours, ids, new),
        "transformers": lambda: decode.time_theirs(theirs, ids, new),
    }
    for i in range(runs + 1):  # the first does not count
        done = {name: ways[name]() for name in (ways if i % 2 else reversed(ways))}
        for name, notes in done.items():
            t = notes.times
            if i:
                times[name].append((t[1] - t[0], (t[-1] - t[1]) / (new - 1)))
    same = next(
        (i for i, (a, b) in enumerate(zip(done["ours"].ids, done["transformers"].ids)) if a != b),
        new,
    )
    total, active = count_active(ours.config)
    print(
        f"\n{str(dtype).removeprefix('torch.')}: {total / 1e6:.0f} M parameters, "
        f"{active / 1e6:.0f} M for a token; prompt of {prompt} tokens, {new} new, "
        f"the first {same} are the same"
    )
    for j, what in enumerate(("prefill", "decode")):
        a, b = ([t[j] for t in times[name]] for name in ways)
        n = prompt if j == 0 else 1
        print(
            f"  {what:8} ours {n / statistics.median(a):8.1f} tokens/s, "
            f"transformers {n / statistics.median(b):8.1f}; "
            f"speed ours / transformers {spread(b, a)}"
        )


def one_layer(tokens, runs, dtype=torch.float32):
    "Time of a layer at several numbers of experts, and of experts a token; in turn, in one run."
    import decode
    from transformers.models.qwen3_moe.modeling_qwen3_moe import (
        Qwen3MoeConfig,
        Qwen3MoeSparseMoeBlock,
    )

    from qwen_nb.mlp import SwiGLU
    from qwen_nb.moe import SparseMLP, unfuse

    h, f = SIZES["hidden_size"], SIZES["moe_intermediate_size"]
    cases = [(8, 8), (16, 8), (32, 8), (64, 8), (128, 8), (64, 1), (64, 2), (64, 4), (64, 16)]
    print(
        f"\none layer, {str(dtype).removeprefix('torch.')}, {tokens} token{'s' * (tokens > 1)}; "
        "microseconds\n  experts  used     ours  transformers  theirs / ours          "
        "dense MLP of all units"
    )
    for E, k in cases:
        torch.manual_seed(0)
        config = Qwen3MoeConfig(
            **SIZES | dict(num_experts=E, num_experts_per_tok=k),
            experts_implementation="grouped_mm",
        )
        theirs, x = (
            Qwen3MoeSparseMoeBlock(config).to(dtype).eval(),
            torch.randn(1, tokens, h, dtype=dtype),
        )
        for p in theirs.parameters():
            torch.nn.init.normal_(p, std=0.05)
        ours = SparseMLP(h, E, k, f, True).to(dtype)
        ours.load_state_dict(unfuse(theirs.state_dict()))
        ways, times = dict(ours=ours, theirs=theirs, dense=SwiGLU(h, E * f).to(dtype)), {}
        with torch.no_grad():
            torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
            for i in range(runs + 3):
                for name in ways if i % 2 else reversed(ways):
                    start = decode.clock()
                    ways[name](x)
                    if i >= 3:
                        times.setdefault(name, []).append(decode.clock() - start)
        us = {name: 1e6 * statistics.median(t) for name, t in times.items()}
        ratio = statistics.median(b / a for a, b in zip(times["ours"], times["theirs"]))
        print(
            f"  {E:7}  {k:4} {us['ours']:8.0f}  {us['theirs']:12.0f}  {ratio:13.2f}"
            f"  {us['dense']:29.0f}"
        )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--prompt", type=int, default=256, help="tokens of the prompt (default: %(default)s)"
    )
    parser.add_argument(
        "--new", type=int, default=32, help="tokens to write (default: %(default)s)"
    )
    parser.add_argument(
        "--runs",
        type=int,
        default=7,
        help="runs of the whole model that count; of a layer ten times as many "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--busy",
        action="store_true",
        help="one thread, and its processor time in place of the clock: for a machine that has "
        "other work",
    )
    args = parser.parse_args()
    import decode

    if args.busy:
        decode.clock = time.thread_time
        torch.set_num_threads(1)
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads"
        f"{', processor time' * args.busy}, torch {torch.__version__}; {args.runs} runs"
    )
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(folder)
        for dtype in (torch.float32, torch.bfloat16):
            whole_model(folder, dtype, args.prompt, args.new, args.runs)
    for tokens in (1, 256):
        one_layer(tokens, 10 * args.runs)


if __name__ == "__main__":
    main()
