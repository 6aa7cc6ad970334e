#!/usr/bin/env python3
"""How many tokens a second in training? Ours against transformers' Qwen3ForCausalLM (sdpa
attention), in one loop and one run.

    python benchmarks/train.py                  # the packaged size, then 12 layers of width 512
    python benchmarks/train.py --small          # the packaged size alone
    python benchmarks/train.py --small --busy   # on a machine that has other work
    python benchmarks/train.py --seq 256        # shorter rows than the 512 of configs/packaged.toml
    python benchmarks/train.py --profile        # and where the time of a step goes

Both begin with the same weights and get the same batch, loss (float32), clipping and fused AdamW;
only the model differs. Each size runs in float32 and in bfloat16 autocast, on plain rows (one
document each, causal attention) and on packed rows (several documents that must not see each other:
both get the same mask and positions). Steps are timed in turn. Figures are medians over the steps,
the ratio's range is that of the pairs.

Before the clock runs, both must give the same loss and the same gradient of every weight. In
float32 they are compared with each other. In bfloat16 each rounds in its own places, so both are
compared with float32, and ours may be at most 15 % further from it than theirs, all weights
together and the worst of them. After the last step in float32 the losses must still agree, so that
nobody was faster by training less.

"of peak" is the floating-point operations that a step needs (the causal half of attention counted,
twice as much back as forward) over what a large square product of the same dtype reaches on this
machine, measured just before: while both models wait for the same products, the rest is all that
can be gained. The path for a CUDA device is written but was not tested.
"""

import argparse
import copy
import os
import platform
import statistics
import time
import warnings

import torch

warnings.filterwarnings("ignore")
os.environ |= dict(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TQDM_DISABLE="1")

clock = time.perf_counter  # --busy: time.thread_time
PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm"}


def packaged_config():
    from qwen_nb.model import QwenConfig

    return QwenConfig.from_pretrained()


def wide_config():
    from qwen_nb.model import QwenConfig

    return QwenConfig(
        vocab_size=512,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=512,
        rope_theta=10_000.0,
    )


def make_models(config, device):
    "Ours and theirs, with the same random weights, in training mode."
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from qwen_nb.model import Qwen
    from qwen_nb.train import init_weights

    same = {
        k: getattr(config, k)
        for k in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "rms_norm_eps",
            "tie_word_embeddings",
            "max_position_embeddings",
        )
    }
    ours = init_weights(Qwen(config)).to(device)
    theirs = Qwen3ForCausalLM(
        Qwen3Config(
            **same,
            use_cache=False,
            rope_parameters=dict(rope_type="default", rope_theta=config.rope_theta),
        )
    ).to(device)
    assert theirs.config._attn_implementation == "sdpa", theirs.config._attn_implementation
    theirs.load_state_dict(
        ours.state_dict()
        | (
            {"lm_head.weight": ours.model.embed_tokens.weight} if config.tie_word_embeddings else {}
        ),
        strict=True,
    )
    return ours.train(), theirs.train()


def make_batch(config, rows, seq, packed, device):
    "Random ids. A packed row holds documents of 40 to 120 tokens."
    from qwen_nb.rows import IGNORED

    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (rows, seq + 1), generator=g)
    starts = torch.zeros(rows, seq + 1, dtype=torch.long)
    for row in starts if packed else ():
        ends = torch.randint(40, 121, (seq,), generator=g).cumsum(0)
        row[ends[ends <= seq]] = 1
    documents, place = starts.cumsum(1), torch.arange(seq + 1).expand(rows, -1)
    positions = place - (place * starts).cummax(1).values
    labels = ids[:, 1:].masked_fill(documents[:, 1:] != documents[:, :-1], IGNORED)
    batch = dict(
        input_ids=ids[:, :-1],
        labels=labels,
        document_ids=documents[:, :-1],
        position_ids=positions[:, :-1],
    )
    return {k: v.contiguous().to(device) for k, v in batch.items()}


def theirs_forward(model, batch):
    "As `qwen_nb.train.forward`: the mask only if a row holds more than one document."
    from qwen_nb.rows import document_mask

    if not batch["document_ids"].any():
        return model(batch["input_ids"]).logits
    return model(
        batch["input_ids"],
        position_ids=batch["position_ids"],
        attention_mask=document_mask(batch["document_ids"]),
    ).logits


class Side:
    "A model with its optimizer, and the loop that both go through."

    def __init__(self, model, forward, bfloat16, compiled):
        from qwen_nb.train import parameter_groups

        self.model, self.forward, self.bfloat16 = (
            model,
            torch.compile(forward) if compiled else forward,
            bfloat16,
        )
        self.optimizer = torch.optim.AdamW(parameter_groups(model), lr=1e-4, fused=True)

    def backward(self, batch):
        from qwen_nb.train import next_token_loss

        self.optimizer.zero_grad()
        with torch.autocast(batch["input_ids"].device.type, torch.bfloat16, enabled=self.bfloat16):
            logits = self.forward(self.model, batch)
        loss = next_token_loss(logits, batch["labels"])
        loss.backward()
        return loss.detach()

    def step(self, batch):
        loss = self.backward(batch)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss

    def time(self, batch):
        wait = torch.cuda.synchronize if batch["input_ids"].is_cuda else lambda: None
        wait()
        start = clock()
        loss = self.step(batch)
        wait()
        return clock() - start, loss.item()


def off(ours, theirs):
    """How far the gradients are from those of the other, length of the difference over the length:
    all together, and the worst of all weights."""
    pairs = [((g - t).norm(), t.norm()) for (_, g), (_, t) in zip(ours, theirs, strict=True)]
    lengths = torch.tensor(pairs).square().sum(0).sqrt()
    return (lengths[0] / lengths[1]).item(), max((d / n).item() for d, n in pairs)


def gradients(side, batch):
    loss = side.backward(batch).item()
    return loss, sorted((n, p.grad.clone()) for n, p in side.model.named_parameters())


def check_same(sides, exact, batch):
    "Raise AssertionError unless both models give the same loss and the same gradients."
    (a, ga), (b, gb) = (gradients(side, batch) for side in sides.values())
    if not sides["ours"].bfloat16:
        assert abs(a - b) <= 1e-6 * b and off(ga, gb)[1] <= 1e-4, (
            f"loss {a} and {b}, gradients {off(ga, gb)[1]:.1e} apart"
        )
        return f"loss {a:.4f} and {b:.4f}, gradients at most {off(ga, gb)[1]:.0e} apart"
    c, gc = gradients(exact, batch)
    ours, theirs = off(ga, gc), off(gb, gc)
    assert abs(a - c) <= 2e-3 * c and abs(b - c) <= 2e-3 * c, f"loss {a} and {b}, in float32 {c}"
    assert all(a <= 1.15 * b <= 0.115 for a, b in zip(ours, theirs)), (
        f"gradients {ours} from float32's, theirs {theirs}"
    )
    return (
        f"loss {a:.4f} and {b:.4f} ({c:.4f} in float32), gradients {ours[0]:.1%} and "
        f"{theirs[0]:.1%} from float32's (the worst weight's {ours[1]:.1%} and {theirs[1]:.1%})"
    )


def shares(side, batch):
    "Where the time of one step goes."
    with torch.profiler.profile() as profile:
        side.step(batch)
    spent = {
        e.key: e.self_device_time_total or e.self_cpu_time_total for e in profile.key_averages()
    }
    kernel = sum(t for name, t in spent.items() if "scaled_dot_product" in name)
    products, all_of_it = sum(spent.get(name, 0) for name in PRODUCTS), sum(spent.values())
    rest = sorted(
        (
            (t, name.removeprefix("aten::"))
            for name, t in spent.items()
            if name not in PRODUCTS and "scaled_dot_product" not in name
        ),
        reverse=True,
    )[:5]
    return (
        f"products {products / all_of_it:.0%}, attention kernel {kernel / all_of_it:.0%}, the "
        f"rest {1 - (products + kernel) / all_of_it:.0%}: "
        + ", ".join(f"{name} {t / all_of_it:.1%}" for t, name in rest)
    )


def compare(name, config, rows, packed, bfloat16, args):
    from qwen_nb.budget import cast_once
    from qwen_nb.log import flops_per_token, measure_peak
    from qwen_nb.train import forward

    dtype, batch = (
        "bfloat16" if bfloat16 else "float32",
        make_batch(config, rows, args.seq, packed, args.device),
    )
    ours, theirs = make_models(config, args.device)
    if bfloat16:
        cast_once(ours)  # as a run does
    exact = Side(copy.deepcopy(theirs), theirs_forward, False, False)
    sides = dict(
        ours=Side(ours, forward, bfloat16, args.compile),
        transformers=Side(theirs, theirs_forward, bfloat16, args.compile),
    )
    print(
        f"\n{name}, {dtype}{' autocast' * bfloat16}, {rows} rows of {args.seq}, "
        f"{'packed' if packed else 'plain'}"
    )
    print("  " + check_same(sides, exact, batch))
    peak, seconds, losses = (
        measure_peak(args.device, dtype, repeats=10, clock=clock),
        {who: [] for who in sides},
        {},
    )
    for i in range(args.runs + 2):  # the first two do not count
        for who, side in list(sides.items()) if i % 2 else list(sides.items())[::-1]:
            took, losses[who] = side.time(batch)
            if i > 1:
                seconds[who].append(took)
    if not bfloat16:
        assert abs(losses["ours"] - losses["transformers"]) <= 1e-4 * losses["ours"], (
            f"after {args.runs + 2} steps the losses are {losses}"
        )
    tokens, flops = rows * args.seq, flops_per_token(config, args.seq)
    for who, s in seconds.items():
        speed = tokens / statistics.median(s)
        print(
            f"  {who:14}{speed:12,.0f} tokens/s{speed * flops / 1e9:10,.0f} GFLOP/s, "
            f"{speed * flops / peak:.0%} of peak ({peak / 1e9:,.0f})"
        )
    ratios = sorted(b / a for a, b in zip(*seconds.values()))
    print(
        f"  ours / transformers: {statistics.median(ratios):.2f} ({ratios[0]:.2f} to "
        f"{ratios[-1]:.2f})"
    )
    if args.profile:
        for who, side in sides.items():
            print(f"  {who:14}{shares(side, batch)}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="the packaged size alone")
    parser.add_argument("--wide", action="store_true", help="12 layers of width 512 alone")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="one of them alone (bfloat16: autocast)"
    )
    parser.add_argument("--rows", choices=["plain", "packed"], help="one kind of rows alone")
    parser.add_argument(
        "--seq",
        type=int,
        default=512,
        help="tokens of a row (default: %(default)s, as configs/packaged.toml)",
    )
    parser.add_argument(
        "--runs", type=int, default=10, help="pairs of steps that count (default: %(default)s)"
    )
    parser.add_argument("--compile", action="store_true", help="both through torch.compile")
    parser.add_argument(
        "--profile", action="store_true", help="print where the time of a step goes"
    )
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="(default here: %(default)s)",
    )
    parser.add_argument(
        "--busy",
        action="store_true",
        help=(
            "one thread, and its processor time in place of the clock: for a machine that has "
            "other work"
        ),
    )
    args = parser.parse_args()
    if args.busy:
        global clock
        if args.device != "cpu":
            parser.error("--busy counts processor time; it is for the CPU")
        clock = time.thread_time
        torch.set_num_threads(1)
    device = (
        torch.cuda.get_device_name(args.device)
        if args.device.startswith("cuda")
        else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    import transformers

    print(
        f"{device}{', processor time' * args.busy}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}; {args.runs} pairs of steps{', compiled' * args.compile}"
    )
    sizes = [("packaged size", packaged_config(), 16)] * (not args.wide) + [
        ("12 layers of width 512", wide_config(), 4)
    ] * (not args.small)
    for name, config, rows in sizes:
        for dtype in [args.dtype] if args.dtype else ["float32", "bfloat16"]:
            for kind in [args.rows] if args.rows else ["plain", "packed"]:
                compare(name, config, rows, kind == "packed", dtype == "bfloat16", args)


if __name__ == "__main__":
    main()
